#!/usr/bin/env python
"""Time training steps of two configs alternately, e.g. a dynamic network and its static twin.

python dev/compare_training.py configs/mask_rcnn_lasnet_r101.py configs/mask_rcnn_resnet_r101.py

Both see the same batches, in turns, in one process; medians and their ratio are printed. With
PredictedLatencyHook in the first config, its share of the step is measured too.
"""

from __future__ import annotations

import statistics
import time

from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner
from rich.progress import track

from las_mm import preflight
from las_mm.cli.parser import Parser, add_cfg_options
from las_mm.configs import build_model, load_config
from las_mm.errors import told
from las_mm.hooks import BudgetHook, PredictedLatencyHook
from las_mm.models.finding import collect_activations, find_dynamic_backbones
from las_mm.registry import HOOKS


class Contestant:
    """A model in training mode with the optimiser and budget hook of its config."""

    def __init__(self, config: str, options: dict) -> None:
        self.cfg = load_config(config, options)
        preflight.check_data(self.cfg, ("train_dataloader",))
        self.model = build_model(self.cfg)
        preflight.check_hooks(self.cfg, self.model)
        preflight.check_pretrained(self.cfg, self.model)
        self.model.init_weights()
        self.model.train()
        self.optimiser = build_optim_wrapper(self.model, self.cfg.optim_wrapper)
        self.latency: PredictedLatencyHook | None = None
        for hook in self.cfg.get("custom_hooks") or []:
            built = HOOKS.build(dict(hook))
            if isinstance(built, BudgetHook):
                built.attach(self.model)
            if isinstance(built, PredictedLatencyHook):
                self.latency = built
        self.seconds: list[float] = []
        self.latency_seconds: list[float] = []

    def step(self, batch: dict) -> None:
        """One timed training step, and apart from it one timed latency prediction."""
        start = time.perf_counter()
        self.model.train_step(batch, self.optimiser)
        self.seconds.append(time.perf_counter() - start)
        if self.latency is not None and find_dynamic_backbones(self.model):
            start = time.perf_counter()
            self.latency.predict(collect_activations(self.model).detach())
            self.latency_seconds.append(time.perf_counter() - start)


def main() -> None:
    parser = Parser(prog="compare_training.py", description=__doc__)
    parser.add_argument("config", help="config of the first contestant")
    parser.add_argument("twin", help="config of the second contestant, whose data both use")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each")
    add_cfg_options(parser)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    # The initialisation of every layer is not what one came to see.
    MMLogger.get_instance("mmengine", log_level="WARNING")
    with told("compare_training.py"):
        first, second = (Contestant(c, args.cfg_options) for c in (args.config, args.twin))
    loader = Runner.build_dataloader(second.cfg.train_dataloader, seed=0)
    batches = []
    while len(batches) < args.rounds + 1:  # one more to warm up
        for batch in loader:
            batches.append(batch)
            if len(batches) == args.rounds + 1:
                break
    for i, batch in enumerate(track(batches, description="steps")):
        # Whoever starts has the colder caches: take turns.
        for contestant in (first, second) if i % 2 else (second, first):
            contestant.step(batch)
    for name, contestant in ((args.config, first), (args.twin, second)):
        times = contestant.seconds[1:]
        print(f"{name}: median {statistics.median(times):.3f} s, min {min(times):.3f} s per step")
    ratio = statistics.median(first.seconds[1:]) / statistics.median(second.seconds[1:])
    paired = statistics.median(a / b for a, b in zip(first.seconds[1:], second.seconds[1:]))
    print(f"ratio of medians {ratio:.3f}, median of paired ratios {paired:.3f}")
    if first.latency_seconds:
        # The first call at a new input size builds the table: count it, as training does.
        mean = statistics.mean(first.latency_seconds)
        share = mean / first.latency.interval / statistics.median(first.seconds[1:])
        print(
            f"latency prediction: mean {mean * 1e3:.2f} ms a call, every "
            f"{first.latency.interval} steps: {share:.4%} of a step"
        )


if __name__ == "__main__":
    main()
