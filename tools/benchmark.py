#!/usr/bin/env python
"""Time a dynamic backbone against the best static engines; the same as ``las_mm benchmark``."""

from functools import partial

from las_mm.cli import run

main = partial(run, "benchmark", prog="benchmark.py")

if __name__ == "__main__":
    main()
