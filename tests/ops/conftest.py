"""`make sanitize` must not pass with any other extension than the sanitised one."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def sanitised_extension():
    folder = os.environ.get("LAS_MM_SANITIZE")
    if folder:
        from las_mm import _C  # an ImportError here is the loud failure that we want

        assert Path(_C.__file__).resolve().is_relative_to(Path(folder).resolve()), _C.__file__
        loaded = Path("/proc/self/maps").read_text()
        assert "libasan" in loaded and "libubsan" in loaded
