"""Reading checkpoints in the format of the authors' released code."""

from __future__ import annotations

from torch import Tensor


def convert_lasnet_resnet(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Key names of a released LASNet-ResNet checkpoint -> those of :class:`LASResNet`.

    Convolutions and norms carry torchvision's names in both; a released masker's 1x1 convolution
    is called ``conv2``, ours ``conv``. The classifier (``fc.*``) is kept as it is.

    Args:
        weights: The released ``state_dict``, with or without DDP's ``module.`` prefix.

    Returns:
        The same tensors under our names.
    """
    return {
        key.removeprefix("module.").replace(".masker.conv2.", ".masker.conv."): value
        for key, value in weights.items()
    }
