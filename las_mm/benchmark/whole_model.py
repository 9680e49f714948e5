"""The whole model, head included, with its static and with its dynamic backbone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from las_mm.benchmark.contest import Contestant
from las_mm.errors import UserError


def build_whole(
    model: nn.Module,
    path: str,
    twin: nn.Module,
    x: Tensor,
    prepare: Callable[[], None],
    mode: str,
) -> list[Contestant]:
    """The whole model from a normalised batch to predictions, static and dynamic backbone.

    Both backbones do their work, and what follows gets the dynamic one's feature maps in either
    case: how long it takes depends on the boxes that it finds, which are so the same.

    Args:
        model: A detector, classifier, ... in eval mode.
        path: Module name of its backbone.
        twin: The static backbone in eager mode.
        x: (N, 3, H, W), float32.
        prepare: Sets the masks of the dynamic backbone.
        mode: ``'predict'``, or ``'tensor'``, which leaves out the post-processing: that of random
            weights has no box above the score threshold, so that nothing would follow.

    Returns:
        The static model and the dynamic one, which share everything but the backbone.
    """
    dynamic = model.get_submodule(path)
    samples = _data_samples(model, x)
    prepare()
    with torch.no_grad():  # inference mode counts no writes
        features = dynamic(x)

    def contestant(name: str, kind: str, backbone: nn.Module) -> Contestant:
        instead = _Instead(backbone, features)

        def enter() -> None:
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, instead)
            prepare()
            instead.check()

        @torch.inference_mode()
        def run() -> object:
            # Predictions may be written into the samples.
            return model(x, copy.deepcopy(samples), mode=mode)

        return Contestant(name, kind, run, prepare=enter)

    return [
        contestant("static model, eager", "static", twin),
        contestant("las_mm model", "ours", dynamic),
    ]


class _Instead(nn.Module):
    """A backbone that does its work and puts out other feature maps."""

    def __init__(self, backbone: nn.Module, features: object) -> None:
        super().__init__()
        self.backbone, self.features = backbone, features
        maps = features if isinstance(features, (list, tuple)) else (features,)
        self.versions = [(tensor, tensor._version) for tensor in maps]

    def forward(self, x: Tensor) -> object:
        self.backbone(x)
        return self.features

    def check(self) -> None:
        """Raise UserError if what follows has written to the maps, which are used again."""
        if any(tensor._version != version for tensor, version in self.versions):
            raise UserError(
                "--whole-model: the model writes to its backbone's feature maps, so that its two "
                "forms cannot be given the same ones; leave the option out"
            )


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
