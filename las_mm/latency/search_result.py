"""What a search for granularities finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from las_mm.network.block import NetworkShape

from .device import AnyDevice


@dataclass(frozen=True)
class Choice:
    """One granularity for one stage. Times in seconds per image.

    Attributes:
        granularity: Side S of a patch in outputs; 1 for a stage without patches.
        channel_granularity: Channels G of a decision; 1 for a stage that skips no channels.
        rows, columns: Patches along the sides of the stage's map; 1 without patches.
        ragged: Whether S does not divide the map, so that edge patches are cut off.
        latency_s: The stage at the expected rate.
        ratio: That over the static stage.
        break_even: The rate below which the stage is faster than the static stage, from 0 (never)
            to 1 (always), to 1/1000; the channel rate of a stage that skips channels only.
    """

    granularity: int
    channel_granularity: int
    rows: int
    columns: int
    ragged: bool
    latency_s: float
    ratio: float
    break_even: float


@dataclass(frozen=True)
class StageSearch:
    """All granularities of one stage, fastest first. Times in seconds per image.

    Attributes:
        stage: Number of the stage, from 1.
        map_hw: Rows and columns of its map.
        static_s: Latency of the static stage.
        layer_s: Latency of the stage skipping whole layers at the same rate, to compare with.
        choices: By latency; of equals the finer one comes first.
        chosen: The finest of those that are as fast as the fastest but for the tolerance.
        mode: What its dynamic blocks skip: 'spatial', 'channel' or 'both'; 'mixed' where they
            differ.
    """

    stage: int
    map_hw: tuple[int, int]
    static_s: float
    layer_s: float
    choices: tuple[Choice, ...]
    chosen: Choice
    mode: str


@dataclass(frozen=True)
class Setting:
    """A granularity for every stage of a network.

    Attributes:
        granularity: S per stage, in order; 1 for a stage that has no patches.
        channel_granularity: G per stage, in order; 1 for a stage that skips no channels.
        latency_s: Seconds per image of the backbone, stem included, at the expected rate.
        ratio: That over the static backbone.
    """

    granularity: tuple[int, ...]
    channel_granularity: tuple[int, ...]
    latency_s: float
    ratio: float


@dataclass(frozen=True)
class SearchResult:
    """What :func:`search_granularity` found.

    Attributes:
        device: The device.
        network: The searched network, with its own granularity.
        batch_size: Images per batch.
        rate: The expected activation rate of every block.
        rate_channel: The expected channel rate of the blocks that skip channels.
        static_s: Seconds per image of the static backbone.
        stages: Stages whose blocks skip patches or channels, in order.
        settings: The best settings of the whole network, fastest first.
        chosen: The setting of the stages' chosen granularities.
        current: The network's own setting, where it has one S and one G per stage.
    """

    device: AnyDevice
    network: NetworkShape
    batch_size: int
    rate: float
    rate_channel: float
    static_s: float
    stages: tuple[StageSearch, ...]
    settings: tuple[Setting, ...]
    chosen: Setting
    current: Setting | None

    def to_dict(self) -> dict[str, Any]:
        """The result as plain dicts and lists, times in seconds."""

        def plain(item: Choice | Setting) -> dict[str, Any]:
            return dict(vars(item))

        return {
            "device": self.device.name,
            "kind": self.device.kind,
            "network": self.network.name,
            "input_hw": list(self.network.input_hw),
            "batch_size": self.batch_size,
            "rate": self.rate,
            "rate_channel": self.rate_channel,
            "static_s": self.static_s,
            "stages": [
                {
                    "stage": found.stage,
                    "mode": found.mode,
                    "map_hw": list(found.map_hw),
                    "static_s": found.static_s,
                    "layer_s": found.layer_s,
                    "choices": [plain(choice) for choice in found.choices],
                    "chosen": found.chosen.granularity,
                    "chosen_channel": found.chosen.channel_granularity,
                }
                for found in self.stages
            ],
            "settings": [plain(setting) for setting in self.settings],
            "chosen": plain(self.chosen),
            "current": None if self.current is None else plain(self.current),
        }
