#!/usr/bin/env python
"""Build the CUDA kernels for several GPU generations and check what became of them; needs no GPU.

python dev/cuda_resources.py                        # build, then table and checks
python dev/cuda_resources.py --write docs/cuda.md   # put the table there as well

setup.py builds the extension into build/cuda, again only what has changed; the installed extension
stays as it is. The checks read what `ptxas -v` said while compiling, the constants of the kernels'
headers, and the built machine code: no spills, the occupancy that a kernel asks for
(kMinBlocks), shared memory that fits, tensor-core and asynchronous-copy instructions where they
are meant to be. A check that fails ends the program with status 1.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.table import Table

from _cuda_build import build, check_import, load_setup
from _cuda_kernels import (
    ROOT,
    Compiled,
    Constants,
    ResourceError,
    disassemble,
    find_cuobjdump,
    parse_ptxas,
    read_constants,
)
from _cuda_occupancy import LIMITS, blocks_per_multiprocessor, shared_limit

NOTE = (
    "Cells: registers per thread / blocks / warps that a multiprocessor holds; empty where the "
    "kernel is never launched. *blocks* is what the kernel asks for (kMinBlocks); shared memory "
    "may allow fewer."
)
MARKERS = ("<!-- resources -->", "<!-- /resources -->")


@dataclass(frozen=True)
class Entry:
    """A kernel on an architecture that launches it."""

    constants: Constants
    architecture: int
    compiled: Compiled
    code: Mapping[str, int]  # how often an instruction occurs

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        return self.constants.shared + self.compiled.shared

    @property
    def blocks(self) -> int:
        """That a multiprocessor holds at a time."""
        return blocks_per_multiprocessor(
            self.architecture, self.constants.threads, self.compiled.registers, self.shared
        )

    def failures(self) -> list[str]:
        """What is wrong with it."""
        found = []
        if self.compiled.spills or self.compiled.stack:
            found.append(
                f"{self.compiled.spills} bytes of spills, {self.compiled.stack} bytes of stack"
            )
        available = LIMITS[self.architecture].block_shared * 1024
        if self.shared > available:
            found.append(f"{self.shared} bytes of shared memory, the GPU allows {available}")
        # Shared memory is a choice of the tile's shape; registers must not make it worse.
        wanted = min(self.constants.min_blocks, shared_limit(self.architecture, self.shared))
        if self.blocks < wanted:
            found.append(
                f"{self.blocks} blocks per multiprocessor instead of {wanted} "
                f"({self.compiled.registers} registers)"
            )
        if self.constants.tensor_cores and not self.code.get("HMMA"):
            found.append("no tensor-core instruction (HMMA)")
        if self.constants.copies and self.architecture >= 80 and not self.code.get("LDGSTS"):
            found.append("no asynchronous copy (LDGSTS)")
        return [f"{self.constants.title}, sm_{self.architecture}: {text}" for text in found]


def collect(
    compiled: Mapping[tuple[str, int], Compiled],
    constants: Mapping[str, Constants],
    code: Mapping[int, Mapping[str, Counter[str]]],
) -> tuple[list[Entry], list[str]]:
    """Put together what is known of each kernel; returns also what is missing somewhere."""
    missing = []
    for architecture, kernels in code.items():
        said = {kernel for kernel, of in compiled if of == architecture}
        for kernel in sorted(said.symmetric_difference(kernels)):
            where = "the machine code" if kernel in said else "what ptxas said"
            missing.append(f"{constants[kernel].title}, sm_{architecture}: not in {where}")
        if not said:
            missing.append(f"sm_{architecture}: no kernel at all")
    entries = [
        Entry(constants[kernel], architecture, resources, code[architecture].get(kernel, {}))
        for (kernel, architecture), resources in compiled.items()
        if architecture in constants[kernel].meant and architecture in code
    ]
    return entries, missing


def rows(entries: Sequence[Entry], architectures: Sequence[int]) -> list[list[str]]:
    """The table: a row of texts per kernel, headings first."""
    table = [["kernel", "threads", "shared bytes", "blocks"]]
    table[0] += [f"sm_{architecture}" for architecture in architectures]
    kernels = sorted({entry.constants for entry in entries}, key=lambda c: (not c.rows, c.title))
    for constants in kernels:
        mine = {e.architecture: e for e in entries if e.constants == constants}
        shared = max(entry.shared for entry in mine.values())
        row = [constants.title, *map(str, (constants.threads, shared, constants.min_blocks))]
        for architecture in architectures:
            entry = mine.get(architecture)
            if entry is None:
                row.append("")
                continue
            warps = entry.blocks * -(-constants.threads // 32)
            row.append(f"{entry.compiled.registers} / {entry.blocks} / {warps}")
        table.append(row)
    return table


def markdown(table: Sequence[Sequence[str]], note: str) -> str:
    """The table and a note below it, for documentation."""
    head, *body = table
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", note])


def write_between_markers(path: Path, text: str) -> None:
    """Replace what stands between :data:`MARKERS`; a missing file is begun."""
    begin, end = MARKERS
    old = path.read_text(encoding="utf-8") if path.is_file() else f"# CUDA\n\n{begin}\n{end}\n"
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        raise ResourceError(f"{path} must contain {begin} and, after it, {end}, each once")
    before, after = old[: old.index(begin)], old[old.index(end) :]
    path.write_text(f"{before}{begin}\n{text}\n{after}", encoding="utf-8")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add(
        "--architectures",
        type=int,
        nargs="+",
        choices=tuple(LIMITS),
        metavar="SM",
        help="such as 80 90; setup.py's default if not given",
    )
    add("--folder", type=Path, default=ROOT / "build" / "cuda", help="for everything built")
    add("--build-only", action="store_true", help="build and import the extension, nothing else")
    add("--optional", action="store_true", help="succeed, and say so, where there is no nvcc")
    add("--write", type=Path, metavar="FILE", help="put the table between the file's markers")
    return parser.parse_args(argv)


def make(
    args: argparse.Namespace, setup: ModuleType, toolkit: str, console: Console
) -> tuple[Path, list[int], str]:
    """Build; returns the extension, its architectures, and what ptxas said."""
    listed = " ".join(f"{number // 10}.{number % 10}" for number in args.architectures or ())
    listed = listed or setup.default_architectures(toolkit)
    environment = {
        **os.environ,
        "CUDA_HOME": toolkit,
        "FORCE_CUDA": "1",
        "LAS_MM_NO_NATIVE": "0",
        "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count())),
        "NVCC_APPEND_FLAGS": f"{os.environ.get('NVCC_APPEND_FLAGS', '')} -Xptxas -v".strip(),
        "TORCH_CUDA_ARCH_LIST": listed,
    }
    library, said = build(args.folder.resolve(), environment, console)
    ops = ", ".join(check_import(library))
    size = library.stat().st_size / 2**20
    console.print(
        f"{library.name} for {listed} ({size:.1f} MiB) imports; ops with CUDA kernels: {ops}",
        highlight=False,
        soft_wrap=True,
    )
    return library, [int(a + b) for a, b in re.findall(r"(\d+)\.(\d)", listed)], said


def show(table: Sequence[Sequence[str]], note: str, console: Console) -> None:
    """Print the table."""
    head, *body = table
    grid = Table(head[0], box=None)
    for column in head[1:]:
        grid.add_column(column, justify="right", no_wrap=True)
    for row in body:
        grid.add_row(*row)
    wide = console if console.is_terminal else Console(width=200)
    wide.print(grid, highlight=False)
    console.print(note, highlight=False, soft_wrap=True, markup=False)


def run(args: argparse.Namespace, console: Console) -> list[str]:
    """Do what the command line says; returns the checks that failed."""
    import torch

    setup = load_setup()
    toolkit = torch.version.cuda and setup.find_cuda_toolkit(torch)
    if not toolkit:
        found = f"no nvcc; torch's CUDA is {torch.version.cuda}; CUDA_HOME names the toolkit"
        if not args.optional:
            raise ResourceError(found)
        console.print(f"skipped: CUDA kernels not built ({found})", highlight=False, soft_wrap=True)
        return []
    library, architectures, said = make(args, setup, toolkit, console)
    if args.build_only:
        return []
    compiled = parse_ptxas(said)
    constants = read_constants({kernel for kernel, _ in compiled}, architectures, args.folder)
    cuobjdump = find_cuobjdump(toolkit)
    code = {number: disassemble(cuobjdump, library, number) for number in architectures}
    entries, failures = collect(compiled, constants, code)
    failures += [text for entry in entries for text in entry.failures()]
    idle = sorted({c.title for c in constants.values()} - {e.constants.title for e in entries})
    version = subprocess.run([setup.nvcc_of(toolkit), "--version"], capture_output=True, text=True)
    release = re.search(r"V([\d.]+)", version.stdout)
    verdict = f"**Failed checks**: {'; '.join(failures)}." if failures else "No spills, no stack."
    note = f"{NOTE} {verdict}"
    note += f" Never launched on these GPUs: {', '.join(idle)}." if idle else ""
    note += f" Compiler: nvcc {release[1] if release else 'of unknown version'}."
    table = rows(entries, architectures)
    show(table, note, console)
    if args.write:
        write_between_markers(args.write, markdown(table, note))
    return failures


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        failures = run(args, Console())
    except ResourceError as error:
        sys.exit(f"cuda_resources.py: error: {error}")
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
