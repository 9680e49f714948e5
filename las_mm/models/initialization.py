"""Which initial weights mmengine's ``init_cfg`` loads, and which it draws."""

from __future__ import annotations

from mmengine.model import PretrainedInit
from mmengine.registry import WEIGHT_INITIALIZERS


def loads_weights(config: object) -> bool:
    """Whether one entry of an ``init_cfg`` loads a checkpoint into the module.

    Its type may be ``'Pretrained'``, with a registry's scope before it, or the class.
    """
    kind = config.get("type") if isinstance(config, dict) else None
    if isinstance(kind, str):
        kind = WEIGHT_INITIALIZERS.get(kind)
    return isinstance(kind, type) and issubclass(kind, PretrainedInit)


def entries(init_cfg: dict | list | None) -> list:
    """The entries of an ``init_cfg`` or ``override``, which may be one, a list or ``None``."""
    if not init_cfg:
        return []
    return list(init_cfg) if isinstance(init_cfg, (list, tuple)) else [init_cfg]


def split(init_cfg: dict | list | None) -> tuple[list[dict], list[tuple[str, dict]]]:
    """Take what loads checkpoints out of an ``init_cfg``.

    Returns:
        What is left, and pairs of the part's name ('' for the module itself) and the entry that
        loads it.
    """
    drawn: list[dict] = []
    loaded: list[tuple[str, dict]] = []
    for entry in entries(init_cfg):
        if loads_weights(entry):
            loaded.append(("", entry))
            continue
        own = []
        for part in entries(entry.get("override")):
            if loads_weights(part):
                part = dict(part)
                loaded.append((part.pop("name"), part))
            else:
                own.append(part)
        entry = {key: value for key, value in entry.items() if key != "override"}
        drawn.append({**entry, "override": own} if own else entry)
    return drawn, loaded
