"""Masks and inputs of a benchmark: forced to an exact rate, or the model's own on real images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from mmengine.config import Config
from torch import Tensor, nn

from las_mm.errors import UserError
from las_mm.network.block import BlockShape
from las_mm.network.transformer import ATTENTION, HEAD, MLP, TOKEN, TransformerLayerShape

KINDS = ("blob", "random", "model")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")


def _keep_highest(scores: Tensor, rate: float) -> Tensor:
    """Per image keep exactly round(rate * count) positions, those with the highest scores.

    Args:
        scores: (N, 1, h, w).
        rate: Share to keep.

    Returns:
        bool, (N, 1, h, w).
    """
    flat = scores.flatten(1)
    kept = flat.argsort(dim=1, descending=True)[:, : round(rate * flat.shape[1])]
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, kept, True).view_as(scores)


def spatial_mask(
    batch: int, grid: tuple[int, int], rate: float, kind: str, generator: torch.Generator
) -> Tensor:
    """A patch mask of an exact rate, another one for each image.

    Args:
        batch: Number of images N.
        grid: (h, w) patches.
        rate: Share of kept patches; each image keeps round(rate * h * w) of them.
        kind: ``'blob'``: coherent regions some four patches wide, like objects. ``'random'``:
            patches drawn independently of their neighbours.
        generator: Source of the noise.

    Returns:
        bool, (N, 1, h, w).
    """
    if kind == "random":
        return _keep_highest(torch.rand(batch, 1, *grid, generator=generator), rate)
    coarse = torch.randn(batch, 1, grid[0] // 4 + 2, grid[1] // 4 + 2, generator=generator)
    smooth = F.interpolate(coarse, size=grid, mode="bicubic", align_corners=True)
    return _keep_highest(smooth, rate)


def layer_masks(batch: int, blocks: int, rate: float, generator: torch.Generator) -> Tensor:
    """Whole-block decisions: exactly round(rate * blocks * N) are on, spread evenly over blocks.

    Returns:
        bool, (blocks, N).
    """
    each, extra = divmod(round(rate * blocks * batch), blocks)
    counts = torch.full((blocks, 1), each)
    counts[torch.randperm(blocks, generator=generator)[:extra]] += 1
    order = torch.rand(blocks, batch, generator=generator).argsort(dim=1)
    return order < counts


def draw_masks(
    shapes: Sequence[BlockShape], batch: int, rate: float, kind: str, seed: int = 0
) -> list[Tensor | None]:
    """Masks for all blocks of a network, the same for the same seed.

    Args:
        shapes: Its blocks.
        batch: Number of images N.
        rate: Share that is computed.
        kind: ``'blob'`` or ``'random'``; layer blocks take no notice of it.
        seed: Of the masks.

    Returns:
        Per block a bool mask, (N, 1, h, w) or (N, 1, 1, 1), or ``None`` for one that computes all
        positions.
    """
    generator = torch.Generator().manual_seed(seed)
    n_layer = sum(shape.mode == "layer" for shape in shapes)
    decisions = iter(layer_masks(batch, n_layer, rate, generator) if n_layer else ())
    masks: list[Tensor | None] = []
    for shape in shapes:
        if not shape.decides_positions:
            masks.append(None)
        elif shape.mode == "layer":
            masks.append(next(decisions).view(batch, 1, 1, 1))
        else:
            grid = (-(-shape.h_out // shape.granularity), -(-shape.w_out // shape.granularity))
            masks.append(spatial_mask(batch, grid, rate, kind, generator))
    return masks


def draw_channel_masks(
    shapes: Sequence[BlockShape], batch: int, rate: float, seed: int = 0
) -> list[Tensor | None]:
    """Random channel masks for all blocks of a network, the same for the same seed.

    Args:
        shapes: Its blocks.
        batch: Number of images N; each has masks of its own.
        rate: Share of channel groups; each image keeps round(rate * groups) of them.
        seed: Of the masks.

    Returns:
        Per block a bool mask, (N, groups), or ``None`` for one that computes all channels.
    """
    generator = torch.Generator().manual_seed(seed)
    masks: list[Tensor | None] = []
    for shape in shapes:
        if not shape.has_channels:
            masks.append(None)
            continue
        scores = torch.rand(batch, 1, shape.channel_groups, 1, generator=generator)
        masks.append(_keep_highest(scores, rate)[:, 0, :, 0])
    return masks


def draw_token_masks(
    shapes: Sequence[BlockShape], batch: int, rate: float, kind: str, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Decisions for all blocks of a network, the same for the same seed.

    Args:
        shapes: Its blocks; those that are no transformer layers get none.
        batch: Number of images N; each has decisions of its own.
        rate: Share that is kept, of whatever a layer decides about: round(rate * count) of an
            image's tokens and of its heads; of the halves of all layers, spread evenly.
        kind: Of the masks of tokens, ``'blob'`` or ``'random'``.
        seed: Of the masks.

    Returns:
        Per block bool masks by axis: tokens (N, h * w), heads (N, heads), halves (N, 1).
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[dict[str, Tensor]] = []
    for shape in shapes:
        own: dict[str, Tensor] = {}
        if isinstance(shape, TransformerLayerShape):
            if TOKEN in shape.axes:
                grid = (shape.h_in, shape.w_in)
                own[TOKEN] = spatial_mask(batch, grid, rate, kind, generator).flatten(1)
            if HEAD in shape.axes:
                drawn = spatial_mask(batch, (shape.heads, 1), rate, "random", generator)
                own[HEAD] = drawn.flatten(1)
        found.append(own)
    for axis in (ATTENTION, MLP):
        having = [i for i, shape in enumerate(shapes) if axis in shape.axes]
        if having:
            drawn = layer_masks(batch, len(having), rate, generator)
            for i, mask in zip(having, drawn):
                found[i][axis] = mask[:, None]
    return found


def make_masks(
    backbone: nn.Module, input_shape: Sequence[int], rate: float, kind: str, seed: int = 0
) -> list[Tensor | None]:
    """:func:`draw_masks` for the blocks of a ``LASResNet`` and an input (N, 3, H, W)."""
    batch, _, *input_hw = input_shape
    return draw_masks(backbone.network_shape(tuple(input_hw)).blocks, batch, rate, kind, seed)


def make_channel_masks(
    backbone: nn.Module, input_shape: Sequence[int], rate: float, seed: int = 0
) -> list[Tensor | None]:
    """:func:`draw_channel_masks` for the blocks of a backbone and an input (N, 3, H, W)."""
    batch, _, *input_hw = input_shape
    return draw_channel_masks(backbone.network_shape(tuple(input_hw)).blocks, batch, rate, seed)


def make_offsets(
    masks: Sequence[Tensor | None], device: torch.device | str = "cpu"
) -> list[Tensor | None]:
    """What forces the maskers of :func:`set_offsets` to these decisions, on ``device``."""
    return [None if m is None else torch.where(m, torch.inf, -torch.inf).to(device) for m in masks]


def set_offsets(
    backbone: nn.Module,
    offsets: Sequence[Tensor | None],
    channel_offsets: Sequence[Tensor | None] = (),
) -> None:
    """Force these decisions; the maskers still compute (and cost) their logits.

    A CUDA graph that was captured meanwhile reads these very tensors: keep them as long.
    """
    for block, offset in zip(backbone.blocks(), offsets):
        if offset is not None:
            block.masker.offset = offset
    for block, offset in zip(backbone.blocks(), channel_offsets):
        if offset is not None:
            block.masker_channel.offset = offset


def set_token_offsets(backbone: nn.Module, masks: Sequence[dict[str, Tensor]]) -> None:
    """Force these decisions; the maskers still compute (and cost) their logits."""
    device = next(backbone.parameters()).device
    for block, own in zip(backbone.blocks(), masks):
        forced = {
            axis: torch.where(mask, torch.inf, -torch.inf).to(device) for axis, mask in own.items()
        }
        if TOKEN in forced:
            block.masker_token.offset = forced[TOKEN]
        if HEAD in forced:
            block.masker_head.offset = forced[HEAD]
        halves = [forced[axis] for axis in (ATTENTION, MLP) if axis in forced]
        if halves:
            block.masker_layer.offset = torch.cat(halves, dim=1)


def force_masks(
    backbone: nn.Module,
    input_shape: Sequence[int],
    rate: float,
    kind: str,
    seed: int = 0,
    channel_rate: float | None = None,
) -> None:
    """Draw masks and force them on a backbone.

    Args:
        backbone: A dynamic backbone.
        input_shape: (N, 3, H, W).
        rate, kind, seed: See :func:`draw_masks`.
        channel_rate: Share of the channels, by default ``rate``.
    """
    device = next(backbone.parameters()).device
    channel_rate = rate if channel_rate is None else channel_rate
    set_offsets(
        backbone,
        make_offsets(make_masks(backbone, input_shape, rate, kind, seed), device),
        make_offsets(make_channel_masks(backbone, input_shape, channel_rate, seed), device),
    )
    force_tokens(backbone, input_shape, rate, kind, seed)


def force_tokens(
    backbone: nn.Module, input_shape: Sequence[int], rate: float, kind: str, seed: int = 0
) -> None:
    """:func:`force_masks` of what transformer layers alone decide about."""
    batch, _, *input_hw = input_shape
    shapes = backbone.network_shape(tuple(input_hw)).blocks
    set_token_offsets(backbone, draw_token_masks(shapes, batch, rate, kind, seed))


def release_masks(backbone: nn.Module) -> None:
    """Let the maskers decide again."""
    for masker in backbone.maskers():
        masker.offset = None


def find_images(paths: Sequence[str], count: int) -> list[Path]:
    """The first ``count`` images among files and folders, in the order of their names.

    Raises:
        UserError: A path does not exist, or there are too few images.
    """
    images: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            images += sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        elif path.is_file():
            images.append(path)
        else:
            raise UserError(f"--images {path} does not exist")
    if len(images) < count:
        raise UserError(
            f"--images holds {len(images)} images ({', '.join(SUFFIXES)}), but --shape asks for a "
            f"batch of {count}"
        )
    return images[:count]


def load_images(paths: Sequence[Path], input_hw: tuple[int, int], cfg: Config) -> Tensor:
    """Images as the config's model sees them, all resized to one size.

    Args:
        paths: One file per image of the batch.
        input_hw: (H, W) to resize to.
        cfg: Its ``data_preprocessor`` gives mean, std and the order of the channels.

    Returns:
        (N, 3, H, W), float32.

    Raises:
        UserError: A file is no image.
    """
    import numpy as np
    from PIL import Image

    settings = cfg.model.get("data_preprocessor") or cfg.get("data_preprocessor") or {}
    # mmpretrain calls it to_rgb, mmdet bgr_to_rgb; OpenMMLab reads images as BGR.
    rgb = settings.get("bgr_to_rgb") or settings.get("to_rgb")
    batch = []
    for path in paths:
        try:
            with Image.open(path) as image:
                resized = image.convert("RGB").resize(input_hw[::-1], Image.Resampling.BILINEAR)
        except OSError as error:  # PIL's errors are OSErrors too
            raise UserError(f"{path} is no image that can be read") from error
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float()
        batch.append(pixels if rgb else pixels.flip(0))
    mean, std = (
        torch.tensor(settings.get(key) or [default] * 3).view(3, 1, 1)
        for key, default in (("mean", 0.0), ("std", 1.0))
    )
    return (torch.stack(batch) - mean) / std
