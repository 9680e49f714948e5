#!/usr/bin/env python
"""Check a calibration against what it has not seen; the same as ``las_mm validate``."""

from functools import partial

from las_mm.cli import run

main = partial(run, "validate", prog="validate_latency.py")

if __name__ == "__main__":
    main()
