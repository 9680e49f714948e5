"""Builds las_mm and its one native extension, ``las_mm._C`` (sources: ops/).

The extension is compiled against the torch that is already installed, hence
``pip install -e . --no-build-isolation``. Environment variables:

    LAS_MM_NO_NATIVE=1  pure Python; the reference implementations of the ops run
    FORCE_CUDA=1 / 0    with / without CUDA kernels; unset: with them where torch sees a GPU
    MAX_JOBS, CUDA_HOME, TORCH_CUDA_ARCH_LIST as in every torch extension; without a list and
                        without a GPU, CUDA kernels are built for CUDA_ARCHITECTURES below
"""

import os
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
DESCRIPTION = "Latency-aware spatially dynamic networks (LASNet, LAUDNet) for OpenMMLab projects"
CUDA_FOLDERS = ("/usr/local/cuda-{}", "/usr/local/cuda")  # {}: the version of torch's CUDA
PYTHONS = ("3.10", "3.11", "3.12")  # of requirements/stacks
UNITS = 3  # in which the native sources compile
CUDA_ARCHITECTURES = ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0")


def read_version():
    text = (ROOT / "las_mm" / "version.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"', text, re.MULTILINE).group(1)


def say(message):
    print(f"las_mm: {message}", file=sys.stderr, flush=True)


def find_cuda_toolkit(torch):
    """The toolkit's folder or None; nvcc on PATH may be a wrapper script far from its headers."""
    nvcc = shutil.which("nvcc")
    candidates = [
        os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"),
        nvcc and str(Path(nvcc).resolve().parents[1]),
        *(folder.format(torch.version.cuda) for folder in CUDA_FOLDERS),
    ]
    for home in filter(None, candidates):
        if (Path(home) / "include" / "cuda_runtime.h").is_file() and nvcc_of(home):
            return home
    return None


def nvcc_of(toolkit):
    """The path of a toolkit's compiler, or None."""
    return shutil.which("nvcc", path=str(Path(toolkit) / "bin"))


def default_architectures(toolkit):
    """Those of CUDA_ARCHITECTURES that the toolkit compiles, for TORCH_CUDA_ARCH_LIST."""
    listed = subprocess.run(
        [nvcc_of(toolkit), "--list-gpu-arch"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()
    known = [a for a in CUDA_ARCHITECTURES if f"compute_{a.replace('.', '')}" in listed]
    if not known:
        sys.exit(f"las_mm: {nvcc_of(toolkit)} compiles for none of {CUDA_ARCHITECTURES}.")
    return " ".join(known) + "+PTX"  # newer GPUs translate the last one's


def cuda_sources(torch):
    """The CUDA sources to build (none: CPU only) and the reason, to be told.

    CUDA_HOME and TORCH_CUDA_ARCH_LIST are set for torch.utils.cpp_extension where needed.
    """
    force = os.environ.get("FORCE_CUDA") or None
    if force not in (None, "0", "1"):
        sys.exit(f"las_mm: FORCE_CUDA must be 0, 1 or unset, got {force!r}.")
    if force == "0":
        return [], "FORCE_CUDA=0"
    toolkit = torch.version.cuda and find_cuda_toolkit(torch)
    if force == "1" and not toolkit:
        sys.exit(
            "las_mm: FORCE_CUDA=1 needs a torch built with CUDA "
            f"(found torch {torch.__version__}) and a CUDA toolkit with nvcc and headers "
            "(set CUDA_HOME to its folder)."
        )
    if force != "1" and not torch.cuda.is_available():
        return [], "torch sees no GPU; FORCE_CUDA=1 builds the CUDA kernels anyway"
    if not toolkit:
        return [], "there is a GPU, but no CUDA toolkit was found; CUDA_HOME names its folder"
    os.environ["CUDA_HOME"] = toolkit  # before torch.utils.cpp_extension guesses
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        if torch.cuda.is_available():
            return sorted(glob("ops/cuda/*.cu")), f"{toolkit}, for this machine's GPUs"
        os.environ["TORCH_CUDA_ARCH_LIST"] = default_architectures(toolkit)
    return sorted(glob("ops/cuda/*.cu")), f"{toolkit}, for {os.environ['TORCH_CUDA_ARCH_LIST']}"


def units(sources):
    """Files in build/ that include several of ``sources`` each, and the kernels as they are.

    Of the 25 s that a source takes alone, 18 are torch's headers. Anonymous namespaces of sources
    that share a unit are one, so names in them have to differ. The kernels include none of torch's
    headers, and compile for one instruction set each.
    """
    alone = [path for path in sources if Path(path).name.startswith("kernels")]
    others = [path for path in sources if path not in alone]
    folder = Path("build", "units")
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(UNITS):
        lines = (
            f'#include "{Path(path).relative_to("ops").as_posix()}"' for path in others[part::UNITS]
        )
        path, text = folder / f"part_{part}.cpp", "\n".join([*lines, ""])
        if not path.is_file() or path.read_text() != text:  # ninja compiles what is newer
            path.write_text(text)
        alone.append(path.as_posix())
    return alone


def native_extension():
    """Arguments of setup() that build las_mm._C."""
    if os.environ.get("LAS_MM_NO_NATIVE") == "1":
        say("LAS_MM_NO_NATIVE=1, building without the native extension.")
        return {}
    try:
        import torch
    except ImportError as error:
        sys.exit(
            f"las_mm: cannot import torch ({error}); install torch first, then "
            "`pip install -e . --no-build-isolation`."
        )
    cuda, reason = cuda_sources(torch)
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    openmp = ["-fopenmp"] if sys.platform == "linux" else []  # at::parallel_for is serial without
    common = sorted(glob("ops/common/*.cpp") + glob("ops/cpu/*.cpp"))
    optimize = ["/O2"] if sys.platform == "win32" else ["-O3", "-g0"]
    extension = (CUDAExtension if cuda else CppExtension)(
        name="las_mm._C",
        sources=[*units(["ops/library.cpp", *common]), *cuda],
        depends=sorted(glob("ops/*/*.h") + glob("ops/*/*.cuh") + ["ops/library.cpp", *common]),
        include_dirs=[str(ROOT / "ops")],
        extra_compile_args={"cxx": [*optimize, *openmp], "nvcc": ["-O3"]},
        extra_link_args=openmp,
    )
    if cuda:  # nvcc knows its headers; the other files compile, and are kept, as without CUDA
        headers = str(Path(os.environ["CUDA_HOME"]) / "include")
        extension.include_dirs = [path for path in extension.include_dirs if path != headers]
    backends = "CPU and CUDA" if cuda else "CPU only"
    say(f"building las_mm._C for {backends} ({reason}), torch {torch.__version__}.")
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


class BuildPy(build_py):
    """Puts configs and tools into the package where OpenMMLab's `mim` looks for them."""

    def run(self):
        super().run()
        if self.editable_mode:  # the checkout has them
            return
        mim = Path(self.build_lib) / "las_mm" / ".mim"
        shutil.rmtree(mim, ignore_errors=True)
        for folder in ("configs", "tools"):
            leave = shutil.ignore_patterns("__pycache__", "*.pyc")
            shutil.copytree(ROOT / folder, mim / folder, ignore=leave)
        shutil.copy2(ROOT / "model-index.yml", mim)


def main():
    readme = ROOT / "README.md"
    native = native_extension()
    commands = {"build_py": BuildPy, **native.pop("cmdclass", {})}
    setup(
        name="las_mm",
        version=read_version(),
        description=DESCRIPTION,
        long_description=readme.read_text(encoding="utf-8") if readme.is_file() else "",
        long_description_content_type="text/markdown",
        license="Apache-2.0",
        author="The las_mm authors",
        keywords="dynamic networks, efficient inference, OpenMMLab, LASNet, LAUDNet",
        python_requires=">=3.10",
        classifiers=[
            "Development Status :: 4 - Beta",
            "Intended Audience :: Developers",
            "Intended Audience :: Science/Research",
            "Operating System :: POSIX :: Linux",
            "Programming Language :: Python :: 3",
            *(f"Programming Language :: Python :: {version}" for version in PYTHONS),
            "Topic :: Scientific/Engineering :: Image Recognition",
        ],
        packages=find_packages(include=["las_mm", "las_mm.*"]),
        entry_points={"console_scripts": ["las_mm = las_mm.cli:main"]},
        package_data={"las_mm": ["latency/devices/*.yaml", "mask_page.html"]},
        # torch and OpenMMLab's packages exist in several builds under several names, so they are
        # the user's choice: requirements/stacks lists what was tested, las_mm checks the imports.
        install_requires=["filelock", "numpy", "PyYAML", "rich", "tensorboard"],
        extras_require={
            "benchmark": ["matplotlib", "onnx", "onnxruntime", "onnxscript", "openvino"],
            "calibrate": ["scikit-learn", "scipy"],
            "demo": ["matplotlib", "scikit-image"],
            "dev": [
                "hypothesis",
                "mypy",
                "pre-commit",
                "pytest",
                "pytest-xdist",
                "ruff",
                "types-PyYAML",
            ],
        },
        zip_safe=False,
        cmdclass=commands,
        **native,
    )


if __name__ == "__main__":  # also when pip runs this file; tests import it
    main()
