"""Random numbers that follow from (seed, rank, iteration) alone, so that resuming repeats them."""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import torch
from mmengine import dist
from mmengine.hooks import Hook

from las_mm.registry import HOOKS


@HOOKS.register_module()
class IterationSeedHook(Hook):
    """Seeds Python, NumPy and torch before every training iteration, and data workers each epoch.

    mmengine's checkpoints hold no random state, so a resumed run would draw other Gumbel noise,
    other RoI samples and other flips than the uninterrupted one. With this hook all of them are a
    function of (seed, rank, iteration): training resumed from an epoch's checkpoint repeats the
    uninterrupted run exactly. Data workers are seeded once per epoch, so use
    ``persistent_workers=False`` in the train dataloader.

    Args:
        seed: Base seed. Defaults to the runner's (``randomness=dict(seed=...)``, else drawn at
            random and kept in the checkpoint).

    Examples:
        >>> custom_hooks = [dict(type='las_mm.IterationSeedHook')]
    """

    # Before every hook that could draw a number.
    priority = "VERY_HIGH"

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def _key(self, runner, *more: int) -> int:
        seed = runner.seed if self.seed is None else self.seed
        sequence = np.random.SeedSequence([seed, dist.get_rank(), *more])
        return int(sequence.generate_state(1)[0]) >> 1  # room to add a worker id below 2^32

    def before_train(self, runner) -> None:
        loader = runner.train_dataloader
        if getattr(loader, "persistent_workers", False):
            runner.logger.warning(
                "train_dataloader has persistent_workers=True: the augmentation of a resumed "
                "training differs from the uninterrupted one; set persistent_workers=False"
            )
        # The sampler was built before a resumed checkpoint restored the run's own seed.
        samplers = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
        for sampler in samplers:
            if hasattr(sampler, "seed"):
                sampler.seed = runner.seed

    def before_train_epoch(self, runner) -> None:
        loader = runner.train_dataloader
        init_fn = loader.worker_init_fn
        if isinstance(init_fn, partial) and "seed" in init_fn.keywords:
            seed = self._key(runner, runner.epoch, 1)
            loader.worker_init_fn = partial(init_fn.func, **{**init_fn.keywords, "seed": seed})
        seed_all(self._key(runner, runner.epoch, 2))  # for loading in this process

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        seed_all(self._key(runner, runner.iter))


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators on all devices."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
