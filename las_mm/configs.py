"""Configs read and built, with what is wrong in them said in one sentence."""

from __future__ import annotations

import os.path as osp

from mmengine.config import Config
from mmengine.registry import DefaultScope, init_default_scope
from torch import nn

from las_mm.dependencies import MissingDependencyError
from las_mm.errors import UserError, last_line
from las_mm.registry import MODELS


def load_config(path: str, options: dict | None = None) -> Config:
    """Read a config file and apply ``--cfg-options``.

    Raises:
        UserError: The file is missing or cannot be parsed, or an option does not fit it.
    """
    if not osp.isfile(path):
        what = "is a folder; name a file in it" if osp.isdir(path) else "does not exist"
        raise UserError(f"config file {path} {what}")
    try:
        cfg = Config.fromfile(path)
    except Exception as error:  # a config is a program: anything may come out of it
        raise UserError(
            f"config {path} cannot be read: {type(error).__name__}: {last_line(error)}"
        ) from error
    try:
        cfg.merge_from_dict(options or {})
    except (KeyError, IndexError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"--cfg-options do not fit {path}: {last_line(error)}") from error
    return cfg


def build_model(cfg: Config) -> nn.Module:
    """Build the config's model, without loading weights; its scope becomes the default one.

    Raises:
        UserError: A wrong mode, granularity, depth, ...; the message is the model's own.
    """
    init_default_scope(cfg.get("default_scope") or "mmengine")
    return build(cfg.model, "model")


def build(config: dict, what: str) -> nn.Module:
    """Build what stands in a config under the name ``what``.

    Raises:
        UserError: See :func:`build_model`.
    """
    try:
        return MODELS.build(config)
    except (ValueError, KeyError, TypeError, AssertionError, MissingDependencyError) as error:
        # The registry wraps errors in "class `X` in file: ...": the innermost message is the one.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(f"the config's {what} cannot be built: {last_line(cause)}") from error


def usual_size(cfg: Config) -> tuple[int, int]:
    """(H, W) of an image: COCO's usual one, ImageNet's for the configs of mmpretrain."""
    return (224, 224) if cfg.get("default_scope") == "mmpretrain" else (800, 1344)


def hook_name(hook: dict) -> str:
    """The registered name of a hook's config, whose type may be given as a class.

    Raises:
        UserError: It has no type.
    """
    kind = hook.get("type") if isinstance(hook, dict) else None
    if kind is None:
        raise UserError(f"custom_hooks of the config: {hook!r} needs type='las_mm....'")
    if isinstance(kind, str):
        return kind
    return f"{kind.__module__.split('.')[0]}.{kind.__name__}"


def reset_scope() -> None:
    """Forget the default scope of :func:`build_model`, so that a runner sets its own."""
    DefaultScope._instance_dict.clear()
