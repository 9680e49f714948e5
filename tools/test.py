#!/usr/bin/env python
"""Evaluate a checkpoint: python tools/test.py configs/mask_rcnn_lasnet_r101.py epoch_12.pth

Also prints activation rate, FLOPs ratio and predicted latency per stage over the test set.
"""

from __future__ import annotations

import argparse
import os
import os.path as osp

from mmengine.runner import Runner

from las_mm import preflight
from las_mm.checkpoints import check_checkpoint
from las_mm.cli.parser import Parser, add_cfg_options, add_trust
from las_mm.configs import build_model, hook_name, load_config, reset_scope
from las_mm.errors import UserError, told
from las_mm.models.finding import find_dynamic_backbones
from las_mm.tta import use_tta


def parse_args() -> argparse.Namespace:
    parser = Parser(prog="test.py", description="Test a model")
    parser.add_argument("config", help="config file")
    parser.add_argument("checkpoint", help="checkpoint file")
    parser.add_argument("--work-dir", help="folder for logs and metrics")
    parser.add_argument("--out", help="write the predictions to this .pkl file")
    parser.add_argument(
        "--show-dir",
        help="write a picture per image, detections beside the mask heat map, to this folder",
    )
    parser.add_argument(
        "--device", help="device of the latency prediction: a shipped name or a file"
    )
    parser.add_argument(
        "--tta",
        action="store_true",
        help="test-time augmentation, by the config's tta_model and tta_pipeline or with flips",
    )
    parser.add_argument(
        "--module", help="the dynamic backbone, where a model has several: e.g. teacher.backbone"
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
    if args.out is not None and not args.out.endswith((".pkl", ".pickle")):
        raise UserError(f"--out must end in .pkl, got {args.out}")
    cfg = load_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    stem = osp.splitext(osp.basename(args.config))[0]
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or osp.join("work_dirs", stem)
    cfg.load_from, cfg.resume = args.checkpoint, False

    preflight.check_data(cfg, ("test_dataloader",))
    preflight.check_visualizer(cfg)
    # The checkpoint replaces all weights: fetching initial ones would be for nothing.
    cfg.model.get("backbone", {}).pop("init_cfg", None)
    model = build_model(cfg)
    preflight.check_classes(cfg, model, ("test_dataloader",))
    hooks = list(cfg.get("custom_hooks") or [])
    if find_dynamic_backbones(model):
        latency = dict(type="las_mm.PredictedLatencyHook")
        for hook in list(hooks):
            if hook_name(hook) == latency["type"]:
                hooks.remove(hook)
                latency = dict(hook)
        if args.device is not None:
            latency["device"] = args.device
        if args.module is not None:
            latency.update(module=args.module, val_module=args.module)
        hooks.append(latency)
        if args.show_dir is not None:
            folder = osp.abspath(args.show_dir)
            masks = dict(type="las_mm.MaskVisualizationHook", out_dir=folder)
            hooks.append({**masks, "module": latency.get("val_module") or latency.get("module")})
    elif args.show_dir is not None:
        raise UserError(
            f"--show-dir draws masks, and the model of {args.config} has no dynamic backbone"
        )
    cfg.custom_hooks = hooks
    preflight.check_hooks(cfg, model)
    check_checkpoint(model, args.checkpoint, args.trust_checkpoint)
    if args.out is not None:
        evaluators = cfg.test_evaluator
        evaluators = evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]
        dump = dict(type="DumpResults", out_file_path=args.out)
        cfg.test_evaluator = [*evaluators, dump]
    if args.tta:
        use_tta(cfg, model)
    preflight.prepare_device(cfg)
    reset_scope()
    return cfg


def main() -> None:
    with told("test.py"):
        cfg = configure(parse_args())
    Runner.from_cfg(cfg).test()


if __name__ == "__main__":
    main()
