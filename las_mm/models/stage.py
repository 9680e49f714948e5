"""How the features run through a stage on the sparse path."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mmpretrain.models.backbones.resnet import ResLayer
from torch import Tensor, nn

from las_mm import compat
from las_mm.models.block import DynamicBlock
from las_mm.models.coverage import in_format, is_channels_last, shadowed
from las_mm.models.interception import foreign
from las_mm.models.snapshot import has_hooks
from las_mm.network.block import BlockShape, NetworkShape


class Stream:
    """The features on their way from block to block: updated in place, in the ops' own format.

    A block may overwrite its input only where that is the output of another one on the sparse path,
    i.e. of a ReLU, that nobody else reads. Everything that is not a block on the sparse path gets
    the features as dense convolutions would have put them out.

    Args:
        x: The stem's output, (N, C, H, W).
        channels_last: Whether dense convolutions would have put it out so.
        observe: Called with each module that ran, after it.

    Attributes:
        x: The features now.
    """

    def __init__(
        self,
        x: Tensor,
        channels_last: bool,
        observe: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self.x = x
        self._channels_last = channels_last
        self._observe = observe
        self._mine = False
        self._out: Tensor | None = None

    def output(self) -> Tensor:
        """The features as dense convolutions would have put them out, always the same tensor.

        A module that works in place changes what was given out before, as it does without las_mm.
        """
        if self._out is None:
            self._out = in_format(self.x, self._channels_last)
        return self._out

    def run(self, module: nn.Module) -> None:
        """Run a stage, whose input someone else may keep."""
        self._mine = False
        self._run(module)

    def _run(self, module: nn.Module) -> None:
        hidden = compat.is_compiling() and not compat.COMPILE_SEES_MODULES
        known = not has_hooks(module) and (hidden or shadowed(module) is None)
        if known and isinstance(module, DynamicBlock):
            self._run_block(module)
        elif known and type(module) in (ResLayer, nn.Sequential):
            for child in module:
                self._run(child)
            return
        else:
            self._run_dense(module)
        if self._observe is not None:
            self._observe(module)

    def _run_block(self, block: DynamicBlock) -> None:
        # A module before may have put out a tensor with operations of its own.
        known = compat.is_compiling() or foreign(self.x) is None
        executor = block.executor_for(self.x) if known else None
        if executor is None:
            self._run_dense(block)
            return
        self._channels_last |= executor.channels_last
        self.x, self._out = executor(block, self.x, self._mine), None
        # A hook inside may have kept the output.
        kept = block.hooked_inside()
        self._mine = compat.COMPILES_MUTATION if compat.is_compiling() else not kept

    def _run_dense(self, module: nn.Module) -> None:
        self.x, self._out = module(self.output()), None
        if self.x.dim() == 4:
            self._channels_last = is_channels_last(self.x)
        self._mine = False


def block_shapes(
    stages: Sequence[tuple[str, Sequence[DynamicBlock]]], hw: tuple[int, int]
) -> tuple[BlockShape, ...]:
    """The shapes of all blocks in network order.

    Args:
        stages: Name and blocks of each stage.
        hw: Rows and columns of the first block's input.
    """
    shapes: list[BlockShape] = []
    for stage, (name, blocks) in enumerate(stages, start=1):
        for i, block in enumerate(blocks):
            shape = block.describe(f"{name}.{i}", stage, hw)
            shapes.append(shape)
            hw = (shape.h_out, shape.w_out)
    return tuple(shapes)


def check_sizes(shape: NetworkShape, blocks: Sequence[DynamicBlock]) -> None:
    """Raise RuntimeError where the blocks got other sizes than the network's shape says."""
    for block, known in zip(blocks, shape.blocks):
        seen = block.input_hw
        if seen is not None and (int(seen[0]), int(seen[1])) != (known.h_in, known.w_in):
            raise RuntimeError(
                f"{known.name} got features of {int(seen[0])}x{int(seen[1])}, but the stem and "
                f"the blocks before it make {known.h_in}x{known.w_in}: a module between them "
                "changes the size, so that FLOPs and latency cannot be told; use the strides "
                "of the stages instead"
            )
