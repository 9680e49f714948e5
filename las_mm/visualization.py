"""Pictures of what a dynamic network computed where."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from las_mm.dependencies import MissingDependencyError
from las_mm.fileio import write_atomically
from las_mm.models.activation import NetworkActivation
from las_mm.models.flops import flops_report
from las_mm.models.rates import image_activation
from las_mm.network.operator import POSITION
from las_mm.network.transformer import ATTENTION, HEAD, MLP, TOKEN
from las_mm.painting import draw_box, paint_predictions

COLORMAP = "viridis"
# The layout of a picture in inches; CAPTION is the room above a panel, BAR the colour bar's.
WIDTH, MAX_PANEL_HEIGHT, MIN_PANEL = 11.0, 6.0, 3.0
MARGIN, GAP, HEADING, CAPTION, BAR = 0.2, 0.12, 0.42, 0.3, 0.75
DPI = 120


def require_matplotlib() -> None:
    """Raise a :class:`MissingDependencyError` where matplotlib cannot be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"drawing masks needs matplotlib, which cannot be imported ({error}); install it with "
            f"`pip install 'las_mm[demo]'`."
        ) from error


def computed_share(
    activation: NetworkActivation, image_index: int, stage: int | None = None
) -> np.ndarray:
    """Which share of the blocks, and of their channels, computed at each pixel of the input.

    Every block with a mask counts alike, whatever it costs, so that the mean of the map is the
    mean activation rate (but for ragged edges) where no block skips channels. A patch covers S x S
    outputs, each as many input pixels wide as the strides up to the block multiply to. A block
    that skips channels counts by the share of channels that it computed for the image, in a patch
    that it kept or, without patches, everywhere. A transformer layer that skips its halves counts
    by these, of which the attention counts by its share of heads, on the tokens that it kept.

    Args:
        activation: What the network did, of a batch.
        image_index: Image of the batch, from 0.
        stage: The blocks of this stage only, from 1. Defaults to all stages.

    Returns:
        (H, W) of the network's input, padding included, float32 in [0, 1]; ones where no block
        has a mask, i.e. in a static stage or network.

    Raises:
        IndexError: No such image in the batch.
        ValueError: No such stage.
    """
    shape = activation.shape
    stages = {block.stage for block in shape.blocks}
    if stage is not None and stage not in stages:
        raise ValueError(f"stage must be one of {sorted(stages)} or None, got {stage!r}")
    height, width = shape.input_hw
    total = np.zeros((height, width), np.float32)
    count = 0
    stride = int(np.prod([layer.stride for layer in shape.stem]))
    behind = 1
    for block, decisions in zip(shape.blocks, activation.decisions):
        stride *= behind * block.stride
        behind = block.stride_behind
        if not decisions or stage not in (None, block.stage):
            continue
        batch = len(next(iter(decisions.values())))
        if not 0 <= image_index < batch:
            raise IndexError(
                f"image_index must be from 0 to {batch - 1} for this batch, got {image_index}"
            )
        own = {axis: made[image_index].detach().float() for axis, made in decisions.items()}
        coarse = own.pop(POSITION, None)
        if TOKEN in own:  # the class token has no place
            coarse = own.pop(TOKEN)[1:].view(1, block.h_out, block.w_out)
        share = _share_of({axis: made.mean().item() for axis, made in own.items()})
        if coarse is None:
            total += share
        else:
            patch = block.granularity * stride
            fine = coarse[0].cpu().numpy().repeat(patch, axis=0).repeat(patch, axis=1)
            missing = [(0, max(n - m, 0)) for n, m in zip((height, width), fine.shape)]
            total += share * np.pad(fine, missing, mode="edge")[:height, :width]
        count += 1
    return total / np.float32(count) if count else np.ones_like(total)


def _share_of(rates: dict[str, float]) -> np.float32:
    """Share of a block that ran, by its rates of other things than places."""
    if not set(rates) & {ATTENTION, MLP}:
        return np.float32(np.prod(list(rates.values())))
    attention = rates.get(ATTENTION, 1.0) * rates.get(HEAD, 1.0)
    return np.float32((attention + rates.get(MLP, 1.0)) / 2)


