"""``python -m las_mm``: the ``las_mm`` command."""

from las_mm.cli import main

if __name__ == "__main__":
    main()
