"""The file that replaces the table of tiles, read by a program of its own: no GPU is needed."""

import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include "cuda/tile_file.h"
int main(int, char** arguments) {
  try {
    const las_mm::cuda::TileRule* r = las_mm::cuda::tile_rule(std::atoi(arguments[1]));
    std::printf("%d %g %g %g", r->capability, r->least_rows, r->large_waves, r->medium_waves);
  } catch (const c10::ValueError& error) {
    std::printf("%s", error.what_without_backtrace());
  }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tile_file")
    (folder / "main.cpp").write_text(PROGRAM)
    torch_root = Path(torch.__file__).parent
    abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
    command = ["g++", "-std=c++17", "-DLAS_MM_EMULATE", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
    for include in (ROOT / "ops", ROOT / "tests/ops/emulator", torch_root / "include"):
        command.append(f"-I{include}")
    command += [str(folder / "main.cpp"), "-o", str(folder / "read"), f"-L{torch_root / 'lib'}"]
    subprocess.run([*command, "-lc10", f"-Wl,-rpath,{torch_root / 'lib'}"], check=True)
    return folder / "read"


def read(program: Path, path: Path | None, capability: int = 90) -> str:
    environment = {} if path is None else {"LAS_MM_CUDA_TILES": str(path)}
    command = [str(program), str(capability)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_built_in_table(program):
    assert read(program, None) == "90 2101 0.62 1.24"
    assert read(program, None, 75) == "0 1024 1e+30 1"


def test_the_first_rule_that_fits(program, tmp_path):
    path = tmp_path / "tiles"
    path.write_text("# of a card\n\n90 1 2 3  # newest\n\t80 4 5e1 6\n")
    assert read(program, path, 100) == "90 1 2 3"
    assert read(program, path, 86) == "80 4 50 6"
    assert read(program, path, 75) == "0 1024 1e+30 1"  # none: the built-in one


@pytest.mark.parametrize("line", ["90 1 2", "90 1 2 3 4", "new 1 2 3"])
def test_a_line_that_is_no_rule(program, tmp_path, line):
    path = tmp_path / "tiles"
    path.write_text(f"80 1 2 3\n{line}\n")
    assert f"got '{line}'" in read(program, path)


def test_a_missing_file(program, tmp_path):
    assert "cannot read" in read(program, tmp_path / "none")
