"""IterationSeedHook: every random number follows from (seed, rank, iteration)."""

import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from mmengine.dataset import DefaultSampler, worker_init_fn
from mmengine.logging import MMLogger

from las_mm.hooks import IterationSeedHook


def fake_runner(seed: int = 3, **kwargs) -> SimpleNamespace:
    sampler = DefaultSampler(list(range(8)), seed=99)
    loader = SimpleNamespace(
        sampler=sampler,
        batch_sampler=None,
        persistent_workers=kwargs.pop("persistent_workers", False),
        worker_init_fn=partial(worker_init_fn, num_workers=2, rank=0, seed=99),
    )
    logger = MMLogger.get_current_instance()
    return SimpleNamespace(
        seed=seed, iter=0, epoch=0, train_dataloader=loader, logger=logger, **kwargs
    )


def draw() -> tuple:
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_numbers_follow_from_the_iteration():
    hook, runner = IterationSeedHook(), fake_runner()
    drawn = {}
    for runner.iter in (4, 5):
        hook.before_train_iter(runner, 0)
        drawn[runner.iter] = draw()
    runner.iter = 4
    hook.before_train_iter(runner, 0)
    assert draw() == drawn[4] != drawn[5]
    IterationSeedHook(seed=7).before_train_iter(runner, 0)
    assert draw() != drawn[4]


def test_workers_get_another_seed_every_epoch():
    hook, runner = IterationSeedHook(), fake_runner()
    seeds = []
    for runner.epoch in range(3):
        hook.before_train_epoch(runner)
        keywords = runner.train_dataloader.worker_init_fn.keywords
        assert keywords["num_workers"] == 2 and 0 <= keywords["seed"] < 2**31
        seeds.append(keywords["seed"])
    assert len(set(seeds)) == 3
    again = fake_runner()
    again.epoch = 1
    hook.before_train_epoch(again)
    assert again.train_dataloader.worker_init_fn.keywords["seed"] == seeds[1]


def test_sampler_takes_the_seed_of_the_run():
    runner = fake_runner(seed=3)
    IterationSeedHook().before_train(runner)
    assert runner.train_dataloader.sampler.seed == 3


def test_persistent_workers_are_named():
    runner = fake_runner(persistent_workers=True)
    said = []
    runner.logger = SimpleNamespace(warning=said.append)
    IterationSeedHook().before_train(runner)
    assert "persistent_workers=False" in said[0]
