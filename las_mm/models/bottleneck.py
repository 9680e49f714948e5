"""One residual block that computes only where its masker says so."""

from __future__ import annotations

import math

import torch
from mmpretrain.models.backbones.resnet import Bottleneck
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from las_mm import ops
from las_mm.models import sparse
from las_mm.models.activation import Activation
from las_mm.models.maskers import SpatialMasker, dilate_mask, expand_mask
from las_mm.models.snapshot import Snapshot

MODES = ("static", "spatial", "layer")


class DynamicBottleneck(Bottleneck):
    """mmpretrain's ``Bottleneck`` with a masker; equation 1 of LASNet (arXiv 2210.06223).

    What changes against the parent: positions that the masker drops take the value of the
    shortcut. The parameters of the convolutions and norms keep their names, so static checkpoints
    load. ``forward`` returns only the features; what was skipped is left in :attr:`activation`.

    Args:
        mode: ``'static'`` (the parent, no masker), ``'spatial'`` (one decision per patch and
            image) or ``'layer'`` (one decision per image).
        granularity: Side S of a patch in output pixels; read in spatial mode only.
        kwargs: Arguments of the parent.
    """

    def __init__(self, *args, mode: str = "spatial", granularity: int = 1, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.mode = mode
        self.granularity = granularity
        self.masker = None if mode == "static" else SpatialMasker(self.in_channels)
        self.activation: Activation | None = None
        self.no_fast_form: str | None = None
        self._fast: sparse.FastBottleneck | None = None
        self._snapshot: Snapshot | None = None
        self._settings: tuple | None = None

    squeeze_channels = 0  # of squeeze-and-excitation after conv2, see LASRegNet

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, ceil(H/stride), ceil(W/stride))."""
        if not self.training and sparse.wanted(x):
            return self.infer(x)
        return self._forward(x)

    def infer(self, x: Tensor, in_place: bool = False) -> Tensor:
        """``forward`` in eval mode without gradients: the fast form where there is one.

        Args:
            x: (N, C_in, H, W).
            in_place: Whether ``x`` is the output of a ReLU that nobody else reads, so that it may
                be overwritten.
        """
        fast = self.prepare()
        if fast is None or x.dtype != fast.weights[0].dtype:
            return self._forward(x)
        return fast(self, x, in_place)

    def prepare(self) -> sparse.FastBottleneck | None:
        """Fold and pack the weights unless that is done; ``None`` if only the training form runs.

        Raises:
            RuntimeError: Inside ``torch.compile`` or ``torch.export`` before the first call.
        """
        if torch.compiler.is_compiling():
            if self._snapshot is None:
                raise RuntimeError(sparse.PREPARE_FIRST)
            return self._fast
        settings = (self.mode, self.granularity, self.masker)
        if self._snapshot is None or settings != self._settings or self._snapshot.stale():
            self._settings = settings
            try:
                self._fast = sparse.FastBottleneck.of(self)
                self.no_fast_form = None
            except sparse.Unsupported as reason:
                self._fast = None
                self.no_fast_form = str(reason)
            self._snapshot = Snapshot(self)
        return None if self._snapshot.hooked() else self._fast

    def hooked_inside(self) -> bool:
        """Whether a module of this block has forward hooks, which may keep what they are given."""
        return self._snapshot is not None and self._snapshot.hooked()

    def train(self, mode: bool = True) -> DynamicBottleneck:
        """The parent's; the fast form is made anew, as weights may be swapped in between."""
        self._fast = self._snapshot = None
        return super().train(mode)

    def _forward(self, x: Tensor) -> Tensor:
        mask = None
        if self.masker is None:
            self.activation = Activation.full(x)
        else:
            # Outside the checkpointed part: noise is drawn once and the activation has its graph.
            mask = self._decide(x)
        if self.with_cp and torch.is_grad_enabled() and x.requires_grad:
            return checkpoint(self._compute, x, mask, use_reentrant=False)
        return self._compute(x, mask)

    def _decide(self, x: Tensor) -> Tensor:
        """Run the masker, leave the activation, return the mask broadcastable to the output."""
        conv1_hw = tuple(-(-n // self.conv1_stride) for n in x.shape[-2:])
        out_hw = tuple(-(-n // self.stride) for n in x.shape[-2:])
        if self.mode == "layer":
            mask = self.masker(x, None)
            rate = rate_dilated = mask.mean()
            coarse = mask
        else:
            coarse = self.masker(x, self.granularity * self.stride)
            mask = expand_mask(coarse, self.granularity, out_hw)
            # Tracing (mmdet's FLOPs counters) records sizes as tensors, which the op cannot take.
            if coarse.requires_grad or torch.jit.is_tracing():
                rate = mask.mean()
                halo = dilate_mask(mask, conv1_hw, self.conv2_stride, self.dilation)
                rate_dilated = halo.mean()
            else:
                _, counts = ops.dilate_mask(
                    coarse, self.granularity, conv1_hw, self.conv2_stride, self.dilation
                )
                areas = counts.new_tensor([math.prod(out_hw), math.prod(conv1_hw)])
                rate, rate_dilated = (counts / areas).mean(dim=0)
        self.activation = Activation(
            rate=rate,
            rate_dilated=rate_dilated,
            rate_channel=torch.ones_like(rate),
            mask=coarse.detach(),
        )
        return mask

    def _compute(self, x: Tensor, mask: Tensor | None) -> Tensor:
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.excite(self.relu(self.norm2(self.conv2(out))), mask)
        out = self.drop_path(self.norm3(self.conv3(out)))
        identity = x if self.downsample is None else self.downsample(x)
        if mask is None:
            out = out + identity
        else:
            # One pass for "times mask, plus identity".
            out = torch.addcmul(identity, out, mask.to(out.dtype))
        return self.relu(out)

    def excite(self, out: Tensor, mask: Tensor | None) -> Tensor:
        """What a subclass does to conv2's output before conv3 reads it, see ``LASRegNet``."""
        return out

    def __getstate__(self) -> dict:
        # Copies and pickles start without a record: it may hold the graph of a training step.
        # Packed weights are derived.
        return {
            **self.__dict__,
            "activation": None,
            "_fast": None,
            "_snapshot": None,
            "_settings": None,
        }

    def _apply(self, *args, **kwargs) -> DynamicBottleneck:
        self._fast = self._snapshot = None  # .to() may swap the data of a parameter in place
        return super()._apply(*args, **kwargs)

    def extra_repr(self) -> str:
        patch = f", S={self.granularity}" if self.mode == "spatial" else ""
        return f"mode={self.mode}{patch}"
