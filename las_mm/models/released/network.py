"""A released network as a whole: our backbone, the classifier, and how the authors count FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from las_mm.checkpoints import read_checkpoint
from las_mm.models.activation import NetworkActivation
from las_mm.models.finding import collect_activations
from las_mm.models.flops import flops_report
from las_mm.models.released.conversion import HEAD, convert
from las_mm.models.released.specification import backbone_config, num_classes
from las_mm.models.released.transformer import T2T
from las_mm.registry import MODELS


class ReleasedNetwork(nn.Module):
    """Backbone, global average pooling (but of a T2T-ViT) and a linear classifier.

    Args:
        backbone: Config of a dynamic backbone.
        classes: Outputs of the classifier.

    Examples:
        >>> from las_mm.models import released
        >>> net = released.load("checkpoint.pth", spec)  # doctest: +SKIP
        >>> logits, features = net(images)  # doctest: +SKIP
        >>> net.flops_percentages(), net.total_macs()  # doctest: +SKIP
    """

    def __init__(self, backbone: dict, classes: int = 1000) -> None:
        super().__init__()
        arguments = {"out_indices": (0, 1, 2, 3), **backbone}
        self._pools = arguments["type"] != T2T
        if not self._pools:
            arguments["out_indices"] = -1
        self.backbone = MODELS.get(arguments.pop("type"))(**arguments)
        self.fc = nn.Linear(self.backbone.channels, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Images (N, 3, H, W) -> (logits (N, classes), the four stages' feature maps).

        Of a T2T-ViT the features are one: the class token behind the last norm, (N, C).
        """
        features = self.backbone(images)
        last = features[-1].mean(dim=(2, 3)) if self._pools else features[-1]
        return self.fc(last), features

    def activation(self) -> NetworkActivation:
        """What the blocks did in the last forward pass."""
        return collect_activations(self)

    def flops_percentages(self) -> Tensor:
        """Dynamic over dense multiply-accumulates of each block, as the authors count them."""
        return flops_report(self.activation(), counting="released").block_ratios

    def total_macs(self, counting: str = "released") -> Tensor:
        """Multiply-accumulates per image of the last forward pass, shape ().

        Stem, blocks, global pooling (1 per value that it puts out) and classifier.

        Args:
            counting: See :func:`~las_mm.models.flops.flops_report`.
        """
        backbone = flops_report(self.activation(), counting=counting).dynamic
        pooling = self.fc.in_features if self._pools else 0
        return backbone + pooling + self.fc.weight.numel()


def build(spec: dict) -> ReleasedNetwork:
    """The network of a specification, freshly initialised, in training mode.

    Args:
        spec: See :mod:`las_mm.models.released.specification`.

    Raises:
        ValueError: The specification is wrong.
    """
    return ReleasedNetwork(backbone_config(spec), num_classes(spec))


def load(
    checkpoint: str | Path | Mapping, spec: dict | None = None, **settings: object
) -> ReleasedNetwork:
    """A released network with its weights, in eval mode.

    Args:
        checkpoint: A file, read as data and not as a program, or what it holds.
        spec: The network's specification; without it, see
            :func:`~las_mm.models.released.conversion.convert`.
        settings: Arguments of ``convert`` for what the keys leave open.

    Raises:
        ValueError: See ``convert``; or there is no classifier, or the file is no checkpoint.
    """
    if not isinstance(checkpoint, Mapping):
        checkpoint = read_checkpoint(checkpoint)
    found = convert(checkpoint, spec, **settings)
    if found.num_classes is None:
        raise ValueError("the checkpoint has no classifier (fc.weight, head.fc.weight)")
    net = ReleasedNetwork(found.backbone, found.num_classes)
    weights = {key.removeprefix(HEAD): value for key, value in found.weights.items()}
    net.load_state_dict(weights, strict=not found.missing)  # convert has compared all names
    return net.eval()
