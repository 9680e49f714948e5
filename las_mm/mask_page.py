"""One HTML page, without a server or the network, to look at what a network computed in images."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
from torch import Tensor

from las_mm.models.activation import NetworkActivation
from las_mm.models.flops import flops_report
from las_mm.models.rates import image_activation
from las_mm.network.block import BlockShape
from las_mm.network.operator import DILATED, POSITION
from las_mm.network.transformer import TOKEN
from las_mm.visualization import computed_share, unpad

WIDEST = 720  # pixels of a picture in the page
FINEST = 96  # cells along the longer side of a stage's map


class MaskPage:
    """The page of a network; images are written as they come, so that any number fits in memory.

    Args:
        path: Of the page. It is there, whole, when the context is left without an error.
        title: Above the list of images.
        device: What predicted the latencies that :meth:`add` is given.

    Examples:
        >>> with MaskPage("masks.html", "my network") as page:  # doctest: +SKIP
        ...     page.add("a.jpg", image, activation, metainfo, measured_ms=12.3)
    """

    def __init__(self, path: str | Path, title: str, device: str | None = None) -> None:
        self.path, self.title, self.device = Path(path), title, device
        self._draft = self.path.with_name(f".{self.path.name}.draft-{os.getpid()}")
        self._rates: list[str] = []
        self._axes: list[str] = []

    def __enter__(self) -> MaskPage:
        text = (resources.files("las_mm") / "mask_page.html").read_text(encoding="utf-8")
        head, self._tail = text.split("<!--records-->")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._draft, "w", encoding="utf-8")
        self._file.write(head)
        return self

    def add(
        self,
        name: str,
        image: np.ndarray,
        activation: NetworkActivation,
        metainfo: Mapping | None = None,
        measured_ms: float | None = None,
        predicted_ms: float | None = None,
        image_index: int = 0,
    ) -> None:
        """Write what the network did in one image.

        Args:
            name: Of the image.
            image: (H, W, 3) RGB, uint8.
            activation: Of the batch that it was in.
            metainfo: Of its data sample, which tells padding from image; see
                :func:`~las_mm.visualization.unpad`.
            measured_ms: What the backbone took for it.
            predicted_ms: What it is predicted to take.
            image_index: Its place in the batch.
        """
        own = image_activation(activation.detach(), image_index)
        shape, metainfo = own.shape, dict(metainfo or {})
        stages = []
        for stage in shape.stages():
            share, _ = unpad(computed_share(own, 0, stage), image.shape[:2], metainfo)
            stages.append(dict(_grid(_shrink(share, FINEST)), stage=stage, mean=_mean(share)))
        seen = unpad(np.zeros(shape.input_hw, np.float32), image.shape[:2], metainfo)[0].shape
        named = {name: axes for name, axes in own.named_rates().items() if shape.having(*axes)}
        self._rates = list(named) or self._rates
        stride, behind, blocks = int(np.prod([layer.stride for layer in shape.stem])), 1, []
        for i, block in enumerate(shape.blocks):
            stride *= behind * block.stride
            behind = block.stride_behind
            blocks.append(_block(own, i, block, stride, seen, metainfo))
        decided = {axis for block in blocks for axis in block["rates"]}
        self._axes = [axis for axis in shape.axes if axis in {*decided, *self._axes}]
        record = dict(
            name=name,
            picture=_jpeg(image),
            seen=seen,
            rates={name: round(own.mean_of(*axes).item(), 4) for name, axes in named.items()},
            flops_ratio=round(flops_report(own).ratio.item(), 4),
            measured_ms=measured_ms,
            predicted_ms=predicted_ms,
            stages=stages,
            blocks=blocks,
        )
        self._write("image", record)

    def _write(self, kind: str, record: dict) -> None:
        # "</script>" in a name must not end the element.
        text = json.dumps(record, allow_nan=False).replace("<", "\\u003c")
        mark = f'id="{kind}"' if kind == "about" else f'class="{kind}"'
        self._file.write(f'<script type="application/json" {mark}>{text}</script>\n')

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                about = dict(title=self.title, rates=self._rates, axes=self._axes)
                self._write("about", dict(about, device=self.device))
                self._file.write(self._tail)
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
            if error is None:
                os.replace(self._draft, self.path)
        finally:
            self._file.close()
            self._draft.unlink(missing_ok=True)


def _block(
    own: NetworkActivation,
    index: int,
    block: BlockShape,
    stride: int,
    seen: Sequence[int],
    metainfo: dict,
) -> dict:
    """What one block decided: a grid of places, bits of everything else, and rates by axis."""
    decisions = {axis: made[0].float().cpu() for axis, made in own.decisions[index].items()}
    rates = {axis: round(own.axes[axis][index].item(), 4) for axis in block.axes if axis != DILATED}
    grid = None
    for axis in (POSITION, TOKEN):
        made = decisions.pop(axis, None)
        if made is not None:
            grid = _places(axis, made, block, stride, seen, metainfo)
    bits = {axis: _bits(made) for axis, made in decisions.items()}
    return dict(name=block.name, mode=block.mode, rates=rates, grid=grid, bits=bits)


def _places(
    axis: str,
    made: Tensor,
    block: BlockShape,
    stride: int,
    seen: Sequence[int],
    metainfo: dict,
) -> dict:
    """Decisions about places, cut to the image, and how many input pixels a cell has."""
    cell = stride * (1 if axis == TOKEN else block.granularity)
    values = made[1:].view(block.h_out, block.w_out) if axis == TOKEN else made[0]
    rows, columns = (min(-(-n // cell), m) for n, m in zip(seen, values.shape))
    values = values.numpy()[:rows, :columns]
    if metainfo.get("flip"):
        direction = metainfo.get("flip_direction") or "horizontal"
        values = values[:, ::-1] if direction in ("horizontal", "diagonal") else values
        values = values[::-1] if direction in ("vertical", "diagonal") else values
    return dict(_grid(values), axis=axis, cell=[cell, cell])


def _bits(made: Tensor) -> str:
    return "".join("1" if value > 0.5 else "0" for value in made.flatten().tolist())


def _grid(values: np.ndarray) -> dict:
    data = np.ascontiguousarray((255 * values).round().clip(0, 255).astype(np.uint8))
    return dict(h=data.shape[0], w=data.shape[1], data=base64.b64encode(data.tobytes()).decode())


def _shrink(values: np.ndarray, most: int) -> np.ndarray:
    factor = most / max(values.shape)
    if factor >= 1:
        return values
    size = [max(1, round(n * factor)) for n in reversed(values.shape)]
    return cv2.resize(values, size, interpolation=cv2.INTER_AREA)


def _mean(values: np.ndarray) -> float:
    return round(float(values.mean()), 4)


def _jpeg(image: np.ndarray) -> str:
    factor = WIDEST / max(image.shape[:2])
    if factor < 1:
        size = [max(1, round(n * factor)) for n in reversed(image.shape[:2])]
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    good, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    assert good
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()
