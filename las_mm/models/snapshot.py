"""Whether a module still is what something was derived from."""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from las_mm import compat, ops
from las_mm.models.coverage import unknown_bases
from las_mm.ops.library import LIBRARY

# What maskers have that is read each time, or not in eval mode.
_FREE = dict(offset=None, temperature=None, noise=None, keep_bias=None)
# What of a tensor can be changed through .data without any of the values in memory.
_LAYOUT: tuple[Callable[[Tensor], object], ...] = (
    Tensor.data_ptr,
    Tensor.size,
    Tensor.stride,
    Tensor.dtype.__get__,
)


def _is_read(name: str) -> bool:
    """Whether the sparse path reads the own tensors of a child of this name: it is a masker."""
    return name.startswith("masker")


class Snapshot:
    """Notices when something that a sparse path was made from has changed since.

    Args:
        module: The module in masked-dense path.
        names: Only these children of it; by default all.
        packed: Whether there are packed weights whose sources' contents have to be compared.
    """

    def __init__(
        self, module: nn.Module, names: Sequence[str] | None = None, packed: bool = True
    ) -> None:
        children = {
            name: child for name, child in module._modules.items() if names is None or name in names
        }
        present = [child for child in children.values() if child is not None]
        # What a ScriptModule holds is no dict; a module that has one inside is never packed.
        inside = [
            sub
            for child in present
            for sub in child.modules()
            if not isinstance(sub, torch.jit.ScriptModule)
        ]
        self._own, self._children = module._modules, children
        stores = (s for sub in inside for s in (sub._modules, sub._parameters, sub._buffers))
        self._stores = [store for store in stores if store]
        # Referred to, so that no other object can take their place under the same id.
        self._values = self._present()
        self._ids = [*map(id, self._values)]
        # Of tensors made in inference mode torch counts no writes; training batches are no weight.
        self._versions = [
            (value, value._version)
            for store in self._stores
            for name, value in store.items()
            if isinstance(value, Tensor)
            and not value.is_inference()
            and name != "num_batches_tracked"
        ]
        self._tensors = [
            value for store in self._stores for value in store.values() if _laid_out(value)
        ]
        self._layouts = self._laid()
        # Methods that are given to subclasses of known classes later.
        self._classes = [
            (vars(cls), dict(vars(cls)))
            for cls in {cls for sub in (module, *inside) for cls in unknown_bases(type(sub))}
        ]
        self._kinds = [(sub, type(sub), len(sub._modules)) for sub in (module, *inside)]
        # Settings, the mode, methods put over those of the class. What maskers hold beside layers
        # is read each time.
        maskers = [m for name, m in children.items() if m is not None and _is_read(name)]
        self._attributes = [
            (sub.__dict__, dict(sub.__dict__)) for sub in inside if sub not in maskers
        ]
        self._maskers = [
            (masker.__dict__, {**masker.__dict__, **_FREE})
            for masker in maskers
            if not isinstance(masker, torch.jit.ScriptModule)
        ]
        # A hook inside wants to see the masked-dense path's tensors.
        self._hooks = [
            hooks for sub in inside for hooks in (sub._forward_hooks, sub._forward_pre_hooks)
        ]
        self._module = type(module).__name__
        self._sources = sources(module, names) if packed else []
        self._samples: _Samples | None = None
        self._turn = 0
        self.expected: Tensor | None = None  # what ops.unchanged compares the sources with
        if not self._sources:
            return
        if ops.has_fingerprint(self._sources[0].device.type):
            self._fingerprints = ops.fingerprints(self._sources)
            self.expected = torch.tensor(self._fingerprints, device="cpu")
        else:
            self._fingerprints = [*ops.fingerprint(self._sources)]
            self._samples = _Samples(self._sources)
            self.expected = torch.cat([ops.sample_view(source) for source in self._sources])

    def _present(self) -> list[object]:
        """Every module, parameter and buffer that is there now, in a fixed order."""
        own = map(self._own.get, self._children)
        return [*own, *itertools.chain.from_iterable(map(dict.values, self._stores))]

    def _laid(self) -> list[object]:
        """Memory, shapes, strides and dtypes of all tensors, in C for speed."""
        return [value for read in _LAYOUT for value in map(read, self._tensors)]

    def hooked(self) -> bool:
        """Whether a module inside has forward hooks, which only the masked-dense path calls."""
        return any(self._hooks)

    def stale(self, positions: int | None = None) -> bool:
        """Whether a module, parameter, buffer or setting was replaced, written to or switched.

        Args:
            positions: Of the outputs that the packed weights are about to be used for: for few,
                only a part of the sources' contents is compared, which matters for what torch
                does not count (writes through ``.data``, to a numpy view, to tensors made in
                inference mode). A write to all of a tensor is noticed at once even so, one to
                few values of a large tensor after ``ops.PARTS`` calls at the latest, with a
                warning. On a GPU only samples are compared. By default everything is.
        """
        # This runs for every block of every image.
        if [*map(id, self._present())] != self._ids:
            return True
        for tensor, version in self._versions:
            if tensor._version != version:
                return True
        for sub, cls, children in self._kinds:
            if type(sub) is not cls or len(sub._modules) != children:
                return True
        try:
            if self._laid() != self._layouts:
                return True
            for now, before in self._maskers:
                if {**now, **_FREE} != before:
                    return True
            for namespace, before in self._classes:
                if namespace != before:
                    return True
            for now, before in self._attributes:
                if now != before:
                    return True
        except Exception:  # a tensor or an array was put in the place of another, or has no memory
            return True
        if not self._sources or _capturing(self._sources[0]):
            return False
        known = self._fingerprints
        if positions is not None and self._samples is not None:
            return not _together.done and changed([self], 0)
        if positions is None or positions >= ops.MANY_POSITIONS:
            return ops.fingerprint(self._sources) != (known[0], known[1])
        self._turn = part = (self._turn + 1) % ops.PARTS
        samples, values = ops.fingerprint(self._sources, part, ops.PARTS)
        if samples == known[0] and values != known[2 + part]:
            print_log(
                f"las_mm: a few values of a {self._module}'s weights were written where torch "
                "does not count it (.data, a numpy view); they are packed anew now, but some "
                "images before this one may have been computed with the old ones. After such a "
                "write call las_mm.prepare(model)",
                logger="current",
                level=logging.WARNING,
            )
        return (samples, values) != (known[0], known[2 + part])


