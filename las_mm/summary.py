"""What a dynamic network did over a data set, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from mmengine import dist
from rich.console import Console
from rich.table import Table

from las_mm.latency import Prediction
from las_mm.models.activation import NetworkActivation
from las_mm.models.flops import count_macs, flops_report
from las_mm.network.operator import DILATED, LAYER

_DILATED = "dilated_rate"


@dataclass
class StageTotals:
    """Sums over images of one stage: weights of the means printed at the end.

    Attributes:
        label: What its blocks skip.
        n_blocks: Its blocks.
        deciding: By axis, how many of them decide about it.
        sums: Of the summary's columns, times images.
    """

    label: str
    n_blocks: int
    deciding: dict[str, int] = field(default_factory=dict)
    sums: np.ndarray = field(default_factory=lambda: np.zeros(0))


class DatasetSummary:
    """Accumulates rates, FLOPs and predicted latency per stage over many forward passes.

    Ratios are ratios of sums over all images, so images of different size count by their cost.
    """

    COLUMNS = ("macs", "static_macs", "seconds", "static_seconds")  # rates follow, one per name

    def __init__(self) -> None:
        self.images: float = 0
        self.stages: dict[str, StageTotals] = {}
        self._rates: dict[str, tuple[str, ...]] = {}  # of the network's axes, by name

    def add(
        self,
        activation: NetworkActivation,
        prediction: Prediction,
        static_block_s: np.ndarray,
        stem_s: float,
        images: float,
    ) -> None:
        """Add one forward pass.

        Args:
            activation: Its rates (means over its images).
            prediction: Predicted seconds per image at these rates.
            static_block_s: (n_blocks,) seconds per image of the static blocks.
            stem_s: Seconds per image of the stem.
            images: Images in the batch, less those that shall not count.
        """
        counts = count_macs(activation.shape)
        report = flops_report(activation.detach())
        static_macs = counts.static_blocks
        block_macs = report.block_ratios.cpu().numpy() * static_macs
        named = activation.named_rates()
        self._rates = {"activation_rate": named.pop("activation_rate"), _DILATED: (DILATED, LAYER)}
        self._rates.update(named)
        rates = {
            name: activation.rate(*axes).detach().cpu().numpy()
            for name, axes in self._rates.items()
        }
        stem = [counts.stem, counts.stem, stem_s, stem_s, *[1.0] * len(rates)]
        self._add("stem", StageTotals("static", 1), np.array(stem), images)
        for stage, blocks in sorted(activation.shape.stages().items()):
            index = [i for i, b in enumerate(activation.shape.blocks) if b.stage == stage]
            sums = [values[index].sum() for values in (block_macs, static_macs)]
            sums += [values[index].sum() for values in (prediction.block_s, static_block_s)]
            sums += [values[index].mean() for values in rates.values()]
            deciding = {
                name: sum(bool(set(axes) & set(block.axes)) for block in blocks)
                for name, axes in self._rates.items()
            }
            label = ", ".join(dict.fromkeys(block.label for block in blocks))
            totals = StageTotals(label, len(index), deciding)
            self._add(f"stage {stage}", totals, np.array(sums), images)
        self.images += images

    def _add(self, name: str, empty: StageTotals, values: np.ndarray, images: float) -> None:
        totals = self.stages.setdefault(name, empty)
        totals.sums = (totals.sums if totals.sums.size else 0.0) + values * images

    def reduce(self) -> None:
        """Add up the sums of all processes; every process must have seen an image."""
        if dist.get_world_size() == 1:
            return
        packed = np.concatenate([[self.images], *(t.sums for t in self.stages.values())])
        tensor = torch.as_tensor(packed, dtype=torch.float64)
        dist.all_reduce(tensor, op="sum")
        packed = tensor.numpy()
        self.images = packed[0]
        rows = packed[1:].reshape(len(self.stages), -1)
        for totals, sums in zip(self.stages.values(), rows):
            totals.sums = sums

    def metrics(self) -> dict[str, float]:
        """Means over the images: rates, FLOPs ratio, predicted latency in milliseconds.

        The overall rates are of the blocks that decide about them; there are rates of other axes
        than positions only where blocks do.
        """
        sums = np.sum([totals.sums for totals in self.stages.values()], axis=0)
        metrics = {"flops_ratio": sums[0] / sums[1]}
        columns = self._columns()
        for name, column in columns.items():
            if name == _DILATED:
                continue
            metrics[name] = self._mean_rate(name, column)
            for stage, totals in self.stages.items():
                shown = name == "activation_rate" or totals.deciding.get(name)
                if stage != "stem" and shown:
                    key = f"{name}_{stage.replace(' ', '')}"
                    metrics[key] = totals.sums[column] / self.images
        metrics["latency_ms"] = 1e3 * sums[2] / self.images
        metrics["static_latency_ms"] = 1e3 * sums[3] / self.images
        metrics["latency_ratio"] = sums[2] / sums[3]
        return {key: float(value) for key, value in metrics.items()}

    def _columns(self) -> dict[str, int]:
        """Where the mean of each rate stands in a stage's sums."""
        return {name: len(self.COLUMNS) + i for i, name in enumerate(self._rates)}

    def _mean_rate(self, name: str, column: int) -> float:
        """Mean over the deciding blocks; the others of a stage are known to have rate 1."""
        blocks = [totals.deciding.get(name, 0) for totals in self.stages.values()]
        if not sum(blocks):
            return 1.0
        total = 0.0
        for totals, count in zip(self.stages.values(), blocks):
            others = totals.n_blocks - count
            total += totals.n_blocks * totals.sums[column] / self.images - others if count else 0.0
        return total / sum(blocks)

    def table(self, device: str, what: str = "images") -> str:
        """A table for people: one row per stage, milliseconds per image (or ``what``)."""
        title = f"{self.images:.0f} {what}, latency predicted for {device}, per {what[:-1]}"
        table = Table(title=title)
        for column in ("", "blocks", "mode"):
            table.add_column(column)
        names = {"activation_rate": "rate", _DILATED: "conv1 rate"}
        rates = [names.get(n, n.removesuffix("_rate").replace("_", " ") + "s") for n in self._rates]
        for column in (*rates, "GMACs", "FLOPs ratio", "ms", "static ms", "ratio"):
            table.add_column(column, justify="right")

        def row(name: str, blocks: str, label: str, sums: np.ndarray, with_rates: bool) -> None:
            macs, static_macs, seconds, static_s, *shares = sums / self.images
            table.add_row(
                name,
                blocks,
                label,
                *(f"{share:.3f}" if with_rates else "" for share in shares),
                f"{macs / 1e9:.3f}",
                f"{macs / static_macs:.3f}",
                f"{seconds * 1e3:.3f}",
                f"{static_s * 1e3:.3f}",
                f"{seconds / static_s:.3f}" if static_s else "",  # the stem, where it is left out
            )

        for name, totals in self.stages.items():
            row(name, str(totals.n_blocks), totals.label, totals.sums, name != "stem")
        table.add_section()
        row("backbone", "", "", np.sum([t.sums for t in self.stages.values()], axis=0), False)
        console = Console(width=120 + 20 * (len(rates) - 2), force_terminal=False)
        with console.capture() as capture:
            console.print(table)
        return capture.get()
