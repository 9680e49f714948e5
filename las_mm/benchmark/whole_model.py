"""The whole model, head included, with its static and with its dynamic backbone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from las_mm.benchmark.contest import Contestant


def build_whole(
    model: nn.Module,
    path: str,
    twin: nn.Module,
    x: Tensor,
    prepare: Callable[[], None],
    mode: str,
) -> list[Contestant]:
    """The whole model from a normalised batch to predictions, static and dynamic backbone.

    Args:
        model: A detector, classifier, ... in eval mode.
        path: Module name of its backbone.
        twin: The static backbone in eager mode.
        x: (N, 3, H, W), float32.
        prepare: Sets the masks of the dynamic backbone.
        mode: ``'predict'``, or ``'tensor'``, which leaves out the post-processing: with random
            weights that depends on how many random boxes pass the score threshold.

    Returns:
        The static model and the dynamic one, which share everything but the backbone.
    """
    dynamic = model.get_submodule(path)
    samples = _data_samples(model, x)

    def contestant(name: str, kind: str, backbone: nn.Module) -> Contestant:
        def enter() -> None:
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, backbone)
            prepare()

        @torch.inference_mode()
        def run() -> object:
            # Predictions may be written into the samples.
            return model(x, copy.deepcopy(samples), mode=mode)

        return Contestant(name, kind, run, prepare=enter)

    return [
        contestant("static model, eager", "static", twin),
        contestant("las_mm model", "ours", dynamic),
    ]


def _data_samples(model: nn.Module, x: Tensor) -> list | None:
    """What a detector must know about its images; other models predict without."""
    if not any(cls.__module__.startswith("mmdet.") for cls in type(model).__mro__):
        return None
    from mmdet.structures import DetDataSample

    size = tuple(x.shape[-2:])
    meta = dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size)
    return [
        DetDataSample(metainfo=dict(meta, scale_factor=(1.0, 1.0), img_id=i)) for i in range(len(x))
    ]
