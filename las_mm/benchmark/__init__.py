"""Latency of a dynamic network against the best static engines of this machine."""

from las_mm.benchmark.contest import Contestant, time_contestants
from las_mm.drawn_masks import force_masks, release_masks

__all__ = ["Contestant", "force_masks", "release_masks", "time_contestants"]
