#!/usr/bin/env python
"""Train a model: python tools/train.py configs/mask_rcnn_lasnet_r101.py"""

from __future__ import annotations

import argparse
import os
import os.path as osp

from mmengine.runner import Runner

from las_mm import preflight
from las_mm.cli.parser import Parser, add_cfg_options, add_trust
from las_mm.configs import build_model, load_config, reset_scope
from las_mm.errors import UserError, told


def parse_args() -> argparse.Namespace:
    parser = Parser(prog="train.py", description="Train a model")
    parser.add_argument("config", help="config file, e.g. configs/mask_rcnn_lasnet_r101.py")
    parser.add_argument("--work-dir", help="folder for logs and checkpoints")
    parser.add_argument("--amp", action="store_true", help="mixed precision (needs a GPU)")
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate with the total batch size",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        help="continue from this checkpoint, or without a value from the work folder's last one",
    )
    add_trust(parser)
    add_cfg_options(parser)
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    return args


def configure(args: argparse.Namespace):
    """The config with the command line applied, checked before any work starts."""
    cfg = load_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    stem = osp.splitext(osp.basename(args.config))[0]
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or osp.join("work_dirs", stem)
    if args.amp:
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.setdefault("loss_scale", "dynamic")
    if args.auto_scale_lr:
        if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
            raise UserError(
                f"--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in {args.config}"
            )
        cfg.auto_scale_lr.enable = True
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == "auto" else args.resume

    loaders = ("train_dataloader", "val_dataloader")
    preflight.check_data(cfg, loaders)
    preflight.check_visualizer(cfg)
    model = build_model(cfg)
    preflight.check_classes(cfg, model, loaders)
    preflight.check_hooks(cfg, model)
    if preflight.check_resume(cfg, model, args.trust_checkpoint):
        # The checkpoint replaces all weights: the runner must not fetch initial ones first.
        cfg.model.get("backbone", {}).pop("init_cfg", None)
    else:
        preflight.check_pretrained(cfg, model)
    preflight.prepare_device(cfg)
    reset_scope()
    return cfg


def main() -> None:
    with told("train.py"):
        cfg = configure(parse_args())
    Runner.from_cfg(cfg).train()


if __name__ == "__main__":
    main()
