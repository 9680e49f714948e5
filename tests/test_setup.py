"""setup.py: which kernels it builds, for which GPUs, and what it says about it."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from las_mm import dependencies

ROOT = Path(__file__).resolve().parents[1]
RECENT = "75 80 86 87 88 89 90 100 110 103 120 121"  # what nvcc 13.0 compiles for
VARIABLES = (
    "CUDA_HOME",
    "CUDA_PATH",
    "FORCE_CUDA",
    "LAS_MM_NO_NATIVE",
    "TORCH_CUDA_ARCH_LIST",
)


@pytest.fixture
def setup(monkeypatch, tmp_path):
    """The module, on a machine without toolkit and settings."""
    spec = importlib.util.spec_from_file_location("las_mm_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(ROOT)
    for name in VARIABLES:
        # Set first, so that what setup.py sets is taken back as well.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(module, "CUDA_FOLDERS", (str(tmp_path / "cuda-{}"), str(tmp_path / "cuda")))
    return module


def make_torch(gpu: bool, cuda: str | None = "13.0"):
    return SimpleNamespace(
        __version__="2.14.1",
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(is_available=lambda: gpu),
    )


def make_toolkit(folder: Path, architectures: str = RECENT) -> str:
    for name in ("include", "bin"):
        (folder / name).mkdir(parents=True)
    (folder / "include" / "cuda_runtime.h").touch()
    nvcc = folder / "bin" / "nvcc"
    lines = "".join(f"echo compute_{number}\n" for number in architectures.split())
    nvcc.write_text(f'#!/bin/sh\n[ "$1" = --list-gpu-arch ] || exit 1\n{lines}')
    nvcc.chmod(0o755)
    return str(folder)


def test_units_hold_every_source_once_and_are_left_if_nothing_changed(setup, monkeypatch, tmp_path):
    sources = ["ops/library.cpp", "ops/cpu/kernels_avx2.cpp"]
    sources += [f"ops/cpu/{name}.cpp" for name in "abcdefg"]
    monkeypatch.chdir(tmp_path)
    made = setup.units(sources)
    assert made[0] == "ops/cpu/kernels_avx2.cpp" and len(made) == 1 + setup.UNITS
    lines = [line for path in made[1:] for line in Path(path).read_text().splitlines()]
    assert sorted(lines) == sorted(f'#include "{s[4:]}"' for s in sources if "kernels" not in s)
    for path in made[1:]:
        os.utime(path, (1, 1))
    assert setup.units(sources) == made
    assert all(os.stat(path).st_mtime == 1 for path in made[1:])
    setup.units(sources[:-1])
    assert any(os.stat(path).st_mtime != 1 for path in made[1:])


def test_toolkit_is_looked_for_in_order(setup, monkeypatch, tmp_path):
    torch = make_torch(gpu=False)
    assert setup.find_cuda_toolkit(torch) is None
    usual = make_toolkit(tmp_path / "cuda")
    assert setup.find_cuda_toolkit(torch) == usual
    matching = make_toolkit(tmp_path / "cuda-13.0")
    assert setup.find_cuda_toolkit(torch) == matching
    on_path = make_toolkit(tmp_path / "elsewhere")
    monkeypatch.setenv("PATH", f"{on_path}/bin")
    assert setup.find_cuda_toolkit(torch) == on_path
    named = make_toolkit(tmp_path / "named")
    monkeypatch.setenv("CUDA_HOME", named)
    assert setup.find_cuda_toolkit(torch) == named


def test_a_wrapper_on_the_path_and_a_toolkit_without_compiler_do_not_count(
    setup, monkeypatch, tmp_path
):
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text("#!/bin/sh\n")
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", str(wrapper.parent))
    usual = make_toolkit(tmp_path / "cuda")
    (Path(make_toolkit(tmp_path / "cuda-13.0")) / "bin" / "nvcc").unlink()
    assert setup.find_cuda_toolkit(make_torch(gpu=False)) == usual


@pytest.mark.parametrize("gpu", [False, True])
def test_zero_means_cpu_even_with_everything_there(setup, monkeypatch, tmp_path, gpu):
    make_toolkit(tmp_path / "cuda")
    monkeypatch.setenv("FORCE_CUDA", "0")
    assert setup.cuda_sources(make_torch(gpu)) == ([], "FORCE_CUDA=0")


def test_unset_needs_a_gpu_and_a_toolkit(setup, tmp_path):
    sources, reason = setup.cuda_sources(make_torch(gpu=False))
    assert not sources and "no GPU" in reason and "FORCE_CUDA=1" in reason
    sources, reason = setup.cuda_sources(make_torch(gpu=True))
    assert not sources and "CUDA_HOME" in reason
    toolkit = make_toolkit(tmp_path / "cuda")
    assert setup.cuda_sources(make_torch(gpu=False))[0] == []
    sources, reason = setup.cuda_sources(make_torch(gpu=True))
    assert "ops/cuda/sparse_bottleneck.cu" in sources and toolkit in reason
    assert os.environ["CUDA_HOME"] == toolkit
    assert "TORCH_CUDA_ARCH_LIST" not in os.environ  # torch asks the GPU


def test_empty_is_unset(setup, monkeypatch):
    monkeypatch.setenv("FORCE_CUDA", "")
    assert "no GPU" in setup.cuda_sources(make_torch(gpu=False))[1]


@pytest.mark.parametrize("cuda", ["13.0", None])
def test_one_without_a_compiler_ends_the_build(setup, monkeypatch, tmp_path, cuda):
    if cuda is None:  # then a toolkit does not help either
        make_toolkit(tmp_path / "cuda")
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(SystemExit) as end:
        setup.cuda_sources(make_torch(gpu=True, cuda=cuda))
    assert "needs a torch built with CUDA" in end.value.code
    assert "\n" not in end.value.code


def test_other_values_are_refused(setup, monkeypatch):
    monkeypatch.setenv("FORCE_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0, 1 or unset, got 'yes'"):
        setup.cuda_sources(make_torch(gpu=False))


@pytest.mark.parametrize(
    "compiler, expected",
    [
        (RECENT, "7.5 8.0 8.6 9.0 10.0 12.0+PTX"),
        ("35 37 50 52 53 60 61 62 70 72 75 80 86 87 89 90", "7.5 8.0 8.6 9.0+PTX"),  # 11.8
    ],
)
def test_default_architectures_are_those_of_the_compiler(
    setup, monkeypatch, tmp_path, compiler, expected
):
    make_toolkit(tmp_path / "cuda", compiler)
    monkeypatch.setenv("FORCE_CUDA", "1")
    sources, reason = setup.cuda_sources(make_torch(gpu=False))
    assert len(sources) == len(list((ROOT / "ops/cuda").glob("*.cu")))
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == expected
    assert reason.endswith(f"for {expected}")


def test_a_compiler_for_none_of_them_is_refused(setup, monkeypatch, tmp_path):
    make_toolkit(tmp_path / "cuda", "35 50")
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match="compiles for none of"):
        setup.cuda_sources(make_torch(gpu=False))


def test_the_users_architectures_stay(setup, monkeypatch, tmp_path):
    make_toolkit(tmp_path / "cuda")
    monkeypatch.setenv("FORCE_CUDA", "1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.7")
    _, reason = setup.cuda_sources(make_torch(gpu=False))
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.7" and reason.endswith("for 8.7")


def test_without_native_kernels_nothing_is_built(setup, monkeypatch, capsys):
    monkeypatch.setenv("LAS_MM_NO_NATIVE", "1")
    assert setup.native_extension() == {}
    assert "without the native extension" in capsys.readouterr().err


def test_the_build_says_in_one_line_what_it_makes(setup, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_CUDA", "0")
    (extension,) = setup.native_extension()["ext_modules"]
    assert extension.name == "las_mm._C"
    assert not any(source.endswith(".cu") for source in extension.sources)
    ours = [line for line in capsys.readouterr().err.splitlines() if line.startswith("las_mm: ")]
    assert len(ours) == 1 and "for CPU only (FORCE_CUDA=0)" in ours[0]


def test_versions_named_are_those_of_the_stacks(setup):
    """Classifiers, the message about versions that work, and README name what is tested."""
    stacks = {path.stem: path.read_text() for path in (ROOT / "requirements/stacks").glob("*.txt")}
    pythons = {re.match(r"# Python (3\.\d+):", text)[1] for text in stacks.values()}
    assert set(setup.PYTHONS) == pythons
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, text in stacks.items():
        pins = dict(re.findall(r"^([\w-]+)==(\S+)$", text, re.MULTILINE))
        (row,) = [line for line in readme.splitlines() if line.startswith(f"| `{name}` |")]
        assert re.match(r"# Python (\S+):", text)[1] in row and pins["torch"] in row
        for package in pins.keys() - {"torch", "torchvision"}:
            assert f"{package.removeprefix('onedl-')} {pins[package]}" in row, (name, package)
        if name == "openmmlab":
            for package in pins.keys() - {"torchvision"}:
                assert f"{package} {pins[package]}" in dependencies.WORKING
