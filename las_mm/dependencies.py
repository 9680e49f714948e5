"""Says clearly which package is missing, too old or at odds with another one.

las_mm works with OpenMMLab's own distributions and with the maintained ``onedl-*`` builds: both
install the same import names, so only import names and versions are looked at here.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import ModuleType

# The oldest releases that las_mm is written against.
MINIMUM = {
    "torch": (2, 1),
    "mmengine": (0, 10),
    "mmcv": (2, 0),
    "mmdet": (3, 0),
    "mmpretrain": (1, 0),
}
WORKING = (
    "torch 2.1.2 with mmengine 0.10.7, mmcv 2.1.0, mmdet 3.3.0 and mmpretrain 1.2.0 works, README "
    "('Supported versions') lists more"
)


class MissingDependencyError(RuntimeError):
    """A package that las_mm needs is absent, too old, or refuses another one.

    Deliberately no ``ImportError``: mmengine's registry swallows those while it looks for
    ``las_mm.registry`` and would report "LASResNet is not registered" instead of the cause.
    """


def _version_tuple(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _version(name: str) -> str | None:
    """The version of an installed package, read without importing it."""
    spec = importlib.util.find_spec(name)
    file = spec and spec.origin and Path(spec.origin).with_name("version.py")
    if not file or not file.is_file():
        return None
    text = file.read_text(encoding="utf-8")
    found = re.search(r"""^__version__ = (version\()?['"](.+?)['"]""", text, re.MULTILINE)
    if not found:
        return None
    return metadata.version(found[2]) if found[1] else found[2]  # onedl's ask for their own


def _found() -> str:
    versions = {name: _version(name) for name in MINIMUM}
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def check_together() -> None:
    """Check that torch is recent enough and that what is installed accepts one another.

    Raises:
        MissingDependencyError: Otherwise; one sentence with the versions found and ones that work.
    """
    torch = _version("torch")
    if torch is None or _version_tuple(torch) < MINIMUM["torch"]:
        wanted = ".".join(map(str, MINIMUM["torch"]))
        raise MissingDependencyError(f"las_mm needs torch>={wanted}; found {_found()}; {WORKING}.")
    for name in ("mmcv", "mmdet"):  # mmpretrain, which takes seconds, when las_mm.models needs it
        if importlib.util.find_spec(name) is not None:
            with suppress(ImportError):  # require() tells, when something needs it
                _import(name)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except AssertionError as error:  # OpenMMLab's packages assert each other's versions
        reason = " ".join(str(error).split()).rstrip(".")
        raise MissingDependencyError(
            f"{name} refuses another package ({reason}); found {_found()}; {WORKING}."
        ) from error


def require(name: str, purpose: str) -> None:
    """Check that an OpenMMLab package is importable and recent enough.

    Args:
        name: Import name, one of :data:`MINIMUM`.
        purpose: What needs it, as it should stand in the message.

    Raises:
        MissingDependencyError: The package is absent, too old, fails to import or refuses another
            one; the message names it and the way out.
    """
    minimum = MINIMUM[name]
    wanted = ".".join(map(str, minimum))
    try:
        module = _import(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"{purpose} needs {name}>={wanted}, which cannot be imported ({error}); install it "
            f"with `pip install '{name}>={wanted}'` or its maintained build "
            f"(requirements/stacks lists what was tested together)."
        ) from error
    if _version_tuple(module.__version__) < minimum:
        raise MissingDependencyError(
            f"{purpose} needs {name}>={wanted}, found {module.__version__}; upgrade it with "
            f"`pip install -U '{name}>={wanted}'`."
        )


def require_mmpretrain_models(purpose: str) -> None:
    """Check that ``mmpretrain.models`` can be imported, which transformers may prevent.

    With pycocotools and transformers installed mmpretrain imports its multimodal models, whatever
    is asked of it; written for transformers 4, they raise a TypeError with version 5.

    Args:
        purpose: What needs it, as it should stand in the message.

    Raises:
        MissingDependencyError: It cannot; the message names transformers where that is installed.
    """
    try:
        require("mmpretrain", purpose)
        importlib.import_module("mmpretrain.models")
    except MissingDependencyError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        beside = ""
        with suppress(metadata.PackageNotFoundError):
            beside = (
                f" beside transformers {metadata.version('transformers')}, which it then imports "
                "(`pip install 'transformers<5'` helps where that is why)"
            )
        raise MissingDependencyError(
            f"{purpose} needs mmpretrain.models, which cannot be imported{beside}: {reason}; found "
            f"{_found()}; {WORKING}."
        ) from error
