"""Checks before any work starts: what can be wrong is said in one sentence.

Training and testing call these; each raises :class:`UserError` with a message that names the wrong
value and the way out.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.runner import CheckpointLoader
from torch import nn

from las_mm.checkpoints import check_checkpoint as check_checkpoint
from las_mm.checkpoints import is_remote
from las_mm.checkpoints import load_checkpoint as load_checkpoint
from las_mm.checkpoints import state_dict as state_dict
from las_mm.configs import build_model as build_model
from las_mm.configs import hook_name as hook_name
from las_mm.configs import load_config as load_config
from las_mm.configs import reset_scope as reset_scope
from las_mm.datasets import check_classes as check_classes
from las_mm.datasets import check_data as check_data
from las_mm.errors import UserError, last_line
from las_mm.registry import HOOKS

# Seconds after which unreachable weights are given up.
DOWNLOAD_TIMEOUT = 30.0


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


def check_hooks(cfg: Config, model: nn.Module) -> None:
    """Our hooks accept their arguments and the model has the backbone they need.

    Raises:
        UserError: One of them does not.
    """
    from las_mm.hooks import BudgetHook

    for hook in cfg.get("custom_hooks") or []:
        name = hook_name(hook)
        if not name.startswith("las_mm."):
            continue
        try:
            built = HOOKS.build(dict(hook))
            if isinstance(built, BudgetHook):
                built.attach(model)
                built.remove()
            elif hasattr(built, "check"):
                built.check(model)
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise UserError(f"custom_hooks of the config, {name}: {last_line(error)}") from error


def check_pretrained(cfg: Config, model: nn.Module) -> None:
    """The backbone's initial weights can be fetched and read, and are of its architecture.

    Maskers may be missing (static weights have none), a classifier may be there in addition.

    Raises:
        UserError: They cannot or are not; the message names LAS_MM_PRETRAINED and ``none``.
    """
    from las_mm.models.initialization import split
    from las_mm.models.maskers import is_masker

    way_out = "set LAS_MM_PRETRAINED to a checkpoint file or URL, or to none to start from scratch"
    static = cfg.model.get("static_checkpoint")
    if static is not None:
        try:
            with _download_timeout():
                model.static_weights()
        except Exception as error:  # network, file, zip, pickle: the reason is in the message
            raise UserError(
                f"static weights {static} cannot be used ({last_line(error)}); {way_out}"
            ) from error
    for part, entry in split(cfg.model.get("backbone", {}).get("init_cfg"))[1]:
        if part:
            continue
        source = entry["checkpoint"]
        try:
            with _download_timeout():
                if is_remote(source):
                    checkpoint = CheckpointLoader.load_checkpoint(source, map_location="cpu")
                else:
                    checkpoint = load_checkpoint(source)
            weights = state_dict(checkpoint, source)
        except Exception as error:  # network, file, zip, pickle: the reason is in the message
            raise UserError(
                f"initial weights {source} cannot be loaded ({last_line(error)}); {way_out}"
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
