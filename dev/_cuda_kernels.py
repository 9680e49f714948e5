"""What is known of built CUDA kernels: from the compiler, the headers and the machine code."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class ResourceError(RuntimeError):
    """Something that ends the program; the message is one for the user."""


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
CONSTANTS = r"""
#include <cstdio>
#include "cuda/channel_sequences.cuh"

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
  static bool is_meant(int capability) { return is_launched<Tile>(capability); }
  static void print() {
    std::printf(" %d %d %d %d %d %d", Tile::kRows, Tile::kColumns, Tile::kTensorCores,
                Tile::kScores, !Tile::kConvert, Tile::kDeep);
  }
};
template <class Kernel>
void print(const char* name) {
  std::printf("%s|%d %d %d", name, Kernel::kThreads, Kernel::kMinBlocks, Kernel::kSharedBytes);
  Product<Kernel>::print();
  std::printf("|");
  for (int capability : {ARCHITECTURES}) {
    if (Product<Kernel>::is_meant(capability)) std::printf("%d ", capability);
  }
  std::printf("\n");
}
int main() {
  KERNELS
}
"""


@dataclass(frozen=True)
class Constants:
    """A kernel as its header describes it; the last ones are of matrix products only."""

    kernel: str
    meant: tuple[int, ...]  # architectures; elsewhere the kernel is not launched
    threads: int
    min_blocks: int
    shared: int  # dynamic, in bytes
    rows: int = 0
    columns: int = 0
    tensor_cores: int = 0
    scores: int = 0
    copies: int = 0  # asynchronous ones to shared memory, where the GPU has them
    deep: int = 0

    @property
    def title(self) -> str:
        """Such as ``SparseGemm half 128x128 tensor cores``."""
        names = self.kernel.replace("__nv_bfloat16", "bf16").replace("__half", "half")
        if not self.rows:
            return " ".join(re.findall(r"\w+", names))
        name, *_, element = re.findall(r"\w+", names.split(",")[0])
        selected = " selected" if "Selected<" in names else ""
        unit = "tensor cores" if self.tensor_cores else "plain"
        scores = " scores" if self.scores else ""
        deep = " deep" if self.deep else ""
        return f"{name} {element} {self.rows}x{self.columns} {unit}{deep}{scores}{selected}"


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
    found = {}
    for name, numbers, meant in (line.split("|") for line in lines.splitlines()):
        found[name] = Constants(name, tuple(map(int, meant.split())), *map(int, numbers.split()))
    return found


# ---- Machine code --------------------------------------------------------------------------------


def find_cuobjdump(toolkit: str | None) -> str:
    """The disassembler of the toolkit or of the triton package."""
    folders = [str(Path(toolkit) / "bin")] if toolkit else []
    if (spec := importlib.util.find_spec("triton")) and spec.origin:
        folders.append(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    if found := shutil.which("cuobjdump", path=os.pathsep.join(folders)):
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
