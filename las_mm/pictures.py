"""Image files, as a data set's pipeline reads them and as people want to see them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mmcv
import numpy as np
from mmengine.fileio import get
from PIL import Image


class UnreadableImage(ValueError):
    """A file that is no whole image; the message names it."""


def loaders(dataset: object) -> Iterator[object]:
    """The transforms that read image files in the pipelines of a data set, wrappers opened.

    Args:
        dataset: A built data set of mmengine.
    """
    for child in getattr(dataset, "datasets", None) or [getattr(dataset, "dataset", None)]:
        if child is not None:
            yield from loaders(child)
    for transform in getattr(getattr(dataset, "pipeline", None), "transforms", []):
        if hasattr(transform, "imdecode_backend") and hasattr(transform, "color_type"):
            yield transform
            return


def read_image(path: str, readers: list) -> np.ndarray:
    """An image file as the network's pipeline reads it: its decoder, orientation and file backend.

    Args:
        path: Its path or URL.
        readers: Transforms such as mmcv's ``LoadImageFromFile``, see :func:`loaders`; the first
            that can read the file does. Without any, mmcv's default is used.

    Returns:
        (H, W) or (H, W, C), colours in mmcv's order (BGR), in the type that the decoder gives.

    Raises:
        UnreadableImage: None of them can.
    """
    reason: object = "it cannot be decoded"
    for reader in readers or [None]:
        try:
            if reader is None:
                image = mmcv.imfrombytes(get(path))
            else:
                image = (reader.transform(dict(img_path=path)) or {}).get("img")
        except Exception as error:  # a file backend, OpenCV, Pillow: the reason is in the message
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else error
            continue
        if image is not None:
            return image
    raise UnreadableImage(f"{path} is no image that can be read ({reason})")


def check_whole(path: str | Path) -> None:
    """Raise :class:`UnreadableImage` where an image file ends too early.

    OpenCV fills the rest of some of these with grey and says nothing.
    """
    try:
        with Image.open(path) as image:
            image.load()
    except Image.UnidentifiedImageError:
        pass  # not a format that Pillow knows, or no image: the decoder tells
    except (OSError, SyntaxError) as error:
        raise UnreadableImage(f"{path} is damaged: {error}") from error


def to_rgb(image: np.ndarray) -> np.ndarray:
    """What people see of a decoded image: (H, W, 3) RGB, uint8.

    Args:
        image: (H, W) or (H, W, C) with C of 1 (grey), 3 (BGR), 4 (BGR and opacity, which is left
            out) or more (the first three); 8 or 16 bits, or floats from 0 to 255.
    """
    if image.ndim == 2:
        image = image[..., None]
    image = image[..., [2, 1, 0]] if image.shape[2] >= 3 else image[..., [0, 0, 0]]
    if image.dtype == np.uint16:
        image = image >> 8
    return np.ascontiguousarray(image.clip(0, 255).astype(np.uint8))
