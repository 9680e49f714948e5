"""Draws where the network computed, image by image."""

from __future__ import annotations

import os.path as osp
from numbers import Real
from pathlib import Path

import mmcv
import numpy as np
from mmengine import dist
from mmengine.fileio import get
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from las_mm.models.activation import collect_activations, find_dynamic_backbone
from las_mm.registry import HOOKS
from las_mm.visualization import draw_masks, require_matplotlib, write_png


@HOOKS.register_module()
class MaskVisualizationHook(Hook):
    """Writes a PNG per validation or test image: predictions beside maps of what was computed.

    A map shows per pixel the share of the dynamic blocks that computed there, over all blocks
    and per stage; the heading gives the image's own activation rate and FLOPs ratio. Files are
    ``<work_dir>/<out_dir>/<image name>.png``, with ``_epoch3`` (``_iter2000`` in training by
    iterations) after the name when validating during training, and ``_rank1`` in distributed
    runs, where every process draws the images it has seen. Works with detectors and classifiers;
    with test-time augmentation the maps are those of the last view.

    Args:
        out_dir: Folder of the pictures, inside the work directory. Defaults to ``'masks'``.
        score_thr: Only detections that score higher are drawn. Defaults to 0.3.
        interval: Batches from one drawn batch to the next. Defaults to 1, every batch.
        max_images: Most pictures per process in one validation or test. Defaults to 50.
        in_val: Whether to draw in validation. Defaults to True.
        in_test: Whether to draw in tests. Defaults to True.

    Raises:
        ValueError: An argument is out of range; the message names it.
        MissingDependencyError: There is no matplotlib (``pip install 'las_mm[demo]'``).

    Example:
        >>> custom_hooks = [dict(type='las_mm.MaskVisualizationHook', max_images=20)]
    """

    priority = "NORMAL"

    def __init__(
        self,
        out_dir: str | Path = "masks",
        score_thr: float = 0.3,
        interval: int = 1,
        max_images: int = 50,
        in_val: bool = True,
        in_test: bool = True,
    ) -> None:
        def check(name: str, value: object, valid: bool, wanted: str) -> None:
            if not valid:
                raise ValueError(f"{name} of MaskVisualizationHook must be {wanted}, got {value!r}")

        is_path = isinstance(out_dir, (str, Path)) and str(out_dir) != ""
        check("out_dir", out_dir, is_path, "the name of a folder")
        number = isinstance(score_thr, Real) and not isinstance(score_thr, bool)
        check("score_thr", score_thr, number and 0 <= score_thr <= 1, "a number from 0 to 1")
        for name, value in dict(interval=interval, max_images=max_images).items():
            whole = isinstance(value, int) and not isinstance(value, bool)
            check(name, value, whole and value > 0, "a positive integer")
        for name, value in dict(in_val=in_val, in_test=in_test).items():
            check(name, value, isinstance(value, bool), "True or False")
        self.out_dir = str(out_dir)
        self.score_thr = score_thr
        self.interval = interval
        self.max_images = max_images
        self.in_val = in_val
        self.in_test = in_test
        self._training = False
        self._names: set[str] = set()

    @staticmethod
    def _model(runner):
        return runner.model.module if is_model_wrapper(runner.model) else runner.model

    def before_run(self, runner) -> None:
        require_matplotlib()  # fail before any work
        find_dynamic_backbone(self._model(runner))

    def before_train(self, runner) -> None:
        self._training = True

    def after_train(self, runner) -> None:
        self._training = False

    def before_val_epoch(self, runner) -> None:
        self._names = set()

    before_test_epoch = before_val_epoch

    def after_val_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        if self.in_val:
            self._draw_batch(runner, batch_idx, data_batch, outputs)

    def after_test_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        if self.in_test:
            self._draw_batch(runner, batch_idx, data_batch, outputs)

    def after_val_epoch(self, runner, metrics=None) -> None:
        if self._names:
            folder = osp.join(runner.work_dir, self.out_dir)
            runner.logger.info(f"{len(self._names)} pictures of masks written to {folder}")

    after_test_epoch = after_val_epoch

    def _draw_batch(self, runner, batch_idx: int, data_batch, outputs) -> None:
        if batch_idx % self.interval or len(self._names) >= self.max_images:
            return
        model = self._model(runner)
        activation = collect_activations(model)
        for i, sample in enumerate(outputs[: self.max_images - len(self._names)]):
            name = self._name(runner, sample)
            picture = draw_masks(
                _original_image(sample, i, data_batch, model),
                activation,
                i,
                data_sample=sample,
                dataset_meta=getattr(runner.visualizer, "dataset_meta", None),
                score_thr=self.score_thr,
                title=name,
            )
            write_png(osp.join(runner.work_dir, self.out_dir, f"{name}.png"), picture)

    def _name(self, runner, sample) -> str:
        """A name that no other image of this validation or test has."""
        metainfo = sample.metainfo
        if metainfo.get("img_path"):
            stem = osp.splitext(osp.basename(metainfo["img_path"]))[0]
        else:
            number = metainfo.get("img_id", metainfo.get("sample_idx", len(self._names)))
            stem = f"image{number}"
        if self._training:  # an iteration-based loop stays in epoch 0
            stem += f"_epoch{runner.epoch}" if runner.epoch else f"_iter{runner.iter}"
        if dist.get_world_size() > 1:
            stem += f"_rank{dist.get_rank()}"
        name, count = stem, 1
        while name in self._names:  # images of the same name in different folders
            count += 1
            name = f"{stem}_{count}"
        self._names.add(name)
        return name


def _original_image(sample, index: int, data_batch: dict, model) -> np.ndarray:
    """The image as its file has it, or the network's input where there is no file: RGB, uint8."""
    path = sample.metainfo.get("img_path")
    if path:
        return mmcv.imfrombytes(get(path), channel_order="rgb")
    image = data_batch["inputs"][index].cpu().numpy().transpose(1, 2, 0)
    image = image.clip(0, 255).astype(np.uint8)
    preprocessor = model.data_preprocessor
    # mmpretrain's flag, mmengine's flag: the model wants RGB and gets BGR.
    swap = getattr(preprocessor, "to_rgb", getattr(preprocessor, "_channel_conversion", False))
    return np.ascontiguousarray(image[..., ::-1] if swap else image)
