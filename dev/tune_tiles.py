#!/usr/bin/env python
"""Choose the rule of ops/cuda/tiles.cuh for a GPU from what each tile took on it.

python dev/tune_tiles.py kernels_large.json kernels_medium.json kernels_small.json [--file TILES]

The reports are those that dev/benchmark_kernels.py writes with `--tile`, as tools/gpu_first_run.sh
does. Prints the rule whose choices take the least time over all products, each weighed by its
frequency in a ResNet-101, beside the rule in use and the best tile for every product. `--file`
writes it in the form that LAS_MM_CUDA_TILES names.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark_kernels import SHAPES, STAGES, TILES

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = (3, 4, 23, 3)  # of a stage
NEVER = 1e30


@dataclass(frozen=True)
class Rule:
    """A row of ``kTileRules``."""

    capability: int
    least_rows: float
    large_waves: float
    medium_waves: float

    def __str__(self) -> str:
        numbers = (self.least_rows, self.large_waves, self.medium_waves)
        return f"{self.capability} " + " ".join(f"{number:g}" for number in numbers)


@dataclass(frozen=True)
class Product:
    """A product and what each tile took for it, in microseconds, summed over its blocks."""

    name: str
    rows: int  # possible ones
    columns: int
    micros: Mapping[str, float]

    def waves(self, columns: int, multiprocessors: int) -> float:
        """Tiles of 128 rows by ``columns`` per multiprocessor."""
        return self.rows / 2 / 128 * -(-self.columns // columns) / multiprocessors

    def tile(self, rule: Rule, multiprocessors: int) -> str:
        """``choose_tile`` of tiles.cuh."""
        if self.rows // 2 < rule.least_rows:
            return "small"
        if self.columns > 64 and self.waves(128, multiprocessors) >= rule.large_waves:
            return "large"
        medium = self.waves(64, multiprocessors) >= rule.medium_waves
        return "medium" if medium else "small"


def products(reports: Mapping[str, Mapping]) -> list[Product]:
    """What all reports have measured."""
    times: dict[tuple, dict[str, float]] = {}
    for tile, report in reports.items():
        for row in report["rows"]:
            if "us" in row and row["conv"] != "rest" and row["precision"] != "fp32":
                key = (row["precision"], row["shape"], row["stage"], row["conv"])
                times.setdefault(key, {})[tile] = row["us"]
    found = []
    for key, micros in times.items():
        if len(micros) < len(TILES):
            continue
        precision, shape, stage, conv = key
        images, height, width = SHAPES[shape]
        channels, narrow, stride, _ = STAGES[stage - 1]
        rows = images * -(-height // stride) * -(-width // stride)
        weighed = {tile: us * BLOCKS[stage - 1] for tile, us in micros.items()}
        name = f"{precision} {shape} stage {stage} conv{conv}"
        found.append(Product(name, rows, channels if conv == 3 else narrow, weighed))
    return found


def cost(found: Sequence[Product], rule: Rule, multiprocessors: int) -> float:
    """Sum over the shapes' and precisions' products, each relative to its best: none outweighs."""
    groups: dict[str, list[float]] = {}
    for product in found:
        group = groups.setdefault(" ".join(product.name.split()[:2]), [0.0, 0.0])
        group[0] += product.micros[product.tile(rule, multiprocessors)]
        group[1] += min(product.micros.values())
    return sum(taken / best for taken, best in groups.values()) / len(groups)


def tune(found: Sequence[Product], capability: int, multiprocessors: int) -> Rule:
    """The best rule; of equally good ones that with the largest tiles."""
    rows = [0.0, *sorted({product.rows // 2 + 1.0 for product in found})]
    waves = sorted({p.waves(c, multiprocessors) for p in found for c in (64, 128)})
    limits = [0.0, *(round((a + b) / 2, 2) for a, b in zip(waves, waves[1:])), NEVER]
    rules = (Rule(capability, *numbers) for numbers in itertools.product(rows, limits, limits))
    return min(rules, key=lambda rule: cost(found, rule, multiprocessors))


def built_in(capability: int) -> Rule:
    """The row of tiles.cuh for a GPU."""
    text = (ROOT / "ops" / "cuda" / "tiles.cuh").read_text(encoding="utf-8")
    for row in re.findall(r"^    \{(\d+), ([\d.e]+), ([\d.e]+), ([\d.e]+)\},", text, re.MULTILINE):
        if capability >= int(row[0]):
            return Rule(int(row[0]), *map(float, row[1:]))
    raise ValueError("tiles.cuh has no rule")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("reports", type=Path, nargs="+", help="one per tile")
    parser.add_argument("--file", type=Path, help="for LAS_MM_CUDA_TILES")
    args = parser.parse_args(argv)
    reports = {}
    for path in args.reports:
        report = json.loads(path.read_text(encoding="utf-8"))
        reports[report["tile"]] = report
    if missing := set(TILES) - set(reports):
        sys.exit(f"tune_tiles.py: error: no report of {', '.join(sorted(missing))} tiles")
    device = reports["small"]["device"]
    if isinstance(device, str):
        sys.exit("tune_tiles.py: error: a dry run has no times")
    capability, count = int(device["capability"].replace(".", "")), device["multiprocessors"]
    found = products({tile: reports[tile] for tile in TILES})
    if not found:
        sys.exit("tune_tiles.py: error: the reports have no product in common")
    best, old = tune(found, capability, count), built_in(capability)
    for product in found:
        each = ", ".join(f"{tile} {us:.0f}" for tile, us in product.micros.items())
        chosen = product.tile(best, count)
        fastest = min(product.micros, key=lambda tile: product.micros[tile])
        mark = "" if chosen == fastest else f" (best: {fastest})"
        print(f"{product.name}: {each} us: {chosen}{mark}")
    for name, rule in (("in use", old), ("best", best)):
        print(f"{name}: {rule}: {cost(found, rule, count):.3f} of the time of the best tiles")
    if args.file is not None:
        args.file.write_text(f"# {device['name']}\n{best}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
