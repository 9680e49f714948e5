"""What a granularity search found, as tables and in words."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from las_mm.latency import SearchResult
from las_mm.latency.search_result import Setting, StageSearch


def stage_table(found: StageSearch, top: int) -> Table:
    """The ``top`` fastest granularities of a stage."""
    height, width = found.map_hw
    title = (
        f"stage {found.stage}, map {height} x {width}: static {1e3 * found.static_s:.3f} ms, "
        f"skipping layers {1e3 * found.layer_s:.3f} ms"
    )
    table = Table(title=title, title_justify="left", min_width=76)
    table.add_column("")
    columns = {
        "spatial": ("S", "patches"),
        "channel": ("G",),
    }.get(found.mode, ("S", "G", "patches"))
    for column in (*columns, "ms", "ratio", "break-even rate"):
        table.add_column(column, justify="right")
    shown = list(found.choices[:top])
    if found.chosen not in shown:
        shown.append(found.chosen)
    for choice in shown:
        cells = {
            "S": str(choice.granularity),
            "G": str(choice.channel_granularity),
            "patches": f"{choice.rows} x {choice.columns}" + (", cut off" if choice.ragged else ""),
        }
        table.add_row(
            "chosen" if choice is found.chosen else "",
            *(cells[column] for column in columns),
            f"{1e3 * choice.latency_s:.3f}",
            f"{choice.ratio:.3f}",
            f"{choice.break_even:.3f}",
        )
    return table


def settings_table(result: SearchResult) -> Table:
    """The best settings of the whole network, the chosen one and the config's own."""
    title = f"backbone, static {1e3 * result.static_s:.3f} ms per image"
    table = Table(title=title, title_justify="left", min_width=76)
    table.add_column("")
    table.add_column("granularity per stage" if skips_channels(result) else "S per stage")
    for column in ("ms", "ratio"):
        table.add_column(column, justify="right")
    labels: dict[str, list[str]] = {}
    settings = {title_of(result, setting): setting for setting in result.settings}
    for label, setting in (("chosen", result.chosen), ("config", result.current)):
        if setting is not None:
            settings[title_of(result, setting)] = setting
            labels.setdefault(title_of(result, setting), []).append(label)
    for setting in sorted(settings.values(), key=lambda s: s.latency_s):
        table.add_row(
            ", ".join(labels.get(title_of(result, setting), [])),
            title_of(result, setting),
            f"{1e3 * setting.latency_s:.3f}",
            f"{setting.ratio:.3f}",
        )
    return table


def join(granularity: Sequence[int]) -> str:
    """As the papers write it: 4-4-2-1."""
    return "-".join(map(str, granularity))


def title_of(result: SearchResult, setting: Setting) -> str:
    """A setting in a few letters: S as in the papers, and G where the network has use for it."""
    if not skips_channels(result):
        return join(setting.granularity)
    groups = f"G={join(setting.channel_granularity)}"
    if all(stage.mode == "channel" for stage in result.stages):
        return groups
    return f"S={join(setting.granularity)} {groups}"


def conditions(result: SearchResult) -> str:
    """What was searched, in one line."""
    height, width = result.network.input_hw
    return (
        f"{result.network.name} on {result.device.name}, batch {result.batch_size} of "
        f"{height} x {width}, rate {result.rate:g}"
        + (f", channel rate {result.rate_channel:g}" if skips_channels(result) else "")
    )


def skips_channels(result: SearchResult) -> bool:
    """Whether any stage does."""
    return any(stage.mode != "spatial" for stage in result.stages)
