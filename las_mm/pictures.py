"""Image files, as a data set's pipeline reads them and as people want to see them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mmcv
import numpy as np
from mmengine.dataset import Compose, pseudo_collate
from mmengine.fileio import get
from mmengine.registry import DefaultScope
from PIL import Image
from torch import Tensor, nn

from las_mm.drawn_masks import SUFFIXES


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


def as_the_model_reads(model: nn.Module, folder: str | Path) -> Iterator[Tensor]:
    """The images of a folder as a model's backbone takes them, one at a time.

    Args:
        model: With the config that it was built from, as mmdet's ``init_detector`` (``cfg``) and
            mmpretrain's ``get_model`` (``_config``) leave it.
        folder: Of image files; others in it are left out.

    Yields:
        (1, C, H, W), by the config's test pipeline and the model's preprocessor.

    Raises:
        ValueError: There is no such folder, no image in it, or no test pipeline; an
            :class:`UnreadableImage` names a file.
    """
    folder = Path(folder)
    files = folder.iterdir() if folder.is_dir() else []
    paths = sorted(path for path in files if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(
            f"images {str(folder)!r} must be a folder with {', '.join(SUFFIXES)} in it"
        )
    config = getattr(model, "cfg", None) or getattr(model, "_config", None)
    dataset = ((config or {}).get("test_dataloader") or {}).get("dataset") or {}
    while "pipeline" not in dataset and "dataset" in dataset:
        dataset = dataset["dataset"]
    steps = [s for s in dataset.get("pipeline") or [] if "Annotations" not in str(s["type"])]
    if not steps or not hasattr(model, "data_preprocessor"):
        raise ValueError(
            f"{type(model).__name__} has no config with a test pipeline to read {str(folder)!r} "
            "with: build it with init_detector or get_model, or give the images as tensors"
        )
    with DefaultScope.overwrite_default_scope(config.get("default_scope")):
        pipeline = Compose(steps)
    return (_read(model, pipeline, path, i) for i, path in enumerate(paths))


def _read(model: nn.Module, pipeline: Compose, path: Path, number: int) -> Tensor:
    check_whole(path)
    try:
        data = pipeline(dict(img_path=str(path), img_id=number))
    except Exception as error:  # of the decoder or of a transform
        raise UnreadableImage(f"{path} cannot be read by the test pipeline: {error}") from error
    return model.data_preprocessor(pseudo_collate([data]), False)["inputs"]
