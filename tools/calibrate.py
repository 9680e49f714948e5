#!/usr/bin/env python
"""Measure this machine, for predictions of its latency; the same as ``las_mm calibrate``."""

from functools import partial

from las_mm.cli import run

main = partial(run, "calibrate", prog="calibrate.py")

if __name__ == "__main__":
    main()
