#!/usr/bin/env python
"""Print the JSON files of tools/benchmark.py as one Markdown table.

python dev/benchmark_table.py work_dirs/benchmark/*.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HEAD = (
    "| run | rate | fastest static, ms | masked-dense, ms | las_mm, ms | FLOPs ratio | "
    "latency ratio | efficiency |\n|---|---|---|---|---|---|---|---|"
)


def rows(path: Path) -> list[str]:
    """One line per rate of one file.

    Raises:
        KeyError, ValueError: Not a file of tools/benchmark.py.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    best = result["best_static"]
    masked = {row["engine"]: row["median_ms"] for row in result["rows"]}.get("masked-dense")
    lines = []
    for i, entry in enumerate(result.get("sweep") or [result | {"rate": None}]):
        rate = entry["rate"] if entry["rate"] is not None else result["environment"]["rate"]
        cells = [
            path.stem,
            f"{rate:.2f}",
            f"{best['median_ms']:.1f} ({best['engine']})",
            f"{masked:.1f}" if masked is not None and i == 0 else "",
            f"{entry['dynamic']['median_ms']:.1f}",
            f"{entry['flops_ratio']:.3f}",
            f"**{entry['latency_ratio']:.3f}**",
            f"{entry['efficiency']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    own = {row["engine"]: row["median_ms"] for row in result["rows"]}.get("las_mm-static")
    if own is not None:
        ratio = own / best["median_ms"]
        cells = [path.stem, "static form", "", "", f"{own:.1f}", "1.000", f"**{ratio:.3f}**", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("files", nargs="+", type=Path, metavar="JSON")
    lines = [HEAD]
    for path in parser.parse_args().files:
        try:
            lines += rows(path)
        except (OSError, KeyError, TypeError, ValueError) as error:
            sys.exit(f"benchmark_table.py: error: {path} is no benchmark result: {error!r}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
