#!/usr/bin/env python
"""Build the CUDA kernels for several GPU generations and check what became of them; needs no GPU.

python tools/cuda_resources.py                        # build, then table and checks
python tools/cuda_resources.py --write docs/cuda.md   # put the table there as well

setup.py builds the extension into build/cuda, again only what has changed; the installed extension
stays as it is. The checks read what `ptxas -v` said while compiling, the constants of the kernels'
headers, and the built machine code: no spills, the occupancy that a kernel asks for
(kMinBlocks), shared memory that fits, tensor-core and asynchronous-copy instructions where they
are meant to be. A check that fails ends the program with status 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
MARKERS = ("<!-- resources -->", "<!-- /resources -->")


class ResourceError(RuntimeError):
    """Something that ends the program; the message is one for the user."""


# ---- Occupancy -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor has.

    Attributes:
        warps: Resident at a time.
        blocks: Resident at a time.
        shared: KiB of shared memory.
        block_shared: KiB of it that one block may have, if its kernel opts in.
    """

    warps: int
    blocks: int
    shared: int
    block_shared: int


# CUDA programming guide, "Technical Specifications per Compute Capability"; the limits of blocks
# and the rules in `blocks_per_multiprocessor` also stand in the toolkit's cuda_occupancy.h.
LIMITS = {
    70: Limits(64, 32, 96, 96),
    72: Limits(64, 32, 96, 96),
    75: Limits(32, 16, 64, 64),
    80: Limits(64, 32, 164, 163),
    86: Limits(48, 16, 100, 99),
    87: Limits(48, 16, 164, 163),
    89: Limits(48, 24, 100, 99),
    90: Limits(64, 32, 228, 227),
    100: Limits(64, 32, 228, 227),
    103: Limits(64, 32, 228, 227),
    120: Limits(48, 24, 100, 99),
    121: Limits(48, 24, 100, 99),
}
REGISTERS = 65536  # of a multiprocessor
PARTITIONS = 4  # of a multiprocessor; each has a share of registers and warps
REGISTER_UNIT = 256  # registers are given to warps in multiples of this


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def shared_limit(architecture: int, shared: int) -> int:
    """Blocks that fit into shared memory, each with ``shared`` bytes."""
    limits = LIMITS[architecture]
    if shared > limits.block_shared * 1024:
        return 0
    recent = architecture >= 80
    each = round_up(shared + (1024 if recent else 0), 128 if recent else 256)
    return limits.shared * 1024 // each if each else limits.blocks


