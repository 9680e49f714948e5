"""The network of a benchmark: the config's model, its weights, and the static forms of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from las_mm.benchmark.contest import check_finite, relative_error
from las_mm.checkpoints import load_weights
from las_mm.configs import build_model, load_config
from las_mm.errors import UserError
from las_mm.models.finding import find_dynamic_backbones
from las_mm.models.maskers import is_masker
from las_mm.registry import MODELS

# Of maps and weights in torch; against quantised rivals las_mm, which has no int8 kernels, runs in
# float32.
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.float32,
}
FOLDING_TOLERANCE = 1e-4


def backbone_configs(node: object) -> list[ConfigDict]:
    """The configs of all dynamic backbones inside a model's config."""
    if isinstance(node, (list, tuple)):
        return [found for child in node for found in backbone_configs(child)]
    if not isinstance(node, dict):
        return []
    kind = node.get("type")
    kind = MODELS.get(kind) if isinstance(kind, str) else kind
    found = [node] if callable(getattr(kind, "network_activation", None)) else []
    return found + [found for child in node.values() for found in backbone_configs(child)]


@dataclass
class Candidate:
    """The config's model, ready to be compared."""

    cfg: Config
    backbone_cfg: ConfigDict
    model: nn.Module
    path: str
    backbone: nn.Module


def load_candidate(
    config: str,
    options: dict | None = None,
    checkpoint: str | None = None,
    mode: str | None = None,
    granularity: Sequence[int] | None = None,
    trust: bool = False,
    seed: int = 0,
) -> Candidate:
    """Build a config's model with the wanted mode and granularity; load or make up its weights.

    Args:
        config: Path of the config.
        options: ``--cfg-options``.
        checkpoint: A local file; without, the backbone's weights are random.
        mode: Of all stages, instead of the config's.
        granularity: One per stage, instead of the config's.
        trust: See :func:`las_mm.checkpoints.load_checkpoint`.
        seed: Of random weights.

    Raises:
        UserError: It cannot be built, has no dynamic backbone, or the checkpoint does not fit.
    """
    cfg = load_config(config, options)
    if "model" not in cfg:
        raise UserError(f"{config} has no model: name the config of a detector or classifier")
    init_default_scope(cfg.get("default_scope") or "mmengine")
    found = backbone_configs(cfg.model)
    if len(found) != 1:
        raise UserError(
            f"the model of {config} must contain one dynamic backbone, found {len(found)}; "
            f"set model.backbone.type='las_mm.LASResNet'"
        )
    (backbone_cfg,) = found
    backbone_cfg.init_cfg = None  # nothing is downloaded
    if mode is not None:
        backbone_cfg.mode = mode
    if granularity is not None:
        backbone_cfg.granularity = tuple(granularity)
    model = revert_sync_batchnorm(build_model(cfg)).eval()
    ((path, backbone),) = find_dynamic_backbones(model)
    if not backbone.maskers():
        raise UserError(f"the backbone of {config} is static: use --mode spatial or layer")
    if checkpoint is None:
        randomize(backbone, seed)
    else:
        load_weights(model, checkpoint, trust)
    return Candidate(cfg, backbone_cfg, model, path, backbone)


@dataclass
class Subject:
    """The network of a benchmark in all its forms, and its input.

    Attributes:
        dynamic: The dynamic backbone, in ``dtype`` on ``device``.
        static: The same weights as a static network of the same class, in ``dtype`` on ``device``.
        twin: The same weights as mmpretrain's network with folded norms, float32 on the CPU.
        expected: The outputs of ``twin``.
        x: The input, float32 on the CPU, (N, 3, H, W).
        dtype: A key of :data:`DTYPES`.
        threads: Threads that every engine uses.
        work_dir: An existing folder for files of the engines.
        device: Where the engines run, ``'cpu'`` or ``'cuda'``.
    """

    dynamic: nn.Module
    static: nn.Module
    twin: nn.Module
    expected: list[Tensor]
    x: Tensor
    dtype: str
    threads: int
    work_dir: Path
    device: str = "cpu"

    @property
    def cast_x(self) -> Tensor:
        """The input in the benchmark's dtype, on its device."""
        return self.x.to(self.device, DTYPES[self.dtype])


def randomize(backbone: nn.Module, seed: int = 0) -> None:
    """Weights whose activations neither vanish nor explode, with norms that do something.

    mmpretrain starts the last norm of each block at zero, with which masks would not matter.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for name, module in backbone.named_modules():
            if is_masker(name):
                continue
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                residual = name.endswith("3")  # the sum over many blocks must stay bounded
                module.weight.uniform_(*((0.2, 0.4) if residual else (0.8, 1.2)))
                module.bias.normal_(std=0.1)
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.8, 1.2)


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """Fold each batch norm into the convolution registered right before it, in place.

    An activation registered between them is one that a block shares, as in a dense layer, whose
    second norm follows its first convolution; not so in a sequence.

    Args:
        model: In eval mode.

    Returns:
        The same model, the norms replaced by ``nn.Identity``.
    """
    for module in [m for m in model.modules() if not isinstance(m, nn.Conv2d)]:
        last: tuple[str, nn.Conv2d] | None = None
        for name, child in list(module.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm) and last is not None:
                setattr(module, last[0], fuse_conv_bn_eval(last[1], child))
                setattr(module, name, nn.Identity())
            if isinstance(child, nn.Conv2d):
                last = (name, child)
            elif isinstance(module, nn.Sequential) or not isinstance(child, nn.ReLU):
                last = None
    return model


def make_subject(
    dynamic: nn.Module,
    config: ConfigDict,
    x: Tensor,
    dtype: str,
    threads: int,
    work_dir: Path,
    device: str = "cpu",
) -> Subject:
    """Build the static forms of a dynamic backbone from its own weights.

    Args:
        dynamic: The backbone, on the CPU; it is moved to ``device`` and ``dtype``.
        config: What it was built from.
        x, dtype, threads, work_dir, device: See :class:`Subject`.

    Raises:
        UserError: Folding the norms changes the outputs, or they are not finite.
    """
    from las_mm.benchmark.twins import plain_twin

    weights = {k: v for k, v in dynamic.state_dict().items() if not is_masker(k)}
    static = MODELS.build({**config, "mode": "static", "init_cfg": None})
    twin = plain_twin(dynamic, config)
    for model in (static, twin):
        model.load_state_dict(weights)
        model.eval()
        model.requires_grad_(False)
    dynamic.eval()
    dynamic.requires_grad_(False)
    with torch.no_grad():  # no inference mode: engines must be able to export the folded weights
        unfolded = twin(x)
        check_finite(unfolded, "the static network")
        expected = list(fold_batchnorm(twin)(x))
    error = relative_error(expected, unfolded)
    if not error <= FOLDING_TOLERANCE:
        raise UserError(
            f"folding the norms of {type(dynamic).__name__} changes its outputs: relative error "
            f"{error:.3g}, allowed are {FOLDING_TOLERANCE:g}"
        )
    dynamic.to(device, DTYPES[dtype])
    static.to(device, DTYPES[dtype])
    return Subject(dynamic, static, twin, expected, x, dtype, threads, work_dir, device)
