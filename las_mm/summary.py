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


@dataclass
class StageTotals:
    """Sums over images of one stage: weights of the means printed at the end."""

    label: str = ""
    n_blocks: int = 0
    positional: int = 0  # blocks that may leave out positions
    channelwise: int = 0  # blocks that may leave out channels
    sums: np.ndarray = field(default_factory=lambda: np.zeros(len(DatasetSummary.COLUMNS)))


class DatasetSummary:
    """Accumulates rates, FLOPs and predicted latency per stage over many forward passes.

    Ratios are ratios of sums over all images, so images of different size count by their cost.
    """

    COLUMNS = (
        "rate",
        "rate_dilated",
        "macs",
        "static_macs",
        "seconds",
        "static_seconds",
        "rate_channel",
    )

    def __init__(self) -> None:
        self.images: float = 0
        self.stages: dict[str, StageTotals] = {}

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
        block_macs = report.block_ratios.cpu().numpy() * counts.static_blocks
        rates = activation.rates.detach().cpu().numpy()
        dilated = activation.rates_dilated.detach().cpu().numpy()
        channel = activation.rates_channel.detach().cpu().numpy()
        stem = [1.0, 1.0, counts.stem, counts.stem, stem_s, stem_s, 1.0]
        self._add("stem", StageTotals("static", 1), np.array(stem), images)
        for stage in sorted({block.stage for block in activation.shape.blocks}):
            index = [i for i, block in enumerate(activation.shape.blocks) if block.stage == stage]
            blocks = [activation.shape.blocks[i] for i in index]
            labels = dict.fromkeys(block.label for block in blocks)
            sums = [
                rates[index].mean(),
                dilated[index].mean(),
                block_macs[index].sum(),
                counts.static_blocks[index].sum(),
                prediction.block_s[index].sum(),
                static_block_s[index].sum(),
                channel[index].mean(),
            ]
            totals = StageTotals(
                ", ".join(labels),
                len(index),
                positional=sum(block.decides_positions for block in blocks),
                channelwise=sum(block.has_channels for block in blocks),
            )
            self._add(f"stage {stage}", totals, np.array(sums), images)
        self.images += images

    def _add(self, name: str, empty: StageTotals, values: np.ndarray, images: float) -> None:
        totals = self.stages.setdefault(name, empty)
        totals.sums = totals.sums + values * images

    def reduce(self) -> None:
        """Add up the sums of all processes; every process must have seen an image."""
        if dist.get_world_size() == 1:
            return
        packed = np.concatenate([[self.images], *(t.sums for t in self.stages.values())])
        tensor = torch.as_tensor(packed, dtype=torch.float64)
        dist.all_reduce(tensor, op="sum")
        packed = tensor.numpy()
        self.images = packed[0]
        for totals, sums in zip(self.stages.values(), packed[1:].reshape(-1, len(self.COLUMNS))):
            totals.sums = sums

    def metrics(self) -> dict[str, float]:
        """Means over the images: rates, FLOPs ratio, predicted latency in milliseconds.

        The overall rates are of the blocks that may leave out positions, or channels; there are
        channel rates only where blocks do.
        """
        sums = np.sum([totals.sums for totals in self.stages.values()], axis=0)
        metrics = {
            "flops_ratio": sums[2] / sums[3],
            "activation_rate": self._mean_rate(0, [t.positional for t in self.stages.values()]),
            "latency_ms": 1e3 * sums[4] / self.images,
            "static_latency_ms": 1e3 * sums[5] / self.images,
            "latency_ratio": sums[4] / sums[5],
        }
        for name, totals in self.stages.items():
            if name != "stem":
                key = f"activation_rate_{name.replace(' ', '')}"
                metrics[key] = totals.sums[0] / self.images
        if self.has_channels:
            blocks = [t.channelwise for t in self.stages.values()]
            metrics["channel_rate"] = self._mean_rate(6, blocks)
            for name, totals in self.stages.items():
                if totals.channelwise:
                    metrics[f"channel_rate_{name.replace(' ', '')}"] = totals.sums[6] / self.images
        return {key: float(value) for key, value in metrics.items()}

    @property
    def has_channels(self) -> bool:
        """Whether any block may leave out channels."""
        return any(totals.channelwise for totals in self.stages.values())

    def _mean_rate(self, column: int, blocks: list[int]) -> float:
        """Mean over ``blocks`` of each stage; the others of a stage are known to have rate 1."""
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
        channels = ("channels",) if self.has_channels else ()
        columns = ("GMACs", "FLOPs ratio", "ms", "static ms", "ratio")
        for column in ("rate", "conv1 rate", *channels, *columns):
            table.add_column(column, justify="right")

        def row(name: str, blocks: str, label: str, sums: np.ndarray, with_rates: bool) -> None:
            mean = sums / self.images
            shown = mean[[0, 1, 6]] if channels else mean[:2]
            rates = [f"{rate:.3f}" if with_rates else "" for rate in shown]
            table.add_row(
                name,
                blocks,
                label,
                *rates,
                f"{mean[2] / 1e9:.3f}",
                f"{mean[2] / mean[3]:.3f}",
                f"{mean[4] * 1e3:.3f}",
                f"{mean[5] * 1e3:.3f}",
                f"{mean[4] / mean[5]:.3f}" if mean[5] else "",  # the stem, where it is left out
            )

        for name, totals in self.stages.items():
            row(name, str(totals.n_blocks), totals.label, totals.sums, name != "stem")
        table.add_section()
        row("backbone", "", "", np.sum([t.sums for t in self.stages.values()], axis=0), False)
        console = Console(width=140 if channels else 120, force_terminal=False)
        with console.capture() as capture:
            console.print(table)
        return capture.get()