def blocks_per_multiprocessor(architecture: int, threads: int, registers: int, shared: int) -> int:
    """Blocks that a multiprocessor holds at a time.

    Args:
        architecture: Compute capability times ten; a key of :data:`LIMITS`.
        threads: Of a block.
        registers: Of a thread.
        shared: Bytes of shared memory of a block, static and dynamic.
    """
    limits = LIMITS[architecture]
    warps = -(-threads // 32)
    warp_registers = round_up(max(registers, 1) * 32, REGISTER_UNIT)
    by_registers = REGISTERS // PARTITIONS // warp_registers * PARTITIONS // warps
    by_shared = shared_limit(architecture, shared)
    return min(limits.blocks, limits.warps // warps, by_registers, by_shared)


# ---- What the compiler says ----------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """A kernel on an architecture: registers per thread, and bytes."""

    registers: int
    stack: int
    spills: int
    shared: int  # static


def demangle(text: str) -> str:
    """The text with readable names of functions."""
    filt = shutil.which("c++filt")
    if filt is None:
        raise ResourceError("c++filt is not on the PATH (it comes with binutils)")
    return subprocess.run([filt], input=text, capture_output=True, text=True, check=True).stdout


def kernel_of(function: str) -> str | None:
    """The kernel of an instance of ``entry``, such as ``ReluRows<__half>``."""
    found = re.search(r"\bentry<(.*?)\s*>\(", function)
    return found and found[1].replace("las_mm::cuda::", "")


def parse_ptxas(text: str) -> dict[tuple[str, int], Compiled]:
    """Read what ``ptxas -v`` printed, demangled, into {(kernel, architecture): resources}.

    Functions that a kernel calls count as parts of it.
    """
    found: dict[tuple[str, int], Compiled] = {}
    key = None
    values: Counter[str] = Counter()

    def finish() -> None:
        if key is not None and "registers" in values:
            fields = ("registers", "stack", "spills", "shared")
            mine = Compiled(*(values[field] for field in fields))
            other = found.get(key, mine)  # several sources may contain the same kernel
            found[key] = max(mine, other, key=lambda c: (c.spills, c.stack, c.registers, c.shared))

    for line in text.splitlines():
        if entry := re.search(r"Compiling entry function '(.*)' for 'sm_(\d+)", line):
            finish()
            kernel = kernel_of(entry[1])
            key = (kernel, int(entry[2])) if kernel else None
            values = Counter()
        for field, pattern in (
            ("stack", r"(\d+) bytes stack frame"),
            ("spills", r"(\d+) bytes spill stores"),
            ("spills", r"(\d+) bytes spill loads"),
        ):
            if number := re.search(pattern, line):
                values[field] += int(number[1])
        if "registers" not in values and (number := re.search(r"Used (\d+) registers", line)):
            values["registers"] = int(number[1])
            static = re.search(r"(\d+)(?:\+\d+)? bytes smem", line)
            values["shared"] = int(static[1]) if static else 0
    finish()
    return found


# ---- What the headers say ------------------------------------------------------------------------

# Compiled for the host as the tests' emulator does. A kernel computed by tensor cores is meant for
# GPUs that have them, and one without for the other GPUs (or, as tf32 is optional, for all).
CONSTANTS = """
#include <cstdio>
#include "cuda/sequences.cuh"

using namespace las_mm::cuda;
using __half = half;
using __nv_bfloat16 = bf16;

template <class Kernel>
struct Product {
  static bool is_meant(int) { return true; }
  static void print() {}
};
template <class Tile>
struct Product<SparseGemm<Tile>> {
  static bool is_meant(int capability) {
    Gpu gpu{};
    gpu.capability = capability;
    for (int allow_tf32 = 0; allow_tf32 < 2; ++allow_tf32) {
      gpu.allow_tf32 = allow_tf32 != 0;
      if (has_tensor_cores<typename Tile::T>(gpu) == Tile::kTensorCores) return true;
    }
    return false;
  }
  static void print() {
    std::printf("\\"rows\\": %d, \\"columns\\": %d, \\"tensor_cores\\": %d, \\"scores\\": %d, "
                "\\"copies\\": %d, ", Tile::kRows, Tile::kColumns, Tile::kTensorCores,
                Tile::kScores, !Tile::kConvert);
  }
};
template <class Kernel>
void print(const char* name) {
  std::printf("{\\"kernel\\": \\"%s\\", \\"threads\\": %d, \\"min_blocks\\": %d, \\"shared\\": %d, ",
              name, Kernel::kThreads, Kernel::kMinBlocks, Kernel::kSharedBytes);
  Product<Kernel>::print();
  std::printf("\\"meant\\": [");
  const char* comma = "";
  for (int capability : {ARCHITECTURES}) {
    if (!Product<Kernel>::is_meant(capability)) continue;
    std::printf("%s%d", comma, capability);
    comma = ", ";
  }
  std::printf("]}\\n");
}
int main() {
  KERNELS
}
"""


@dataclass(frozen=True)
class Constants:
    """A kernel as its header describes it; the last ones are of matrix products only."""

    kernel: str
    threads: int
    min_blocks: int
    shared: int  # dynamic, in bytes
    meant: Sequence[int]  # architectures; elsewhere the kernel is not launched
    rows: int = 0
    columns: int = 0
    tensor_cores: int = 0
    scores: int = 0
    copies: int = 0  # asynchronous ones to shared memory, where the GPU has them

    @property
    def title(self) -> str:
        """Such as ``SparseGemm half 128x128 tensor cores``."""
        names = self.kernel.replace("__nv_bfloat16", "bf16").replace("__half", "half")
        if not self.rows:
            return " ".join(re.findall(r"\w+", names))
        name, _, element = re.findall(r"\w+", names)[:3]
        unit = "tensor cores" if self.tensor_cores else "plain"
        scores = " scores" if self.scores else ""
        return f"{name} {element} {self.rows}x{self.columns} {unit}{scores}"


def read_constants(
    kernels: Iterable[str], architectures: Sequence[int], folder: Path, ops: Path = ROOT / "ops"
) -> dict[str, Constants]:
    """The constants of kernels, by name; a program that prints them is built in ``folder``."""
    calls = "\n  ".join(f'print<{kernel}>("{kernel}");' for kernel in sorted(kernels))
    text = CONSTANTS.replace("ARCHITECTURES", ", ".join(map(str, architectures)))
    folder.mkdir(parents=True, exist_ok=True)
    source, program = folder / "constants.cpp", folder / "constants"
    source.write_text(text.replace("KERNELS", calls), encoding="utf-8")
    includes = [f"-I{ops}", f"-I{ROOT / 'tests' / 'ops' / 'emulator'}"]
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-DLAS_MM_EMULATE", *includes]
    done = subprocess.run(
        [*command, str(source), "-o", str(program)], capture_output=True, text=True
    )
    if done.returncode:
        raise ResourceError(f"the kernels' constants do not compile:\n{done.stderr[-3000:]}")
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    found = [Constants(**json.loads(line)) for line in lines.splitlines()]
    return {constants.kernel: constants for constants in found}


# ---- Machine code --------------------------------------------------------------------------------


def find_cuobjdump(toolkit: str | None) -> str:
    """The disassembler of the toolkit or of the triton package."""
    spec = importlib.util.find_spec("triton")
    triton = [Path(p) / "backends/nvidia/bin" for p in (spec and spec.submodule_search_locations) or ()]
    folders = [*([Path(toolkit) / "bin"] if toolkit else []), *triton]
    for folder in folders:
        if found := shutil.which("cuobjdump", path=str(folder)):
            return found
    if found := shutil.which("cuobjdump"):
        return found
    raise ResourceError("no cuobjdump: it comes with CUDA toolkits and with the triton package")


def parse_sass(lines: Iterable[str]) -> dict[str, Counter[str]]:
    """How often instructions occur, by mangled function, in what ``cuobjdump --dump-sass`` prints.

    Instructions go by their name up to the first dot, such as ``HMMA``.
    """
    functions: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in lines:
        if name := re.match(r"\s*Function : (\S+)", line):
            current = functions.setdefault(name[1], Counter())
        elif code := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?\s*([A-Z]\w*)", line):
            current[code[1]] += 1
    return functions


def disassemble(cuobjdump: str, library: Path, architecture: int) -> dict[str, Counter[str]]:
    """Instructions of each kernel of the built extension."""
    bin_folder = os.path.dirname(cuobjdump)  # with nvdisasm, which it calls
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [cuobjdump, "--dump-sass", "-arch", f"sm_{architecture}", str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        functions = parse_sass(process.stdout)
    if process.returncode:
        raise ResourceError(f"failed: {' '.join(command)}")
    names = demangle("\n".join(functions)).splitlines()
    kernels = ((kernel_of(name), code) for name, code in zip(names, functions.values()))
    return {kernel: code for kernel, code in kernels if kernel}


# ---- Build ---------------------------------------------------------------------------------------


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("las_mm_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(folder: Path, environment: Mapping[str, str], console: Console) -> tuple[Path, str]:
    """Build the extension; returns it and what ``ptxas -v`` said about its sources.

    What the compiler prints is kept beside each object, for later runs that find it up to date.
    """
    temp, log_path = folder / "temp", folder / "build.log"
    objects = [temp / path.relative_to(ROOT).with_suffix(".o") for path in cuda_sources()]
    for path in objects:
        said = path.with_suffix(".ptxas")
        if path.is_file() and not (said.is_file() and said.stat().st_mtime >= path.stat().st_mtime):
            path.unlink()  # compiled by someone else: again, and listen this time
    arguments = ["build_ext", "--force", "--build-lib", folder / "lib", "--build-temp", temp]
    folder.mkdir(parents=True, exist_ok=True)
    texts: dict[Path, list[str]] = {}
    current: list[str] = []
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        open(log_path, "w", encoding="utf-8") as log,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        subprocess.Popen(
            [sys.executable, str(ROOT / "setup.py"), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=ROOT,
            env=environment,
        ) as process,
    ):
        task = progress.add_task("", total=None)
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            # ninja prints "[done/all] command" when a command has ended, then its output.
            if edge := re.match(r"\[(\d+)/(\d+)\] .* -o (\S+\.o)\b", line):
                current = texts.setdefault(Path(edge[3]), [])
                progress.update(task, completed=int(edge[1]), total=int(edge[2]))
                if not console.is_terminal:
                    console.print(f"[{edge[1]}/{edge[2]}] {Path(edge[3]).stem}", markup=False)
            current.append(line)
    for path, lines in texts.items():
        if path in objects and path.is_file():
            path.with_suffix(".ptxas").write_text("".join(lines), encoding="utf-8")
    if process.returncode:
        tail = log_path.read_text(encoding="utf-8").splitlines()[-40:]
        raise ResourceError("\n".join(["the build failed:", *tail, f"(all of it: {log_path})"]))
    said = [path.with_suffix(".ptxas").read_text(encoding="utf-8") for path in objects]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return folder / "lib" / "las_mm" / f"_C{suffix}", demangle("\n".join(said))


def cuda_sources() -> list[Path]:
    return sorted((ROOT / "ops" / "cuda").glob("*.cu"))


IMPORT = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("las_mm._C", sys.argv[1])
sys.modules["las_mm._C"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from las_mm import ops
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
missing = [op for op in sys.argv[2:] if not has_kernel(f"las_mm::{op}", "CUDA")]
sys.exit(f"without a CUDA kernel: {missing}" if missing or not ops.native_available() else 0)
"""


def check_import(library: Path) -> list[str]:
    """Import the extension in a new process; returns the ops that it registers for CUDA."""
    texts = [path.read_text(encoding="utf-8") for path in cuda_sources()]
    ops = sorted(re.findall(r'\bm\.impl\("(\w+)"', "\n".join(texts)))
    if not ops:
        raise ResourceError("ops/cuda registers no op")
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, str(library), *ops],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        raise ResourceError(f"{library} does not import:\n{done.stderr[-3000:]}")
    return ops
