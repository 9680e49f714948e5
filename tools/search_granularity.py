#!/usr/bin/env python
"""Find the fastest granularity S and G per stage for a device; the same as ``las_mm search``."""

from functools import partial

from las_mm.cli import run

main = partial(run, "search", prog="search_granularity.py")

if __name__ == "__main__":
    main()
