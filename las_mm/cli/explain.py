"""Print what each block of a config's backbone did with an image, and how long it took.

las_mm explain configs/mask_rcnn_lasnet_r101.py photo.jpg --checkpoint epoch_12.pth
las_mm explain configs/mask_rcnn_lasnet_r101.py --shape 800 1344

Per block: S, rates, the form that ran and what decided it, predicted and measured milliseconds.
Without --checkpoint weights are random, without an image the input is noise: then the rates say
nothing, the forms and times still do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from mmengine.model import revert_sync_batchnorm

from las_mm.benchmark.subject import DTYPES
from las_mm.checkpoints import load_weights
from las_mm.cli.output import Output
from las_mm.cli.parser import add_cfg_options, add_trust, check_size
from las_mm.configs import build_model, load_config, usual_size
from las_mm.drawn_masks import load_images
from las_mm.errors import UserError, as_user_errors
from las_mm.explanation import explain
from las_mm.models.finding import find_dynamic_backbone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add = parser.add_argument
    add("config", help="a config with a dynamic backbone")
    add("image", nargs="?", type=Path, help="an image; without, noise")
    add("--checkpoint", help="weights; without, they are random")
    add(
        "--shape",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="to resize to; default: 224 224 for mmpretrain's configs, else 800 1344",
    )
    add("--dtype", choices=tuple(DTYPES), default="fp32", help="fp16 on a GPU only")
    add("--module", help="the dynamic backbone, where a model has several")
    add("--device", default="cpu", help="where to compute, e.g. cuda:0 (default: cpu)")
    add_trust(parser)
    add_cfg_options(parser)


def run(args: argparse.Namespace) -> None:
    """Build the model, run it and print the report.

    Raises:
        UserError: An argument, the config or the image is wrong, or no block can run fast here.
    """
    check_size(args.shape)
    config = load_config(args.config, args.cfg_options)
    if "model" not in config:
        raise UserError(f"{args.config} has no model: name the config of a detector or classifier")
    config.model.get("backbone", {}).pop("init_cfg", None)  # nothing is downloaded
    model = revert_sync_batchnorm(build_model(config))
    if args.checkpoint is not None:
        load_weights(model, args.checkpoint, args.trust_checkpoint)
    size = tuple(args.shape or usual_size(config))
    with as_user_errors(ValueError):
        backbone = find_dynamic_backbone(model, args.module)
        if args.image is None:
            channels = backbone.network_shape(size).channels
            image = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0))
        else:
            image = load_images([args.image], size, config)
        place = dict(device=args.device, dtype=DTYPES[args.dtype])
        try:
            backbone, image = backbone.to(**place), image.to(**place)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {args.device!r} cannot be used: {error}") from error
        explanation = explain(backbone, image, quiet=True)
    output = Output()
    output.print(explanation.table())
    if args.checkpoint is None:
        output.say("the weights are random (--checkpoint): times hold, rates do not")
