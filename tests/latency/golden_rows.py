"""Rows of the reference simulator (golden/simulator_*.json) as inputs of our model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from las_mm.latency import BlockShape

DEFAULT_DIR = "/work/shared/golden"


def golden_dir() -> Path:
    """Directory of the reference outputs: LAS_MM_GOLDEN, or where this project keeps them."""
    return Path(os.environ.get("LAS_MM_GOLDEN", DEFAULT_DIR))


def load_rows() -> list[dict[str, Any]]:
    """All rows of all simulator files."""
    rows: list[dict[str, Any]] = []
    for path in sorted(golden_dir().glob("simulator_*.json")):
        rows += json.loads(path.read_text())
    return rows


def golden_block(row: dict[str, Any]) -> tuple[str, BlockShape, float, int]:
    """A row as (device name, block, rate, batch size); its latency is the whole batch's.

    The simulator charges the shortcut's convolution only where the block has a stride.
    """
    mode = row["mode"]
    name = f"stage{row['stage']}.{'first' if row['first'] else 'rest'}"
    block = BlockShape(
        name=name,
        stage=row["stage"],
        mode=mode,
        granularity=row["granularity"] if mode == "spatial" else 0,
        c_in=row["cin"],
        width=row["cout"] // 4,
        c_out=row["cout"],
        h_in=row["hin"],
        w_in=row["hin"],
        stride=row["stride"],
        downsample=bool(row["first"]) and row["stride"] > 1,
    )
    return row["device"], block, row["rate"], row["batch"]
