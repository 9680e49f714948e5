"""Says clearly which OpenMMLab package is missing or too old.

las_mm works with OpenMMLab's own distributions and with the maintained ``onedl-*`` builds: both
install the same import names, so only import names and versions are looked at here.
"""

from __future__ import annotations

import importlib
import re

# The oldest releases of OpenMMLab's own packages that las_mm is written against.
MINIMUM = {"mmengine": (0, 10), "mmcv": (2, 0), "mmdet": (3, 0), "mmpretrain": (1, 0)}


class MissingDependencyError(RuntimeError):
    """An OpenMMLab package that las_mm needs is absent or too old.

    Deliberately no ``ImportError``: mmengine's registry swallows those while it looks for
    ``las_mm.registry`` and would report "LASResNet is not registered" instead of the cause.
    """


def _version_tuple(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def require(name: str, purpose: str) -> None:
    """Check that an OpenMMLab package is importable and recent enough.

    Args:
        name: Import name, one of :data:`MINIMUM`.
        purpose: What needs it, as it should stand in the message.

    Raises:
        MissingDependencyError: The package is absent, too old, or fails to import; the message
            names it and the command that installs it.
    """
    minimum = MINIMUM[name]
    wanted = ".".join(map(str, minimum))
    try:
        module = importlib.import_module(name)
    except (ImportError, AssertionError) as error:  # mm packages assert each other's versions
        raise MissingDependencyError(
            f"{purpose} needs {name}>={wanted}, which cannot be imported ({error}); install it "
            f"with `pip install '{name}>={wanted}'` or its maintained build "
            f"(requirements/mm.txt lists the tested pins)."
        ) from error
    if _version_tuple(module.__version__) < minimum:
        raise MissingDependencyError(
            f"{purpose} needs {name}>={wanted}, found {module.__version__}; upgrade it with "
            f"`pip install -U '{name}>={wanted}'`."
        )
