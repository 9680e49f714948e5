"""What runs a block, or a stem, on the sparse path: weights packed once, decisions, ops.

One module per kind of block; an executor consumes every child of the block that it is made of, or
raises :class:`~las_mm.models.coverage.Unsupported` with the reason; then the block runs
masked-dense.
"""
