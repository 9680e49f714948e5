#!/usr/bin/env python
"""Predict the latency of a config's backbone on a device; the same as ``las_mm predict``."""

from functools import partial

from las_mm.cli import run

main = partial(run, "predict", prog="predict_latency.py")

if __name__ == "__main__":
    main()
