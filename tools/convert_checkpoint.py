#!/usr/bin/env python
"""Turn a released checkpoint into one of ours; the same as ``las_mm convert``."""

from functools import partial

from las_mm.cli import run

main = partial(run, "convert", prog="convert_checkpoint.py")

if __name__ == "__main__":
    main()
