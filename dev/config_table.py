#!/usr/bin/env python
"""Write the table of configs/README.md and configs/metafile.yml from the configs themselves.

python dev/config_table.py            # after a config was added or changed
python dev/config_table.py --check    # exits with 1 where a file is not up to date
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import yaml
from mmengine.config import Config

from las_mm.cli.parser import Parser
from las_mm.configs import hook_name
from las_mm.errors import as_user_errors, told
from las_mm.fileio import write_atomically
from las_mm.network.architectures import DENSENETS

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- table: dev/config_table.py -->", "<!-- end of table -->"
COLLECTIONS = {
    "LASNet": ("https://arxiv.org/abs/2210.06223", "Latency-aware Spatial-wise Dynamic Networks"),
    "LAUDNet": (
        "https://arxiv.org/abs/2308.15949",
        "Latency-aware Unified Dynamic Networks for Efficient Image Recognition",
    ),
}
DETECTORS = dict(
    DDQDETR="DDQ-DETR",
    FasterRCNN="Faster R-CNN",
    Mask2Former="Mask2Former",
    MaskRCNN="Mask R-CNN",
    RetinaNet="RetinaNet",
)
WITH_MASKS = ("Mask R-CNN", "Mask2Former")
COLUMNS = (
    "config",
    "data set",
    "model",
    "backbone",
    "mode",
    "S",
    "G",
    "target",
    "backbone lr",
    "training",
    "images per device",
)


def configs() -> list[Path]:
    """All configs, those for COCO first."""
    folder = ROOT / "configs"
    return [*sorted(folder.glob("*.py")), *sorted(folder.glob("imagenet/*.py"))]


def read(path: Path) -> Config:
    """A config, whatever the shell says about data and weights."""
    with patch.dict(os.environ):
        for name in [name for name in os.environ if name.startswith("LAS_MM_")]:
            del os.environ[name]
        return Config.fromfile(path)


def describe(path: Path) -> dict:
    """What the table and the metafile say of a config."""
    cfg = read(path)
    backbone = cfg.model.backbone
    mode = backbone.get("mode", "spatial")
    hooks = {hook_name(hook): hook for hook in cfg.get("custom_hooks") or []}
    budget = hooks.get("las_mm.BudgetHook")
    keys = cfg.optim_wrapper.get("paramwise_cfg", {}).get("custom_keys", {})
    optimizer = cfg.optim_wrapper.optimizer
    arch = backbone.get("arch")
    data = "COCO" if cfg.model.type in DETECTORS else "ImageNet-1k"
    data = "CIFAR-10" if "cifar10" in path.stem else data
    steps = cfg.train_cfg.get("max_iters")
    return {
        "path": path.relative_to(ROOT).as_posix(),
        "name": path.stem,
        "model": DETECTORS.get(cfg.model.type, "classifier"),
        "backbone": f"ResNet-{backbone.depth}" if arch is None else _arch_name(arch),
        "mode": mode,
        "S": "-".join(map(str, backbone.granularity)) if mode in ("spatial", "both") else "",
        "G": str(backbone.get("channel_granularity", 2)) if mode in ("channel", "both") else "",
        "target": "" if budget is None else _target(budget["loss"]),
        "backbone lr": f"{optimizer.lr * keys.get('backbone', {}).get('lr_mult', 1):g}",
        "data set": data,
        "training": f"{steps} steps" if steps else f"{cfg.train_cfg.max_epochs} epochs",
        "images per device": str(cfg.train_dataloader.batch_size),
    }


def _target(loss: dict) -> str:
    if loss.get("metric", "flops") == "flops":
        return f"{loss['target']:g} of FLOPs"
    return f"{loss['target']:g} of {loss['metric']}"


def _arch_name(arch: str | dict) -> str:
    if isinstance(arch, dict) and "num_layers" in arch:
        return f"T2T-ViT-{arch['num_layers']}"
    if str(arch).startswith("t2t-vit"):
        return arch.upper().replace("VIT", "ViT")
    if isinstance(arch, dict):  # of another width
        arch = next(n for n, (_, depths, _) in DENSENETS.items() if depths == tuple(arch["depths"]))
    if arch in DENSENETS:
        return f"DenseNet-{arch}"
    family, size = arch.removeprefix("regnet").split("_")
    return f"RegNet{family.upper()}-{size.upper()}"


def table(rows: list[dict]) -> str:
    """The table of configs/README.md."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        link = row["path"].removeprefix("configs/")
        cells = [f"[{link}]({link})", *(row[name] for name in COLUMNS[1:])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def readme(rows: list[dict], text: str) -> str:
    """``text`` with its table replaced.

    Raises:
        ValueError: It has no place for a table.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"configs/README.md must hold the lines {BEGIN} and {END} once each")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}"


def metafile(rows: list[dict]) -> str:
    """configs/metafile.yml, which ``model-index.yml`` imports."""
    content = dict(
        Collections=[
            dict(Name=name, Paper=dict(URL=url, Title=title), README="configs/README.md")
            for name, (url, title) in COLLECTIONS.items()
        ],
        Models=[_model(row) for row in rows],
    )
    header = "# Written by dev/config_table.py. No weights are published: models have no results.\n"
    return header + yaml.safe_dump(content, sort_keys=False, width=100)


def _model(row: dict) -> dict:
    architecture = {"Mode": row["mode"], "S": row["S"], "G": row["G"]}
    tasks = ["Object Detection" if row["data set"] == "COCO" else "Image Classification"]
    if row["model"] in WITH_MASKS:
        tasks.append("Instance Segmentation")
    metadata = {
        "Training Data": row["data set"],
        "Training": row["training"],
        "Backbone": row["backbone"],
        **{key: value for key, value in architecture.items() if value},
    }
    if row["target"]:
        metadata["Target"] = row["target"]
    return {
        "Name": row["name"],
        "In Collection": "LAUDNet" if "laudnet" in row["name"] else "LASNet",
        "Config": row["path"],
        "Metadata": metadata,
        "Tasks": tasks,
        "Results": None,
    }


def files() -> Iterator[tuple[Path, str]]:
    """The files and what they should hold."""
    rows = [describe(path) for path in configs()]
    path = ROOT / "configs" / "README.md"
    yield path, readme(rows, path.read_text())
    yield ROOT / "configs" / "metafile.yml", metafile(rows)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="config_table.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if stale")
    args = parser.parse_args(argv)
    with told("config_table.py"), as_user_errors(ValueError):
        stale = [
            (path, text) for path, text in files() if not path.is_file() or path.read_text() != text
        ]
    if args.check and stale:
        names = ", ".join(str(path.relative_to(ROOT)) for path, _ in stale)
        sys.exit(f"config_table.py: not up to date: {names}; run python dev/config_table.py")
    for path, text in stale:
        write_atomically(path, text.encode())
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
