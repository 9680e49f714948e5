"""Draws where the network computed, image by image."""

from __future__ import annotations

import os.path as osp
from numbers import Real
from pathlib import Path

import numpy as np
from mmengine import dist
from mmengine.hooks import Hook
from torch import nn

from las_mm.hooks.passes import Passes
from las_mm.models.activation import NetworkActivation
from las_mm.models.finding import find_dynamic_backbone, unwrap
from las_mm.pictures import UnreadableImage, loaders, read_image, to_rgb
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
    with test-time augmentation the maps are those of the first view. Images are read as the data
    set's pipeline reads them; one that cannot be is named in the log and not drawn.

    Args:
        out_dir: Folder of the pictures, inside the work directory. Defaults to ``'masks'``.
        score_thr: Only detections that score higher are drawn. Defaults to 0.3.
        interval: Batches from one drawn batch to the next. Defaults to 1, every batch.
        max_images: Most pictures per process in one validation or test. Defaults to 50.
        in_val: Whether to draw in validation. Defaults to True.
        in_test: Whether to draw in tests. Defaults to True.
        module: Where the model has several dynamic backbones, the one whose maps are drawn: that
            which validation and test run, e.g. ``'teacher.backbone'``.

    Raises:
        ValueError: An argument is out of range; the message names it.
        MissingDependencyError: There is no matplotlib (``pip install 'las_mm[demo]'``).

    Examples:
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
        module: str | None = None,
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
        self.module = module
        self._training = False
        self._names: set[str] = set()
        self._passes = Passes()
        self._readers: list = []

    def check(self, model: nn.Module) -> None:
        """The model has the dynamic backbone that this hook reads, and pictures can be drawn.

        Raises:
            ValueError: It has not.
            MissingDependencyError: There is no matplotlib.
        """
        require_matplotlib()
        find_dynamic_backbone(model, self.module)

    def before_run(self, runner) -> None:
        self.check(runner.model)  # fail before any work

    def before_train(self, runner) -> None:
        self._training = True

    def after_train(self, runner) -> None:
        self._training = False

    def before_val_epoch(self, runner) -> None:
        self._start(runner, runner.val_dataloader)

    def before_test_epoch(self, runner) -> None:
        self._start(runner, runner.test_dataloader)

    def _start(self, runner, loader) -> None:
        self._names = set()
        self._readers = list(loaders(loader.dataset))
        self._passes.start(find_dynamic_backbone(runner.model, self.module))

    def after_val_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        if self.in_val:
            self._draw_batch(runner, batch_idx, data_batch, outputs)

    def after_test_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        if self.in_test:
            self._draw_batch(runner, batch_idx, data_batch, outputs)

    def after_val_epoch(self, runner, metrics=None) -> None:
        self._passes.stop()
        if self._names:
            folder = osp.join(runner.work_dir, self.out_dir)
            runner.logger.info(f"{len(self._names)} pictures of masks written to {folder}")

    after_test_epoch = after_val_epoch

    def _draw_batch(self, runner, batch_idx: int, data_batch, outputs) -> None:
        passes = self._passes.take()
        if batch_idx % self.interval or len(self._names) >= self.max_images:
            return
        model = unwrap(runner.model)
        for i, sample in enumerate(outputs[: self.max_images - len(self._names)]):
            index, activation = _pass_of(i, passes)
            if activation is None:
                runner.logger.warning(
                    f"MaskVisualizationHook: {self.module or 'the dynamic backbone'} did not run, "
                    f"so there are no masks to draw; module names the backbone that does"
                )
                return
            name = self._name(runner, sample)
            try:
                image = self._original_image(sample, i, data_batch, model)
            except UnreadableImage as error:
                runner.logger.warning(f"MaskVisualizationHook: no picture of {name}: {error}")
                continue
            picture = draw_masks(
                image,
                activation,
                index,
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

    def _original_image(self, sample, index: int, data_batch: dict, model) -> np.ndarray:
        """The image as its file has it, or the network's input where there is no file.

        (H, W, 3) RGB, uint8.
        """
        path = sample.metainfo.get("img_path")
        if path:
            return to_rgb(read_image(path, self._readers))
        inputs = data_batch["inputs"]
        if isinstance(inputs[0], (list, tuple)):  # the first view of test-time augmentation
            inputs = inputs[0]
        image = to_rgb(inputs[index].cpu().numpy().transpose(1, 2, 0))
        preprocessor = model.data_preprocessor
        # mmpretrain's flag, mmengine's flag: the model wants RGB and gets BGR.
        swap = getattr(preprocessor, "to_rgb", getattr(preprocessor, "_channel_conversion", False))
        return image if swap else np.ascontiguousarray(image[..., ::-1])


def _pass_of(
    image: int, passes: list[tuple[int, NetworkActivation]]
) -> tuple[int, NetworkActivation | None]:
    """Where an image of a batch is: its index in a forward pass, and that pass' record."""
    for count, activation in passes:
        if image < count:
            return image, activation
        image -= count
    return 0, None
