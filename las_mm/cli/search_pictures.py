"""What a granularity search found, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from las_mm.cli.output import new_figure, save
from las_mm.cli.search_tables import conditions, skips_channels, title_of
from las_mm.latency import SearchResult


def label_of_sides(result: SearchResult) -> str:
    """What the axis of granularities shows."""
    parts = []
    if any(stage.mode != "channel" for stage in result.stages):
        parts.append("S, side of a patch in outputs")
    if any(stage.mode == "channel" for stage in result.stages):
        parts.append("G, channels per decision")
    return "; ".join(parts)


def draw_search(result: SearchResult, out: Path) -> None:
    """Latency and break-even rate against S, one line per stage."""
    figure = new_figure((11, 4.6))
    ratio, even = figure.subplots(1, 2)
    most = 1
    for index, stage in enumerate(result.stages):
        # Of a stage with both, S is drawn at the chosen G.
        key = "channel_granularity" if stage.mode == "channel" else "granularity"
        group = stage.chosen.channel_granularity
        choices = [
            c for c in stage.choices if key != "granularity" or c.channel_granularity == group
        ]
        choices.sort(key=lambda choice: getattr(choice, key))
        sides = [getattr(choice, key) for choice in choices]
        most = max(most, *sides)
        height, width = stage.map_hw
        label = f"stage {stage.stage} ({height} x {width}), static {1e3 * stage.static_s:.3g} ms"
        colour, chosen = f"C{index}", stage.chosen
        for axes, column in ((ratio, "ratio"), (even, "break_even")):
            values = [getattr(choice, column) for choice in choices]
            axes.plot(sides, values, "o-", color=colour, markersize=3, label=label)
            mark = dict(color=colour, markersize=10, fillstyle="none", markeredgewidth=1.8)
            axes.plot([getattr(chosen, key)], [getattr(chosen, column)], "o", **mark)
    line = dict(color="black", linewidth=1, linestyle="--")
    ratio.axhline(1, label="static", **line)
    ratio.set(title=f"latency at rate {result.rate:g}", ylabel="latency / static stage's")
    even.axhline(result.rate, label="expected rate", **line)
    even.set(title="break-even rate: dynamic is faster below", ylabel="activation rate")
    even.set_ylim(top=1.04)
    ticks = [2**i for i in range(12)]
    for axes in (ratio, even):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlim(0.85, 1.18 * most)
        axes.set_xlabel(f"{label_of_sides(result)} (circled: chosen)")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(f"{conditions(result)} ({result.device.kind} device)")
    save(figure, out)


def draw_comparison(results: Sequence[SearchResult], curves: dict[str, Any], out: Path) -> None:
    """Latency against rate of the same settings, one panel per device."""
    columns = 2 if len(results) == 4 else min(len(results), 3)
    rows = -(-len(results) // columns)
    figure = new_figure((1 + 4.4 * columns, 4.2 * rows))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    chosen_by: dict[str, list[str]] = {}
    for result in results:
        chosen_by.setdefault(title_of(result, result.chosen), []).append(result.device.name)
        if result.current is not None:
            own = chosen_by.setdefault(title_of(result, result.current), [])
            if "config" not in own:
                own.insert(0, "config")
    for axes in panels[len(results) :]:
        axes.axis("off")
    for axes, result in zip(panels, results):
        found = curves["devices"][result.device.name]
        for index, (setting, latency) in enumerate(found["latency_s"].items()):
            best = setting == title_of(result, result.chosen)
            prefix = "" if skips_channels(result) else "S="
            axes.plot(
                curves["rates"],
                [1e3 * value for value in latency],
                color=f"C{index}",
                linewidth=2.6 if best else 1.3,
                label=f"{prefix}{setting} ({', '.join(chosen_by[setting])})",
            )
        axes.axhline(1e3 * found["static_s"], color="black", linestyle="--", label="static")
        axes.axvline(result.rate, color="grey", linewidth=0.8, linestyle=":")
        axes.set(xlabel="activation rate", ylabel="ms per image", xlim=(0, 1))
        axes.set_ylim(bottom=0)
        name, kind = result.device.name, result.device.kind
        axes.set_title(f"{name} ({kind}), batch {result.batch_size}")
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3))
    height, width = results[0].network.input_hw
    figure.suptitle(
        f"{results[0].network.name} at {height} x {width}; thick: chosen for the device at rate "
        f"{results[0].rate:g}"
    )
    save(figure, out)
