"""Builds las_mm's extension with its CUDA kernels aside and keeps what ``ptxas -v`` says."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from _cuda_kernels import ROOT, ResourceError, demangle


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("las_mm_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(folder: Path, environment: Mapping[str, str], console: Console) -> tuple[Path, str]:
    """Build the extension in ``folder``; returns it and what ``ptxas -v`` said about its sources.

    Objects lie where an installation has its own, so that those of the CPU are compiled only once.
    What the compiler prints is kept beside each object, for later runs that find it up to date.
    """
    temp = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    log_path = folder / "build.log"
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
        tail = "".join(log_path.read_text(encoding="utf-8").splitlines(keepends=True)[-40:])
        raise ResourceError(f"the build failed:\n{tail}(all of it: {log_path})")
    texts_of_all = (path.with_suffix(".ptxas").read_text(encoding="utf-8") for path in objects)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return folder / "lib" / "las_mm" / f"_C{suffix}", demangle("\n".join(texts_of_all))


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
