#!/usr/bin/env python
"""How fast GPUs could run a dynamic ResNet at best; the same as ``las_mm roofline``."""

from functools import partial

from las_mm.cli import run

main = partial(run, "roofline", prog="roofline.py")

if __name__ == "__main__":
    main()
