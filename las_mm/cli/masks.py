"""Draw what a dynamic detector finds in images, and where it computed.

Each picture shows the predictions beside maps of the share of dynamic blocks that computed at
each pixel, over all blocks and per stage. OUT_DIR/index.html has all images on one page, with every
block's decisions, rates and milliseconds; it opens without a server.

las_mm masks configs/mask_rcnn_lasnet_r50_overfit.py data/coco/val2017 \\
    --checkpoint work_dirs/mask_rcnn_lasnet_r50_overfit/epoch_125.pth --out-dir masks
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from rich.progress import track
from torch import nn

from las_mm.checkpoints import load_weights
from las_mm.cli.parser import add_cfg_options, add_trust
from las_mm.configs import build_model, load_config
from las_mm.dependencies import require
from las_mm.errors import UserError, as_user_errors
from las_mm.latency import predict
from las_mm.latency.device import AnyDevice, load_device
from las_mm.mask_page import MaskPage
from las_mm.models.finding import collect_activations, find_dynamic_backbone, find_dynamic_backbones
from las_mm.pictures import UnreadableImage, check_whole, read_image, to_rgb
from las_mm.visualization import draw_masks, require_matplotlib, write_png

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")


def find_images(path: Path) -> list[Path]:
    """The image itself, or all images directly in a folder, in the order of their names."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"there is no image or folder {path}")
    images = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
    if not images:
        raise UserError(f"there is no image ({', '.join(SUFFIXES)}) in the folder {path}")
    return images


def picture_names(images: list[Path]) -> list[str]:
    """File names of the pictures: the images' stems, or whole names where stems repeat."""
    stems = [image.stem for image in images]
    return [f"{image.stem if stems.count(image.stem) == 1 else image.name}.png" for image in images]


def build_detector(config: Config, checkpoint: str | None, trust: bool, device: str) -> nn.Module:
    """The detector of a config, ready for ``inference_detector``."""
    from mmdet.registry import DATASETS

    for key in ("model", "test_dataloader"):
        if key not in config:
            raise UserError(f"{config.filename} has no {key}: name the config of a detector")
    config.model.get("backbone", {}).pop("init_cfg", None)
    model = revert_sync_batchnorm(build_model(config))
    if not find_dynamic_backbones(model):
        raise UserError(f"the model of {config.filename} has no dynamic backbone, so no masks")
    # Lazy: the classes and colours, without the data.
    dataset = {**config.test_dataloader.dataset, "lazy_init": True}
    model.dataset_meta = dict(DATASETS.build(dataset).metainfo)
    if checkpoint is not None:
        content = load_weights(model, checkpoint, trust)
        meta = content.get("meta", {}).get("dataset_meta") or {}
        model.dataset_meta.update({key.lower(): value for key, value in meta.items()})
    model.cfg = config
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used: {error}") from error


def local_reader(config: Config) -> list:
    """What reads the images of the config's test, from this machine's files."""
    from mmdet.registry import TRANSFORMS

    dataset = config.test_dataloader.dataset
    while "dataset" in dataset:
        dataset = dataset.dataset
    stores = ("backend_args", "file_client_args")
    first = {key: value for key, value in dataset.pipeline[0].items() if key not in stores}
    if "LoadImageFromFile" not in str(first["type"]):
        return []
    return [TRANSFORMS.build(first)]


@contextmanager
def stopwatch(module: nn.Module) -> Iterator[list[float]]:
    """Milliseconds of the calls of a module meanwhile; on a GPU only of launching its kernels."""
    starts: list[float] = []
    found: list[float] = []

    def stop(*_) -> None:
        found.append(1e3 * (time.perf_counter() - starts[-1]))

    handles = [
        module.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter())),
        module.register_forward_hook(stop),
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def visualize(
    model: nn.Module,
    images: list[Path],
    out_dir: Path,
    score_thr: float,
    module: str | None = None,
    device: AnyDevice | None = None,
) -> None:
    """Run the detector on each image and write its picture, and the page of all.

    Args:
        model: See :func:`build_detector`.
        images: Files.
        out_dir: Folder of the pictures and of ``index.html``.
        score_thr: Detections that score higher are drawn.
        module: Which dynamic backbone, where there are several.
        device: What the page predicts latencies for.
    """
    from mmdet.apis import inference_detector

    reader = local_reader(model.cfg)
    backbone = find_dynamic_backbone(model, module)
    # A GPU is not waited for, which a stopwatch on the host would have to.
    measures = next(model.parameters()).device.type == "cpu"
    title = Path(model.cfg.filename).stem
    named = None if device is None else device.name
    page = MaskPage(out_dir / "index.html", title, named)
    with page, stopwatch(backbone) as milliseconds:
        for path, name in zip(track(images, description="images"), picture_names(images)):
            with as_user_errors(UnreadableImage):
                check_whole(path)
                image = read_image(str(path), reader)
            # Not the path: the picture shows the pixels that the network gets.
            sample = inference_detector(model, image)
            if len(milliseconds) == 1:  # weights were packed, and the forms of blocks measured
                sample = inference_detector(model, image)
            activation = collect_activations(model, module)
            picture = draw_masks(
                to_rgb(image),
                activation,
                data_sample=sample,
                dataset_meta=model.dataset_meta,
                score_thr=score_thr,
                title=path.stem,
            )
            write_png(out_dir / name, picture)
            size = (1, activation.shape.channels, *activation.shape.input_hw)
            page.add(
                path.name,
                to_rgb(image),
                activation,
                sample.metainfo,
                measured_ms=milliseconds[-1] if measures else None,
                predicted_ms=None
                if device is None
                else 1e3 * predict(backbone, device, size).latency_s,
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add = parser.add_argument
    add("config", help="config of a detector with a dynamic backbone")
    add("images", type=Path, help="an image, or a folder of images")
    add("--checkpoint", help="weights; without, they are random")
    add("--out-dir", type=Path, default=Path("masks"), help="folder of pictures (default: masks)")
    add("--score-thr", type=float, default=0.3, help="draw detections above it (default: 0.3)")
    add("--module", help="the dynamic backbone, where a model has several")
    add("--device", default="cpu", help="where to compute, e.g. cuda:0 (default: cpu)")
    add("--predict", metavar="DEVICE", help="also predict latencies for it, e.g. tx2 (or its file)")
    add_trust(parser)
    add_cfg_options(parser)


def run(args: argparse.Namespace) -> None:
    """Draw all pictures.

    Raises:
        UserError: An argument, the config or an image is wrong.
    """
    if not 0 <= args.score_thr <= 1:
        raise UserError(f"--score-thr must be from 0 to 1, but is {args.score_thr}")
    warnings.filterwarnings("ignore", category=UserWarning)  # mmdet's, about its own internals
    require("mmdet", "drawing what a detector finds")
    require_matplotlib()
    images = find_images(args.images)
    with as_user_errors(ValueError):
        device = None if args.predict is None else load_device(args.predict)
    config = load_config(args.config, args.cfg_options)
    if args.checkpoint is None:
        print("No --checkpoint: the weights are random.", file=sys.stderr)
    model = build_detector(config, args.checkpoint, args.trust_checkpoint, args.device)
    with as_user_errors(ValueError):
        find_dynamic_backbone(model, args.module)
    visualize(model, images, args.out_dir, args.score_thr, args.module, device)
    print(f"{len(images)} pictures written to {args.out_dir}, all on one page in index.html")
