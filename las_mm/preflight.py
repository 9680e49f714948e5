"""Checks before any work starts: what can be wrong is said in one sentence.

The tools call these; each raises :class:`UserError` with a message that names the wrong value and
the way out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import os.path as osp
import pickle
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope, init_default_scope
from mmengine.runner import CheckpointLoader
from torch import nn

from las_mm import compat
from las_mm.dependencies import MissingDependencyError
from las_mm.registry import HOOKS, MODELS

# Seconds after which unreachable weights are given up.
DOWNLOAD_TIMEOUT = 30.0


class UserError(Exception):
    """Something the user can mend; its message is one sentence for a terminal."""


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line."""

    def error(self, message: str) -> None:
        sys.exit(f"{self.prog}: error: {message}")


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


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
            f"config {path} cannot be read: {type(error).__name__}: {_last_line(error)}"
        ) from error
    try:
        cfg.merge_from_dict(options or {})
    except (KeyError, IndexError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"--cfg-options do not fit {path}: {_last_line(error)}") from error
    return cfg


def _datasets(cfg: ConfigDict) -> Iterator[ConfigDict]:
    """All dataset configs below a dataset config, wrappers opened."""
    if "dataset" in cfg:
        yield from _datasets(cfg.dataset)
    elif "datasets" in cfg:
        for child in cfg.datasets:
            yield from _datasets(child)
    else:
        yield cfg


def _is_remote(path: str) -> bool:
    return "://" in path


def check_data(cfg: Config, loaders: tuple[str, ...]) -> None:
    """Every annotation file and image folder of these dataloaders exists.

    Args:
        cfg: The whole config.
        loaders: E.g. ``('train_dataloader', 'val_dataloader')``; absent ones are skipped.

    Raises:
        UserError: A path is missing.
    """
    for loader in loaders:
        if cfg.get(loader) is None:
            continue
        for dataset in _datasets(cfg[loader].dataset):
            root = dataset.get("data_root") or ""
            paths = [dataset.get("ann_file") or ""]
            prefix = dataset.get("data_prefix") or {}
            paths += list(prefix.values()) if isinstance(prefix, dict) else [prefix]
            for path in filter(None, paths):
                full = path if osp.isabs(path) or _is_remote(path) else osp.join(root, path)
                if not _is_remote(full) and not osp.exists(full):
                    raise UserError(
                        f"{full} does not exist ({loader}, data_root {root!r}); the COCO configs "
                        f"take data_root from LAS_MM_COCO, and `python tools/make_demo_coco.py` "
                        f"renders a small data set to try"
                    )


def check_visualizer(cfg: Config) -> None:
    """TensorBoard is installed where the config writes to it.

    Raises:
        UserError: It is not.
    """
    backends = (cfg.get("visualizer") or {}).get("vis_backends") or []
    names = {backend.get("type") for backend in backends}
    if "TensorboardVisBackend" in names and importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "the config logs to TensorBoard, which is not installed: `pip install tensorboard`, "
            "or set vis_backends to [dict(type='LocalVisBackend')]"
        )