def unpad(
    share: np.ndarray, image_hw: tuple[int, int], metainfo: dict
) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """Cut the padding off a map of the network's input and find its place in the original image.

    Padding is at the right and bottom. Where the network saw less than the resized image, it is
    taken for a centre crop, as classifiers use. An image that was flipped is flipped back.

    Args:
        share: (H, W) of the network's input.
        image_hw: (height, width) of the original image.
        metainfo: Of the data sample: ``img_shape``, ``ori_shape``, ``scale_factor`` (width,
            height), ``flip`` and ``flip_direction``, all optional; the factor is read where
            ``ori_shape`` is the image's.

    Returns:
        The cut map, and the part of the original image it covers as (left, right, top, bottom)
        in pixels.
    """
    seen, window = [], []
    used_hw = tuple(metainfo.get("img_shape") or share.shape)[:2]
    is_original = tuple(metainfo.get("ori_shape") or image_hw)[:2] == tuple(image_hw)
    factors = metainfo.get("scale_factor") if is_original else None
    for axis, (image, used) in enumerate(zip(image_hw, used_hw)):
        factor = factors[1 - axis] if factors is not None else used / image
        resized = round(image * factor)
        seen.append(max(1, min(resized, used, share.shape[axis])))
        start = round(max(resized - used, 0) / 2) / factor
        stop = start + used / factor if resized > used else float(image)
        window.append((start, stop))
    (top, bottom), (left, right) = window
    share = share[: seen[0], : seen[1]]
    if metainfo.get("flip"):
        direction = metainfo.get("flip_direction") or "horizontal"
        share = share[:, ::-1] if direction in ("horizontal", "diagonal") else share
        share = share[::-1] if direction in ("vertical", "diagonal") else share
    return share, (left, right, top, bottom)


def draw_masks(
    image: np.ndarray,
    activation: NetworkActivation,
    image_index: int = 0,
    data_sample=None,
    dataset_meta: dict | None = None,
    score_thr: float = 0.3,
    title: str = "",
) -> np.ndarray:
    """An image with the model's predictions beside maps of where the network computed.

    The second row shows the stages. The rates and the FLOPs ratio are those of this image.

    Args:
        image: The original image, (H, W, 3) RGB, uint8.
        activation: What the network did with the batch that the image was in.
        image_index: Image of that batch, from 0. Defaults to 0.
        data_sample: The model's output for the image, of mmdet or mmpretrain: its predictions are
            drawn, its ground truth is not, and its metainfo tells padding from image.
        dataset_meta: ``classes`` and ``palette`` of the data set. Defaults to numbered classes.
        score_thr: Only instances that score higher are drawn. Defaults to 0.3.
        title: Put before the figures, e.g. the image's name.

    Returns:
        The picture, RGB, uint8, 1320 pixels wide, or less for upright images.

    Raises:
        MissingDependencyError: There is no matplotlib.
    """
    require_matplotlib()
    own = image_activation(activation.detach(), image_index)
    metainfo = getattr(data_sample, "metainfo", {})
    shape, stages = own.shape, own.stage_rates()
    sheet = _Sheet(image, own, metainfo, columns=len(stages))
    ratio = flops_report(own).ratio.item()
    figures = f"backbone FLOPs {ratio:.0%} of static"
    for name, axes in reversed(own.named_rates().items()):
        if shape.having(*axes) or (name == "activation_rate" and not shape.having()):
            figures = f"{name.replace('_', ' ')} {own.mean_of(*axes).item():.0%}   {figures}"
    sheet.heading(f"{title}   {figures}" if title else figures)

    painted, text, instances = paint_predictions(image, data_sample, dataset_meta or {}, score_thr)
    axis = sheet.picture(sheet.place(1, 0), text, painted)
    for box, label, color in instances:
        draw_box(axis, box, label, color, sheet.window)
    others = [axes[0] for axes in own.named_rates().values() if POSITION not in axes]
    whose = "' " + " and ".join(f"{axis}s" for axis in others) if others else ""
    if {ATTENTION, MLP} & set(others):
        whose = "' attention and MLP"
    elif others == [TOKEN]:
        whose = ""
    what = f"share of the dynamic blocks{whose} that computed here"
    sheet.heat_map(sheet.place(1, 1), what, None)
    sheet.color_bar()
    for column, stage in enumerate(stages):
        text = f"stage {stage}   {_stage_label(own, stage)}   {_stage_figures(own, stage)}"
        sheet.heat_map(sheet.place(2, column), text, stage)
    return sheet.rgb()


