"""What each block of a dynamic network does on an image, and how long it takes."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from las_mm.models import sparse
from las_mm.models.bottleneck import DynamicBottleneck
from las_mm.models.executors.dense_layer import DenseNetParts
from las_mm.models.finding import find_dynamic_backbone
from las_mm.models.interception import obstacle

_ROUNDS = 7


@dataclass(frozen=True)
class BlockReport:
    """One row of an :class:`Explanation`.

    Attributes:
        name: Name inside the backbone, e.g. ``'layer3.5'``; ``'stem'`` for the first row.
        mode: Of the block, e.g. ``'spatial'``; empty for the stem.
        granularity: S of a spatial or both block, else ``None``.
        rate: Share of outputs that conv2 and conv3 compute, ``None`` for the stem.
        rate_dilated: Share of outputs that conv1 computes.
        choice: How it ran: ``'winograd'``, ``'direct'``, ``'dense'``, ``'gathered winograd'`` or
            ``'gathered direct'`` (a channel or both block, with the weights of the channels that
            each image wants), ``'what is kept'`` (transformer layers), or ``'masked-dense'`` with
            the reason.
        predicted_ms: From the break-even table of this machine, without the masker; ``None`` if
            the block is too small to be in it, or skips channels: the table has blocks that
            compute all of them.
        measured_ms: Median of several runs, with the masker; ``None`` inside a module that runs as
            a whole (a stage with hooks, or one that is no sequence of blocks).
        channel_granularity: G of a channel or both block, else ``None``.
        rate_channel: Share of channels that it computes, else ``None``.
        decided_by: What chose that: ``'measured'``, ``'pinned plan'``, ``"runtime='sparse'"``,
            ``'too small to measure'``, ...; empty where there was no choice.
    """

    name: str
    mode: str
    granularity: int | None
    rate: float | None
    rate_dilated: float | None
    choice: str
    predicted_ms: float | None
    measured_ms: float | None
    channel_granularity: int | None = None
    rate_channel: float | None = None
    decided_by: str = ""


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` returns; ``str()`` gives the table."""

    title: str
    blocks: tuple[BlockReport, ...]

    @property
    def measured_ms(self) -> float:
        """Sum over the stem and all blocks that were measured."""
        return sum(block.measured_ms or 0.0 for block in self.blocks)

    def table(self) -> Table:
        """The rows as a rich table."""
        table = Table(title=self.title)
        channels = any(block.channel_granularity is not None for block in self.blocks)
        columns = ("block", "mode", "S", "rate", "conv1 rate")
        columns += ("G", "channels") if channels else ()
        for column in (*columns, "runs", "predicted ms", "ms"):
            table.add_column(column, justify="left" if column in ("block", "runs") else "right")

        def show(value: float | None, digits: int = 0) -> str:
            return "" if value is None else f"{value:.{digits}f}"

        for b in self.blocks:
            channel = (show(b.channel_granularity), show(b.rate_channel, 3)) if channels else ()
            table.add_row(
                b.name,
                b.mode,
                show(b.granularity),
                show(b.rate, 3),
                show(b.rate_dilated, 3),
                *channel,
                b.choice,
                show(b.predicted_ms, 2),
                show(b.measured_ms, 2),
            )
        reasons = Counter(b.decided_by for b in self.blocks if b.decided_by)
        if reasons:
            told = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
            table.caption = f"decided by: {told}"
        table.add_section()
        table.add_row("total", *[""] * (len(table.columns) - 2), show(self.measured_ms, 2))
        return table

    def __str__(self) -> str:
        console = Console(width=130)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def _choice(block: DynamicBottleneck, x: Tensor, rate: float) -> tuple[str, str, float | None]:
    """How ``block`` runs, what decided that, and the predicted seconds."""
    executor = block.prepare()
    if executor is None:
        return f"masked-dense: {block.why_dense or 'modules inside have hooks'}", "", None
    if x.dtype != executor.dtype:
        return f"masked-dense: its weights are {executor.dtype}, its input is {x.dtype}", "", None
    choice = executor.choice
    if executor.form:
        return executor.form, choice.decided_by, None
    if executor.masker_channel is not None:  # the plan times blocks that compute all channels
        form = "gathered winograd" if choice.winograd else "gathered direct"
        return form, choice.decided_by, None
    stride = block.conv1_stride * block.conv2_stride
    positions = x.shape[0] * -(-x.shape[2] // stride) * -(-x.shape[3] // stride)
    seconds = choice.predict(rate, positions)
    if rate > choice.dense_above:
        return "dense", choice.decided_by, seconds
    return ("winograd" if choice.winograd else "direct"), choice.decided_by, seconds


def _stem_choice(backbone: nn.Module, image: Tensor) -> str:
    """How the stem runs: in one pass, or as the modules that it is made of, with the reason."""
    executor = backbone._prepare_stem()
    if isinstance(executor, DenseNetParts):
        why, executor = executor.reason, executor.stem
    else:
        why = backbone.why_stem_dense or "modules inside have hooks"
    if backbone.runtime == "dense":
        why = "runtime='dense'"
    elif executor is not None and image.dtype == executor.weight.dtype:
        return "one pass"
    elif executor is not None:
        why = f"its weights are {executor.weight.dtype}, its input is {image.dtype}"
    return f"as its modules: {why}"


def explain(
    model: nn.Module, image: Tensor, quiet: bool = False, module: str | None = None
) -> Explanation:
    """Run the backbone of ``model`` on ``image`` and print what each block did and took.

    Args:
        model: A model with one dynamic backbone (detector, classifier, backbone). On a GPU every
            block is waited for, so blocks take longer than in a stream of them.
        image: What the backbone gets: (C, H, W) or (N, C, H, W), normalised, the weights' dtype.
        quiet: Only return the explanation.
        module: Which backbone, where the model has several, e.g. ``'student.backbone'``.

    Returns:
        The rows of the table.

    Raises:
        ValueError: No dynamic backbone, or several that could be meant, an image of another shape,
            or no native kernels.

    Examples:
        >>> las_mm.explain(model.backbone, torch.rand(3, 800, 1344))  # doctest: +SKIP
    """
    backbone = find_dynamic_backbone(model, module)
    if not isinstance(image, Tensor):
        raise ValueError(f"image must be a tensor, got {type(image).__name__}")
    if image.dim() == 3:
        image = image[None]
    if image.dim() != 4:
        raise ValueError(f"image must be (C, H, W) or (N, C, H, W), got {tuple(image.shape)}")
    if not image.numel():
        raise ValueError(f"image must have at least one pixel, got {tuple(image.shape)}")
    channels = backbone.network_shape(tuple(image.shape[-2:])).channels
    if image.shape[1] != channels:
        raise ValueError(
            f"image must have the {channels} channels that the backbone takes, got "
            f"{tuple(image.shape)}"
        )
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            if not sparse.wanted(image):
                why = obstacle(image)
                raise ValueError(
                    "the sparse path does not run here: las_mm.explain needs a float32 or bfloat16 "
                    "(on a GPU also float16) image, the native ops for its device, and no "
                    f"autocast or masked_dense() around it, got {image.dtype} on {image.device}"
                    + ("" if why is None else f"; {why}")
                )
            return _explain(backbone, image, quiet)
    finally:
        model.train(was_training)


def _explain(backbone: nn.Module, image: Tensor, quiet: bool) -> Explanation:
    names = {module: name for name, module in backbone.named_modules()}
    seconds: dict[nn.Module, list[float]] = {}

    def observe(module: nn.Module) -> None:
        nonlocal last
        if image.is_cuda:
            torch.cuda.synchronize(image.device)
        now = time.perf_counter()
        seconds.setdefault(module, []).append(now - last)
        last = time.perf_counter()

    for _ in range(2 + _ROUNDS):  # two to warm up
        last = time.perf_counter()
        backbone._input_hw = tuple(image.shape[-2:])
        if backbone.known_forward():
            backbone._infer(image, observe)
        else:
            backbone(image)

    def measured(module: nn.Module) -> float | None:
        return 1e3 * statistics.median(seconds[module][2:]) if module in seconds else None

    rows, packed = [], backbone.packed()
    if backbone in seconds:
        runs = _stem_choice(backbone, image)
        rows.append(BlockReport("stem", "", None, None, None, runs, None, measured(backbone)))
    shape = backbone.network_shape(tuple(image.shape[-2:]))
    geometries = dict(zip(backbone.blocks(), shape.blocks))
    unseen = [block for block in geometries if block not in seconds]
    for block in (*(module for module in seconds if module is not backbone), *unseen):
        if block not in geometries:
            name = f"{names[block]} ({type(block).__name__})"
            runs = "packed" if block in packed else "as it is: no block of las_mm"
            rows.append(BlockReport(name, "", None, None, None, runs, None, measured(block)))
            continue
        geometry = geometries[block]
        activation = block.activation
        rate = float(activation.rate)
        size = block.input_hw or (geometry.h_in, geometry.w_in)
        x = image.new_empty((image.shape[0], block.in_channels, *size))
        choice, decided_by, predicted = _choice(block, x, rate)
        rows.append(
            BlockReport(
                name=names[block],
                mode=block.mode,
                granularity=geometry.granularity if geometry.has_patches else None,
                rate=rate,
                rate_dilated=float(activation.rate_dilated),
                choice=choice,
                decided_by=decided_by,
                predicted_ms=None if predicted is None else 1e3 * predicted,
                measured_ms=measured(block),
                channel_granularity=(
                    geometry.channel_granularity if geometry.has_channels else None
                ),
                rate_channel=float(activation.rate_channel) if geometry.has_channels else None,
            )
        )
    size = "x".join(map(str, image.shape))
    title = f"{shape.name} on {size}, {torch.get_num_threads()} threads"
    explanation = Explanation(title, tuple(rows))
    if not quiet:
        Console().print(explanation.table())
    return explanation
