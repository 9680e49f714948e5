#!/usr/bin/env python
"""Draw the curves of trainings; the same as ``las_mm plot``."""

from functools import partial

from las_mm.cli import run

main = partial(run, "plot", prog="plot_log.py")

if __name__ == "__main__":
    main()
