"""A classifier that learns from the static network it started from."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from mmengine.runner import CheckpointLoader
from mmpretrain.models import ImageClassifier
from torch import Tensor, nn

from las_mm.checkpoints import read_checkpoint
from las_mm.models.initialization import split
from las_mm.models.maskers import is_masker
from las_mm.models.released.conversion import convert
from las_mm.registry import MODELS


@MODELS.register_module()
class DistilledClassifier(ImageClassifier):
    """mmpretrain's ``ImageClassifier`` with a static teacher, for the papers' ImageNet recipe.

    Adds ``loss_distill = weight * T^2 * KL(teacher / T || student / T)`` to the head's loss, the
    mean over the batch, with the logits of the same network computed densely: same backbone, neck
    and head with ``mode='static'``. Its weights also initialise the student, whose maskers start
    mostly on. LASNet (arXiv 2210.06223), section 4.1; ``BudgetHook`` adds the budget's term.

    The teacher takes no gradients, stays in eval mode, and is in no ``state_dict``, optimiser,
    copy (as of an EMA) or list of modules, so that hooks see one dynamic backbone and checkpoints
    hold the student alone. It is built when the first training loss is computed: a model for
    inference has none.

    Args:
        backbone, neck, head: As for ``ImageClassifier``; the backbone is a dynamic one.
        static_checkpoint: Weights of the static network, classifier included: a file, URL or
            ``torchvision://`` name in torchvision's, timm's or mmpretrain's names
            (:func:`~las_mm.models.released.convert`); ``None``: from scratch and without a teacher.
            Where an ``init_cfg`` loads weights, the student starts from these.
        distill_weight: Weight of the term. Defaults to 0.5.
        distill_temperature: T. Defaults to 4.0.
        kwargs: Other arguments of ``ImageClassifier``.

    Raises:
        ValueError: A weight < 0 or temperature <= 0, or a checkpoint of another network.

    Examples:
        >>> model = dict(
        ...     type='las_mm.DistilledClassifier',
        ...     backbone=dict(type='las_mm.LASResNet', depth=50, mode='channel'),
        ...     neck=dict(type='GlobalAveragePooling'),
        ...     head=dict(type='LinearClsHead', num_classes=1000, in_channels=2048,
        ...               loss=dict(type='CrossEntropyLoss')),
        ...     static_checkpoint='torchvision://resnet50')
    """

    def __init__(
        self,
        backbone: dict,
        neck: dict | None = None,
        head: dict | None = None,
        static_checkpoint: str | None = None,
        distill_weight: float = 0.5,
        distill_temperature: float = 4.0,
        **kwargs,
    ) -> None:
        if not distill_weight >= 0:
            raise ValueError(
                f"distill_weight of DistilledClassifier must be >= 0, got {distill_weight!r}"
            )
        if not distill_temperature > 0:
            raise ValueError(
                "distill_temperature of DistilledClassifier must be > 0, got "
                f"{distill_temperature!r}"
            )
        super().__init__(backbone=backbone, neck=neck, head=head, **kwargs)
        self.static_checkpoint = static_checkpoint
        self.distill_weight = distill_weight
        self.distill_temperature = distill_temperature
        self._static: dict = {}
        if static_checkpoint is not None:
            static = {**backbone, "mode": "static", "init_cfg": None}
            self._static = copy.deepcopy(dict(backbone=static, neck=neck, head=head))
        self._teacher: list[ImageClassifier] = []  # a list, so that it is no submodule

    @property
    def teacher(self) -> ImageClassifier | None:
        """The static network, built when first asked for; ``None`` when training from scratch."""
        if self.static_checkpoint is None or self.distill_weight == 0:
            return None
        if not self._teacher:
            # A resumed run builds it in another iteration, and draws the same noise.
            with torch.random.fork_rng(devices=[]):
                teacher = ImageClassifier(**copy.deepcopy(self._static))
                teacher.load_state_dict(self.static_weights())
            like = next(self.parameters())
            self._teacher.append(teacher.requires_grad_(False).eval().to(like.device, like.dtype))
        return self._teacher[0]

    def init_weights(self) -> None:
        """The parent's; then the static weights go into the student."""
        first = not self.is_init
        super().init_weights()
        own = any(split(module.init_cfg)[1] for module in (self, self.backbone))
        if first and not own and self.static_checkpoint is not None:
            self.load_state_dict(self.static_weights(), strict=False)  # only maskers are missing

    def static_weights(self) -> dict[str, Tensor]:
        """What ``static_checkpoint`` holds, under this model's names.

        Raises:
            ValueError: It is not recognised, has no classifier or belongs to another network.
        """
        arch = self._static.get("backbone", {}).get("arch")
        # The heads of a transformer are in no weight.
        settings = dict(arch=dict(arch)) if "num_heads" in (arch or ()) else {}
        weights = read_static(self.static_checkpoint, **settings)
        own = {key: value for key, value in self.state_dict().items() if not is_masker(key)}
        different = sorted(own.keys() ^ weights.keys())
        different += [key for key in own if key in weights and own[key].shape != weights[key].shape]
        if different:
            raise ValueError(
                f"static_checkpoint {self.static_checkpoint} belongs to another network: "
                f"{len(different)} weights differ in name or shape, e.g. {different[0]}"
            )
        return weights

    def loss(self, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        """The head's losses and ``loss_distill``.

        Args:
            inputs: Images (N, 3, H, W).
            data_samples: N samples with labels.
        """
        features = self.extract_feat(inputs)
        losses = self.head.loss(features, data_samples)
        teacher = self.teacher
        if teacher is not None:
            with torch.no_grad():
                wanted = teacher(inputs)
            losses["loss_distill"] = self.distill_weight * distillation(
                self.head(features), wanted, self.distill_temperature
            )
        return losses

    def _apply(self, function, *args, **kwargs) -> nn.Module:
        # To another device or type with the student.
        for teacher in self._teacher:
            teacher._apply(function, *args, **kwargs)
        return super()._apply(function, *args, **kwargs)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_teacher": []}


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), the mean over the batch, float32.

    Args:
        student: Logits (N, classes).
        teacher: Logits (N, classes).
        temperature: T.
    """
    divergence = F.kl_div(
        F.log_softmax(student.float() / temperature, dim=1),
        F.log_softmax(teacher.float() / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return temperature**2 * divergence


def read_static(source: str, **settings: object) -> dict[str, Tensor]:
    """Weights of a static classifier under the names of ``ImageClassifier``.

    Args:
        source: A file, read as data and not as a program, a URL or a ``torchvision://`` name.
        settings: Of :func:`~las_mm.models.released.convert`, for what the weights leave open.

    Raises:
        ValueError: It is not recognised, or has no classifier.
    """
    try:
        if "://" in source:
            checkpoint = CheckpointLoader.load_checkpoint(source, map_location="cpu")
        else:
            checkpoint = read_checkpoint(source)
        found = convert(checkpoint, mode="static", **settings)
    except ValueError as error:
        raise ValueError(f"static_checkpoint {source} cannot be used: {error}") from error
    if found.num_classes is None:
        raise ValueError(
            f"static_checkpoint {source} has no classifier (fc.weight), which the teacher needs"
        )
    return found.weights