def build_model(cfg: Config) -> nn.Module:
    """Build the config's model, without loading weights.

    Raises:
        UserError: A wrong mode, granularity, depth, ...; the message is the model's own.
    """
    init_default_scope(cfg.get("default_scope") or "mmengine")
    # The registry wraps errors in "class `X` in file: ...": the innermost message is the one.
    try:
        return MODELS.build(cfg.model)
    except (ValueError, KeyError, TypeError, AssertionError, MissingDependencyError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(f"the config's model cannot be built: {_last_line(cause)}") from error


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


def check_hooks(cfg: Config, model: nn.Module) -> None:
    """Our hooks accept their arguments and the model has the backbone they need.

    Raises:
        UserError: One of them does not.
    """
    from las_mm.hooks import BudgetHook, IterationSeedHook
    from las_mm.models.activation import find_dynamic_backbone

    for hook in cfg.get("custom_hooks") or []:
        name = hook_name(hook)
        if not name.startswith("las_mm."):
            continue
        try:
            built = HOOKS.build(dict(hook))
            if isinstance(built, BudgetHook):
                built.attach(model)
                built.remove()
            elif not isinstance(built, IterationSeedHook):
                find_dynamic_backbone(model)
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise UserError(f"custom_hooks of the config, {name}: {_last_line(error)}") from error


def check_pretrained(cfg: Config, model: nn.Module) -> None:
    """The backbone's initial weights can be fetched and read, and are of its architecture.

    Maskers may be missing (static weights have none), a classifier may be there in addition.

    Raises:
        UserError: They cannot or are not; the message names LAS_MM_PRETRAINED and ``none``.
    """
    from las_mm.models.maskers import is_masker

    way_out = "set LAS_MM_PRETRAINED to a checkpoint file or URL, or to none to start from scratch"
    static = cfg.model.get("static_checkpoint")
    if static is not None:
        try:
            with _download_timeout():
                model.static_weights()
        except Exception as error:  # network, file, zip, pickle: the reason is in the message
            raise UserError(
                f"static weights {static} cannot be used ({_last_line(error)}); {way_out}"
            ) from error
    init_cfg = cfg.model.get("backbone", {}).get("init_cfg")
    for entry in init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]:
        if not isinstance(entry, dict) or entry.get("type") != "Pretrained":
            continue
        source = entry["checkpoint"]
        try:
            with _download_timeout():
                if _is_remote(source):
                    checkpoint = CheckpointLoader.load_checkpoint(source, map_location="cpu")
                else:
                    checkpoint = load_checkpoint(source)
            weights = state_dict(checkpoint, source)
        except Exception as error:  # network, file, zip, pickle: the reason is in the message
            raise UserError(
                f"initial weights {source} cannot be loaded ({_last_line(error)}); {way_out}"
            ) from error
        _check_position(checkpoint, model.backbone, source)
        prefix = entry.get("prefix") or ""
        prefix = prefix if not prefix or prefix.endswith(".") else prefix + "."
        own = {
            key: value
            for key, value in model.backbone.state_dict().items()
            if not is_masker(key) and not key.endswith("num_batches_tracked")
        }
        missing = [key for key in own if prefix + key not in weights]
        shapes = [
            key
            for key in own
            if key not in missing and own[key].shape != weights[prefix + key].shape
        ]
        if missing or shapes:
            hint = ""
            if not prefix and all("backbone." + key in weights for key in own):
                hint = "; its backbone's are there with LAS_MM_PRETRAINED_PREFIX=backbone. or "
                hint += "--cfg-options model.backbone.init_cfg.prefix=backbone."
            raise UserError(
                f"initial weights {source} are of another architecture: of {len(own)} weights of "
                f"the backbone {len(missing)} are missing and {len(shapes)} have another shape, "
                f"e.g. {(missing + shapes)[0]}{hint}; {way_out}"
            )


def _check_position(checkpoint: dict, backbone: nn.Module, source: str) -> None:
    """Channel masks sit where they did when the weights were trained, which no key tells.

    Raises:
        UserError: A converted checkpoint says that they sit elsewhere.
    """
    meta = checkpoint.get("meta")
    trained = meta.get("backbone") if isinstance(meta, dict) else None
    position = trained.get("channel_position") if isinstance(trained, dict) else None
    if not isinstance(position, str):
        return
    blocks = getattr(backbone, "blocks", list)()
    own = {block.channel_position for block in blocks if block.mode in ("channel", "both")}
    if own - {position}:
        raise UserError(
            f"initial weights {source} were trained with channel_position {position!r}, the config "
            f"has {sorted(own - {position})[0]!r}: add --cfg-options "
            f"model.backbone.channel_position={position}"
        )