def _laid_out(value: object) -> bool:
    """Whether ``value`` is a tensor with memory and strides."""
    if not isinstance(value, Tensor):
        return False
    try:
        return all(read(value) is not None for read in _LAYOUT)
    except Exception:  # of another layout or back end; its module is not packed
        return False


class _Samples:
    """Samples of tensors on a device whose memory is not read without waiting for it.

    Attributes:
        large, small: Views into the tensors of several and of one dimension.
        of_large, of_small: What they held.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.large = [ops.sample_view(tensor) for tensor in tensors if tensor.dim() > 1]
        self.small = [ops.sample_view(tensor) for tensor in tensors if tensor.dim() <= 1]
        self.of_large, self.of_small = (
            torch.cat(views) if views else tensors[0].new_empty(0, dtype=torch.int32)
            for views in (self.large, self.small)
        )


def changed(snapshots: Sequence[Snapshot], turn: int) -> bool:
    """Whether sampled contents differ, on a GPU, which is waited for once.

    Args:
        snapshots: Of all parts of a network.
        turn: Counts the calls: the norms and biases of one of ``snapshots`` are compared each
            time, weights of convolutions always.
    """
    every = [s._samples for s in snapshots if s._samples is not None]
    if not every:
        return False
    one = every[turn % len(every)]
    now = torch.cat([view for samples in every for view in samples.large] + one.small)
    return not torch.equal(now, torch.cat([*(s.of_large for s in every), one.of_small]))


class _Together(threading.local):
    """Whether a network has compared the contents of all its parts, for the current thread."""

    done = False


_together = _Together()


@contextmanager
def compared_together() -> Iterator[None]:
    """Parts do not compare sampled contents meanwhile: :func:`changed` has, for all at once."""
    before, _together.done = _together.done, True
    try:
        yield
    finally:
        _together.done = before


def sources(module: nn.Module, names: Sequence[str] | None = None) -> list[Tensor]:
    """The tensors that the packed weights of ``module`` were made from, now, in a fixed order.

    Args:
        module: The module in masked-dense path.
        names: Only these children of it; by default all.
    """
    found = []
    for name, child in module.named_children():
        if _is_read(name) or (names is not None and name not in names):
            continue
        found += list(child.parameters())
        found += [b for key, b in child.named_buffers() if not key.endswith("num_batches_tracked")]
    return found


def _capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, which cannot wait for a comparison."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its ``forward``."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


# In a compiled program ---------------------------------------------------------------------------

AGAIN = "again" if compat.COMPILE_SEES_MODULES else "and torch.compile again"
_keys = itertools.count()
_watched: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()


def watch(module: nn.Module, key: str | None = None) -> str:
    """A key of ``module``, whose ``stale(positions)`` compiled programs ask by it.

    Args:
        module: A module whose weights have just been packed.
        key: The one it had; kept where compiled programs take the new weights by themselves.
    """
    if key is not None:
        if compat.COMPILE_SEES_MODULES:
            return key
        _watched.pop(key, None)
    key = str(next(_keys))
    _watched[key] = module
    return key


LIBRARY.define("follows(Tensor value, str key, SymInt positions) -> Tensor")


def _follows(value: Tensor, key: str, positions: int) -> Tensor:
    module = _watched.get(key)
    stale: Callable[[int], bool] | None = getattr(module, "stale", None)
    if stale is None or stale(positions):
        raise RuntimeError(
            "the model's weights or modules have changed since they were packed, and what "
            f"torch.compile made does not follow by itself: call las_mm.prepare(model) {AGAIN}"
        )
    return value.clone()


LIBRARY.impl("follows", _follows, "CompositeExplicitAutograd")


@compat.register_fake("las_mm::follows", lib=LIBRARY)
def _follows_fake(value: Tensor, key: str, positions: int) -> Tensor:
    return torch.empty_like(value)


def checked(
    value: Tensor,
    module: nn.Module,
    snapshot: Snapshot,
    key: str,
    positions: int,
    names: Sequence[str] | None = None,
) -> Tensor:
    """``value``, through an op that raises where a compiled or exported program is out of date.

    What uses the result cannot run without the check.

    Args:
        value: A small tensor.
        module, names: As for :class:`Snapshot`.
        snapshot: Taken when ``value`` was derived.
        key: See :func:`watch`.
        positions: See :meth:`Snapshot.stale`.
    """
    if not (compat.EXPORTS and compat.is_exporting()):
        return torch.ops.las_mm.follows(value, key, positions)
    if snapshot.expected is None:
        return value
    # There the modules are gone, but not their tensors, and not everyone's Python.
    return ops.unchanged(value, sources(module, names), snapshot.expected, positions)
