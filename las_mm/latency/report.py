"""Reports: where time goes, as a tree that adds up."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_INDENT = "  "


@dataclass(frozen=True)
class Report:
    """Where the time of an operator, a block or a network goes.

    Reports add: ``a + b`` is a report named "sum" with both as children, ``sum(reports)`` works,
    and ``report * 0.5`` scales a report with its children.

    Args:
        name: What was costed.
        compute_s: Seconds of arithmetic.
        memory_s: Seconds of memory traffic.
        launch_s: Seconds of kernel launches.
        children: The parts, whose times sum to this report's.
    """

    name: str
    compute_s: float
    memory_s: float
    launch_s: float
    children: tuple[Report, ...] = ()

    @classmethod
    def group(cls, name: str, children: tuple[Report, ...] | list[Report]) -> Report:
        """A report named ``name`` that is the sum of ``children``."""
        return cls(
            name,
            math.fsum(c.compute_s for c in children),
            math.fsum(c.memory_s for c in children),
            math.fsum(c.launch_s for c in children),
            tuple(children),
        )

    @property
    def latency_s(self) -> float:
        """Total seconds: compute + memory + launch."""
        return self.compute_s + self.memory_s + self.launch_s

    def __add__(self, other: Report) -> Report:
        if not isinstance(other, Report):
            return NotImplemented
        left = self.children if self.name == "sum" else (self,)
        return Report.group("sum", left + (other,))

    def __radd__(self, other: int) -> Report:
        # sum() starts from 0
        return self if other == 0 else NotImplemented

    def __mul__(self, factor: float) -> Report:
        if isinstance(factor, bool) or not isinstance(factor, numbers.Real):
            return NotImplemented
        factor = float(factor)
        if not math.isfinite(factor) or factor < 0:
            raise ValueError(f"a report is scaled by a finite number >= 0, got {factor!r}")
        return Report(
            self.name,
            self.compute_s * factor,
            self.memory_s * factor,
            self.launch_s * factor,
            tuple(c * factor for c in self.children),
        )

    __rmul__ = __mul__

    def to_dict(self) -> dict[str, Any]:
        """The tree as plain dicts and lists, times in seconds."""
        return {
            "name": self.name,
            "latency_s": self.latency_s,
            "compute_s": self.compute_s,
            "memory_s": self.memory_s,
            "launch_s": self.launch_s,
            "children": [c.to_dict() for c in self.children],
        }

    def table(self, max_depth: int | None = None) -> str:
        """An indented tree with times in milliseconds, down to ``max_depth`` levels of children."""
        rows = list(self._rows(0, max_depth))
        width = max(len(label) for label, _ in rows + [("name", self)])
        columns = ("total ms", "compute", "memory", "launch")
        lines = [f"{'name':<{width}} " + " ".join(f"{column:>10}" for column in columns)]
        for label, report in rows:
            times = (report.latency_s, report.compute_s, report.memory_s, report.launch_s)
            lines.append(f"{label:<{width}} " + " ".join(f"{t * 1e3:>10.4f}" for t in times))
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def _rows(self, depth: int, max_depth: int | None) -> Iterator[tuple[str, Report]]:
        yield _INDENT * depth + self.name, self
        if max_depth is None or depth < max_depth:
            for child in self.children:
                yield from child._rows(depth + 1, max_depth)