@contextlib.contextmanager
def _download_timeout() -> Iterator[None]:
    """Unreachable weights are given up after :data:`DOWNLOAD_TIMEOUT` seconds."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(timeout)


def state_dict(checkpoint: object, source: str) -> dict[str, torch.Tensor]:
    """The weights inside a checkpoint, without a DDP prefix.

    Raises:
        UserError: It holds none.
    """
    weights = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not any(torch.is_tensor(v) for v in weights.values()):
        raise UserError(f"{source} is no checkpoint: it holds no state_dict of tensors")
    return {
        key[len("module.") :] if key.startswith("module.") else key: value
        for key, value in weights.items()
    }


def load_checkpoint(path: str, trust: bool = False) -> dict:
    """Read a local checkpoint as data, not as a program.

    Args:
        path: The file.
        trust: Also accept arbitrary pickled objects.

    Raises:
        UserError: The file is missing, damaged or needs trust.
    """
    if not osp.isfile(path):
        problem = "is a folder; name the file in it" if osp.isdir(path) else "does not exist"
        raise UserError(f"checkpoint {path} {problem}")
    with open(path, "rb") as file:
        if not file.read(2).startswith((b"PK", b"\x80")):  # a zip file, or torch's old pickles
            raise UserError(f"checkpoint {path} is damaged: it is no file that torch.save writes")
    try:
        if trust:
            return torch.load(path, map_location="cpu", weights_only=False)
        return compat.load_weights(path, _safe_globals())
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise UserError(
                f"checkpoint {path} holds objects other than weights; if you trust its origin, "
                f"add --trust-checkpoint"
            ) from error
        raise UserError(f"checkpoint {path} is damaged: {_last_line(error)}") from error
    except Exception as error:  # damaged bytes may raise anything, depending on where they are
        raise UserError(f"checkpoint {path} is damaged: {_last_line(error)}") from error


def _safe_globals() -> list:
    """What a checkpoint written by mmengine holds besides tensors: its log history."""
    import numpy as np
    from mmengine.logging import HistoryBuffer

    # numpy's own names for these two differ between its versions.
    reconstruct, scalar = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "uint32")]
    return [
        HistoryBuffer,
        reconstruct,
        scalar,
        np.ndarray,
        np.dtype,
        slice,
        getattr,
        *dtypes,
    ]


def check_checkpoint(model: nn.Module, path: str, trust: bool = False, strict: bool = True) -> dict:
    """The checkpoint belongs to this model.

    Args:
        model: The built model.
        path: A local file; URLs are left to mmengine.
        trust: See :func:`load_checkpoint`.
        strict: Every weight of the model must be there; otherwise (initial weights) at least one.

    Returns:
        The checkpoint; empty for a URL.

    Raises:
        UserError: Keys are missing or shapes differ; the message counts them and names one.
    """
    if _is_remote(path):
        return {}
    checkpoint = load_checkpoint(path, trust)
    weights = state_dict(checkpoint, path)
    own = model.state_dict()
    missing = [key for key in own if key not in weights]
    shapes = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    if shapes:
        key = shapes[0]
        raise UserError(
            f"checkpoint {path} is of another architecture: {len(shapes)} of {len(own)} weights "
            f"have another shape, e.g. {key} {tuple(weights[key].shape)} instead of "
            f"{tuple(own[key].shape)}; use the config it was trained with"
        )
    if len(missing) == len(own) or (strict and missing):
        raise UserError(
            f"checkpoint {path} is of another architecture: {len(missing)} of {len(own)} weights "
            f"are missing, e.g. {missing[0]}; use the config it was trained with"
        )
    return checkpoint


def check_resume(cfg: Config, model: nn.Module, trust: bool = False) -> bool:
    """The checkpoint that training continues or starts from is readable and fits the model.

    Returns:
        Whether training continues from one, which then replaces all weights.

    Raises:
        UserError: It does not.
    """
    path = cfg.get("load_from")
    if cfg.get("resume") and path is None:
        marker = Path(cfg.work_dir) / "last_checkpoint"
        path = marker.read_text().strip() if marker.is_file() else None
    resume = bool(cfg.get("resume")) and path is not None
    if path is not None:
        checkpoint = check_checkpoint(model, path, trust, strict=resume)
        state = {"meta", "message_hub", "optimizer"}
        if resume and checkpoint and not state <= checkpoint.keys():
            raise UserError(
                f"checkpoint {path} holds no training state to resume; to start a new training "
                f"from its weights, use --cfg-options load_from={path}"
            )
    return resume


def prepare_device(cfg: Config) -> None:
    """Make distributed training work without a GPU: gloo, and DDP without device ids.

    Raises:
        UserError: AMP was asked for on a machine without an accelerator.
    """
    if torch.cuda.is_available():
        return
    if cfg.get("optim_wrapper", {}).get("type") == "AmpOptimWrapper":
        raise UserError("--amp needs a GPU, and none is available; leave it out on a CPU")
    if cfg.get("launcher", "none") == "pytorch" and "RANK" in os.environ:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        cfg.model_wrapper_cfg = dict(
            type="MMDistributedDataParallel",
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=cfg.get("find_unused_parameters", False),
        )


def reset_scope() -> None:
    """Forget the default scope of a preflight build, so that the runner sets its own."""
    DefaultScope._instance_dict.clear()
