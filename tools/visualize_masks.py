#!/usr/bin/env python
"""Draw what a detector finds in images, and where it computed; the same as ``las_mm masks``."""

from functools import partial

from las_mm.cli import run

main = partial(run, "masks", prog="visualize_masks.py")

if __name__ == "__main__":
    main()
