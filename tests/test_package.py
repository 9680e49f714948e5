"""The wheel that pip installs, far from the checkout: a pure-Python one, without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from las_mm.version import __version__

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    env = {**os.environ, "PYTHONPATH": "", "LAS_MM_NO_NATIVE": "1", **variables}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what an sdist has, so that the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("package")
    pip = (sys.executable, "-m", "pip")
    run(sys.executable, "setup.py", "-q", "egg_info", "-e", folder, "sdist", "-d", folder, cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", folder, archive, cwd=folder)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "-t", folder, wheel, cwd=folder)
    return folder


def test_the_wheel_has_what_mim_looks_for(wheel):
    assert wheel.name == f"las_mm-{__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    mim = {name.removeprefix("las_mm/.mim/") for name in names if name.startswith("las_mm/.mim/")}
    for folder in ("configs", "tools"):
        here = subprocess.run(
            ["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True
        ).stdout.split()
        files = here or [str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("*.py")]
        assert set(files) <= mim
    assert "model-index.yml" in mim
    assert {"las_mm/latency/devices/v100.yaml", "las_mm/mask_page.html"} <= names
    assert not any("__pycache__" in name for name in names)


def test_far_from_the_checkout(installed, tmp_path):
    command = (sys.executable, "-m", "las_mm")
    where = dict(PYTHONPATH=str(installed), LAS_MM_PRETRAINED="none")
    assert "predict" in run(*command, "--help", cwd=tmp_path, **where)
    config = installed / "las_mm/.mim/configs/imagenet/lasnet_r50_spatial.py"
    arguments = ("predict", config, "--device", "v100", "--shape", "224", "224", "--rate", "0.5")
    out = run(*command, *arguments, cwd=tmp_path, **where)
    assert "static" in out and "ms" in out
    tool = installed / "las_mm/.mim/tools/train.py"
    assert "--work-dir" in run(sys.executable, tool, "--help", cwd=tmp_path, **where)


def test_without_a_compiler_the_reference_ops_run_and_say_so_once(installed, tmp_path):
    code = (
        # The checkout's own installation would give its native ops away.
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in repr(f)]; "
        "import las_mm, torch; from las_mm import ops; assert las_mm.__file__.startswith"
        f"({str(installed)!r}); assert not ops.native_available(); "
        "old = not hasattr(torch.compiler, 'is_compiling'); "
        "assert old or 'torch._dynamo' not in sys.modules, 'importing it takes seconds'; "
        "net = las_mm.LASResNet(50, base_channels=8, stem_channels=8).eval(); "
        "print(len(net(torch.randn(1, 3, 32, 32))))"
    )
    out = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert out.count("reference implementations") == 1, out