class _Sheet:
    """A figure: heading, a row of two panels with a colour bar, a row of ``columns`` small ones.

    Lengths are in inches, from the top left corner.
    """

    def __init__(
        self, image: np.ndarray, activation: NetworkActivation, metainfo: dict, columns: int
    ) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.image, self.activation, self.metainfo = image, activation, metainfo
        # Little contrast, so that the brightness of a colour still tells its value.
        self.gray = 0.6 * cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) + 70
        _, self.window = unpad(np.empty(activation.shape.input_hw), image.shape[:2], metainfo)
        left, right, top, bottom = self.window
        self.aspect = (bottom - top) / (right - left)
        widest = (WIDTH - 2 * MARGIN - BAR - GAP) / 2
        self.panel = max(min(widest, MAX_PANEL_HEIGHT / self.aspect), MIN_PANEL)
        both = 2 * self.panel + GAP
        self.small = (both - (columns - 1) * GAP) / columns
        self.width = both + BAR + 2 * MARGIN
        self.height = HEADING + 2 * CAPTION + (self.panel + self.small) * self.aspect + MARGIN
        self.figure = Figure(figsize=(self.width, self.height), dpi=DPI, facecolor="white")
        self.canvas = FigureCanvasAgg(self.figure)

    def place(self, row: int, column: int) -> tuple[float, float, float, float]:
        """(left, top, width, height) of a panel in row 1 (large) or 2 (small)."""
        width = self.panel if row == 1 else self.small
        top = HEADING + CAPTION
        if row == 2:
            top += self.panel * self.aspect + CAPTION
        return MARGIN + column * (width + GAP), top, width, width * self.aspect

    def axes(self, place: tuple[float, float, float, float]):
        left, top, width, height = place
        x, y = left / self.width, 1 - (top + height) / self.height
        return self.figure.add_axes((x, y, width / self.width, height / self.height))

    def heading(self, text: str) -> None:
        position = (MARGIN / self.width, 1 - 0.6 * HEADING / self.height)
        self.figure.text(*position, text, fontsize=11, weight="bold", va="center")

    def picture(self, place: tuple, text: str, picture: np.ndarray, **kwargs):
        """A panel with a picture of the original image's size."""
        axis = self.axes(place)
        height, width = picture.shape[:2]
        axis.imshow(picture, extent=(0, width, height, 0), aspect="auto", **kwargs)
        axis.set_title(text, fontsize=9, pad=4)
        axis.set_axis_off()
        self._crop(axis)
        return axis

    def heat_map(self, place: tuple, text: str, stage: int | None) -> None:
        """A panel with the computed share of a stage, or of all, over the gray image."""
        axis = self.picture(place, text, self.gray, cmap="gray", vmin=0, vmax=255)
        share = computed_share(self.activation, 0, stage)
        share, (left, right, top, bottom) = unpad(share, self.image.shape[:2], self.metainfo)
        axis.imshow(
            share,
            extent=(left, right, bottom, top),
            aspect="auto",
            interpolation="nearest",
            cmap=COLORMAP,
            vmin=0,
            vmax=1,
            alpha=0.7,
        )
        self._crop(axis)

    def color_bar(self) -> None:
        """The scale of all maps, right of the large panels."""
        from matplotlib.cm import ScalarMappable

        colors = ScalarMappable(cmap=COLORMAP)
        colors.set_clim(0, 1)
        left, top, _, height = self.place(1, 2)
        axis = self.axes((left, top, 0.14, height))
        self.figure.colorbar(colors, cax=axis, ticks=[0, 0.25, 0.5, 0.75, 1], format="{x:.0%}")
        axis.tick_params(length=2, labelsize=8)

    def rgb(self) -> np.ndarray:
        self.canvas.draw()
        return np.asarray(self.canvas.buffer_rgba())[..., :3].copy()

    def _crop(self, axis) -> None:
        """Show what the network saw of the image."""
        left, right, top, bottom = self.window
        axis.set(xlim=(left, right), ylim=(bottom, top))


def write_png(path: str | Path, picture: np.ndarray) -> None:
    """Write an RGB picture, whole or not at all; folders are made.

    Raises:
        OSError: The file cannot be written.
    """
    _, png = cv2.imencode(".png", np.ascontiguousarray(picture[..., ::-1]))
    write_atomically(path, png.tobytes())


def _stage_label(activation: NetworkActivation, stage: int) -> str:
    """What a stage's blocks are: "S=4", "S=4-2-2", "layer", "static", "channel G=2"."""
    blocks = activation.shape.stages()[stage]
    labels = [str(b.granularity) if b.mode == "spatial" else b.label for b in blocks]
    if len(set(labels)) == 1:
        labels = labels[:1]
    elif not any(b.has_patches for b in blocks):
        labels = list(dict.fromkeys(labels))
    return ("S=" if blocks[0].mode == "spatial" else "") + "-".join(labels)


def _stage_figures(activation: NetworkActivation, stage: int) -> str:
    """Its rates: "45%", "channels 45%", "45%, channels 50%"."""
    blocks, figures = activation.shape.stages()[stage], []
    for name, axes in activation.named_rates().items():
        if any(set(axes) & set(block.axes) for block in blocks):
            if axes == (TOKEN,):
                continue  # which is the activation rate
            what = "" if name == "activation_rate" else f"{axes[0]}s "
            figures.append(f"{what}{activation.stage_rates(*axes)[stage].item():.0%}")
    return ", ".join(figures or ["100%"])
