"""Whether a module still is what something was derived from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Snapshot:
    """Notices when something that a fast form was made from has changed since.

    Args:
        module: The module in training form.
        names: Only these children of it; by default all.
    """

    def __init__(self, module: nn.Module, names: Sequence[str] | None = None) -> None:
        children = {
            name: child
            for name, child in module._modules.items()
            if child is not None and (names is None or name in names)
        }
        inside = [sub for child in children.values() for sub in child.modules()]
        stores = [(module._modules, name, child) for name, child in children.items()]
        for sub in inside:
            stores += [(sub._modules, name, child) for name, child in sub._modules.items()]
            stores += [(sub._parameters, name, p) for name, p in sub._parameters.items()]
            stores += [
                (sub._buffers, name, b)
                for name, b in sub._buffers.items()
                if name != "num_batches_tracked"
            ]
            stores.append((sub.__dict__, "training", sub.training))
        # With the version where there is one: tensors made in inference mode do not count theirs.
        self._stores = [
            (
                store,
                name,
                value,
                value._version if isinstance(value, Tensor) and not value.is_inference() else None,
            )
            for store, name, value in stores
        ]
        # A hook inside wants to see the training form's tensors.
        self._hooks = [
            hooks for sub in inside for hooks in (sub._forward_hooks, sub._forward_pre_hooks)
        ]

    def hooked(self) -> bool:
        """Whether a module inside has forward hooks, which only the training form calls."""
        return any(self._hooks)

    def stale(self) -> bool:
        """Whether a module, parameter or buffer was replaced, written to or switched to training.

        Writing through ``parameter.data`` is invisible here; ``.train()`` and ``.eval()``, which
        surround it in practice, drop the fast form.
        """
        # A plain loop: this runs for every block of every image.
        for store, name, value, version in self._stores:
            if store.get(name) is not value or (version is not None and value._version != version):
                return True
        return False


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its ``forward``."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
