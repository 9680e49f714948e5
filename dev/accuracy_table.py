"""Tables and plot of docs/accuracy.md from what ``evaluate_cifar.py`` wrote.

python dev/accuracy_table.py --results docs/accuracy --write docs/accuracy.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

NAMES = {
    "static": "static, 12 epochs (initialisation, teacher)",
    "static-more-s0": "static, 12 + 3 epochs, distilled",
    "shallow-s0": "static 2-3-4-2 blocks, 12 + 3 epochs, distilled",
    "spatial-0.5-s0": "spatial S=4-4-2-1, t=0.5",
    "both-0.5-s0": "both, t=0.5",
    "channel-0.5-s0": "channel G=2, t=0.5",
    "layer-0.5-s0": "layer, t=0.5",
    "layer-0.5-s1": "layer, t=0.5, seed 1",
    "layer-0.7-s0": "layer, t=0.7",
}
BASE = "static-more-s0"


def latency_of(latency: dict, name: str, batch: str) -> float | None:
    """Fastest milliseconds per image of a network; a dynamic one has one engine."""
    name = {"static": BASE, "layer-0.5-s1": "layer-0.5-s0"}.get(name, name)
    times = latency.get("ms", {}).get(batch, {})
    found = [v for k, v in times.items() if k.startswith(f"{name}: ") and "budget" not in k]
    return min(found) if found else None


def rows(accuracy: dict, latency: dict) -> list[str]:
    head = (
        "| network | top-1 | FLOPs ratio, training | inference | rate | latency, batch 1 | 8 | 64 "
        "| predicted, V100 | masks shuffled |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|---|---|"]
    for name, label in NAMES.items():
        row = accuracy.get(name)
        if row is None:
            continue
        rate = row["channel_rate"] if name.startswith("channel") else row["rate"]
        cells = [label, f"{row['top1']:.2f}"]
        cells += [f"{row['train_flops_ratio']:.3f}", f"{row['flops_ratio']:.3f}", f"{rate:.3f}"]
        for batch in ("1", "8", "64"):
            own, base = latency_of(latency, name, batch), latency_of(latency, BASE, batch)
            cells.append(f"{own / base:.2f}" if own and base else "")
        cells.append(f"{row['predicted_v100']:.2f}")
        cells.append(f"{row['shuffled_top1']:.2f}" if "shuffled_top1" in row else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def engines(latency: dict) -> list[str]:
    times = latency.get("ms", {})
    lines = ["| ms per image | batch 1 | 8 | 64 |", "|---|---|---|---|"]
    for name in times.get("1", {}):
        cells = [f"{times[b][name]:.3f}" if name in times.get(b, {}) else "" for b in times]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def budgets(accuracy: dict) -> list[str]:
    lines = [
        "| network | asked | FLOPs ratio | rate | offset | top-1 |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in accuracy.items():
        for asked, found in row.get("budgets", {}).items():
            lines.append(
                f"| {NAMES[name]} | {asked} | {found['flops_ratio']:.3f} | {found['rate']:.3f} | "
                f"{found['offset']:.2f} | {found['top1']:.2f} |"
            )
    return lines


def plot(accuracy: dict, latency: dict, out: Path, batch: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "las_mm"
    figure, axes = plt.subplots(figsize=(6.5, 4))
    static = [(latency_of(latency, n, batch), accuracy[n]["top1"]) for n in ("shallow-s0", BASE)]
    axes.plot(*zip(*static), "k-o", label="static, fastest engine")
    for name, label in NAMES.items():
        own = latency_of(latency, name, batch)
        if name in accuracy and own and "static" not in label:
            axes.plot(own, accuracy[name]["top1"], "o", label=label)
    for name, row in accuracy.items():
        time = latency.get("ms", {}).get(batch, {}).get(f"{name}: las_mm, budget 0.5")
        if time and "0.5" in row.get("budgets", {}):
            top1 = row["budgets"]["0.5"]["top1"]
            axes.plot(time, top1, "x", label=f"{NAMES[name]}, set_budget 0.5")
    axes.set_xlabel(f"measured ms per image, batch {batch}, 2 threads")
    axes.set_ylabel("top-1 on CIFAR-10, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("docs/accuracy"))
    parser.add_argument("--write", type=Path, default=Path("docs/accuracy.md"))
    parser.add_argument("--batch", default="64")
    args = parser.parse_args()
    accuracy = json.loads((args.results / "accuracy.json").read_text())
    file = args.results / "latency.json"
    latency = json.loads(file.read_text()) if file.exists() else {}
    text = args.write.read_text()
    tables = dict(results=rows(accuracy, latency), engines=engines(latency))
    tables["budgets"] = budgets(accuracy)
    for name, lines in tables.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, rest = text.split(begin)
        text = before + begin + "\n".join(lines) + "\n" + end + rest.split(end)[1]
    args.write.write_text(text)
    if latency:
        plot(accuracy, latency, args.results / "latency.svg", args.batch)


if __name__ == "__main__":
    main()
