"""Evaluates what ``train_cifar.py`` trained: rates, both paths, shuffled masks, budgets; latency.

    python dev/evaluate_cifar.py --data cifar10 --weights work --out docs/accuracy
    python dev/evaluate_cifar.py --data cifar10 --weights work --out docs/accuracy --latency

The first writes accuracy.json, the second latency.json (nothing else should run meanwhile).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from las_mm.benchmark.static_engines import export_onnx
from train_cifar import load_data, logits_of, make_network, normalise, pack


def load(weights: Path, name: str, runtime: str = "auto") -> nn.Module:
    """A trained network in eval mode."""
    job = json.loads((weights / f"{name}.json").read_text())["job"]
    settings = {k: job[k] for k in ("mode", "granularity", "base", "blocks") if k in job}
    model = make_network(runtime=runtime, **settings)
    state = torch.load(weights / f"{name}.pth", weights_only=True)
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return model.eval()


def images_of(data: Path, work: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The 10,000 test images, normalised, their labels, and 500 training images."""
    if data.is_dir():
        packed = work / "cifar10.bin"
        if not packed.exists():
            pack(data, packed)
        data = packed
    arrays = load_data(data, 1)
    test, train = (torch.from_numpy(arrays[k]).permute(0, 3, 1, 2) for k in ("test", "train"))
    return normalise(test), torch.from_numpy(arrays["test_labels"]), normalise(train[::100])


@torch.inference_mode()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor, offsets=None) -> dict:
    """Top-1, FLOPs ratio and rates; ``offsets(i, n)`` forces decisions before each batch."""
    from las_mm.models import collect_activations
    from las_mm.models.flops import flops_report

    right, ratios, rates, channels, logits = 0, [], [], [], []
    for i in range(0, len(x), 250):
        if offsets is not None:
            offsets(i)
        out = logits_of(model, x[i : i + 250])
        right += (out.argmax(1) == y[i : i + 250]).sum().item()
        activation = collect_activations(model)
        ratios.append(flops_report(activation).ratio.item())
        rates.append(activation.mean_rate.item())
        channels.append(activation.mean_rate_channel.item())
        logits.append(out)
    return dict(
        top1=round(100 * right / len(x), 2),
        flops_ratio=round(float(np.mean(ratios)), 4),
        rate=round(float(np.mean(rates)), 4),
        channel_rate=round(float(np.mean(channels)), 4),
        logits=torch.cat(logits),
    )


@torch.inference_mode()
def shuffled(model: nn.Module, x: torch.Tensor, y: torch.Tensor, seed: int = 0) -> dict:
    """Every image runs with the masks of another one: the same rates, no routing."""
    from las_mm.drawn_masks import make_offsets, release_masks, set_offsets
    from las_mm.models import collect_activations

    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    masks: list[list] = []
    channels: list[list] = []
    for i in range(0, len(x), 250):
        logits_of(model, x[i : i + 250])
        activation = collect_activations(model)
        masks.append([None if m is None else m.bool().clone() for m in activation.masks])
        channels.append([None if m is None else m.bool().clone() for m in activation.masks_channel])
    joined = [
        [None if part[0] is None else torch.cat(part)[order] for part in zip(*kind)]
        for kind in (masks, channels)
    ]

    def offsets(i: int) -> None:
        cut = [make_offsets([None if m is None else m[i : i + 250] for m in k]) for k in joined]
        set_offsets(model.backbone, *cut)

    found = accuracy(model, x, y, offsets)
    release_masks(model.backbone)
    return found


@torch.inference_mode()
def predicted(model: nn.Module, x: torch.Tensor) -> float:
    """Latency ratio of the backbone that the analytical model predicts for a V100, batch 64."""
    from las_mm.hooks import PredictedLatencyHook
    from las_mm.models import collect_activations

    logits_of(model, x)
    hook = PredictedLatencyHook(device="v100", batch_size=64)
    return round(float(hook.predict(collect_activations(model)).ratio), 4)


def evaluate_all(args: argparse.Namespace) -> None:
    from las_mm import set_budget
    from las_mm.models.sparse import masked_dense

    x, y, calibration = images_of(args.data, args.weights)
    rows = json.loads(args.file.read_text()) if args.file.exists() else {}
    for path in sorted(args.weights.glob("*.pth")):
        name = path.stem
        if name in rows:
            if "predicted_v100" not in rows[name]:
                rows[name]["predicted_v100"] = predicted(load(args.weights, name), x[::20])
                args.file.write_text(json.dumps(rows, indent=1))
            continue
        began = time.time()
        model = load(args.weights, name, "sparse")
        trained = json.loads((args.weights / f"{name}.json").read_text())
        row = accuracy(model, x, y)
        logits = row.pop("logits")
        dynamic = trained["job"].get("mode", "static") != "static"
        n = 1000
        with masked_dense():
            dense = accuracy(model, x[:n], y[:n])["logits"]
        row["agree"] = (dense.argmax(1) == logits[:n].argmax(1)).float().mean().item()
        row["largest_error"] = ((dense - logits[:n]).abs().max() / dense.abs().max()).item()
        row["train_flops_ratio"] = round(trained["train_flops_ratio"], 4)
        row["parameters"] = sum(p.numel() for p in model.parameters())
        if dynamic:
            row["shuffled_top1"] = shuffled(model, x, y)["top1"]
            row["budgets"] = {}
            for target in args.budgets if name in args.curve else ():
                told = set_budget(model, target, calibration)
                found = accuracy(model, x, y)
                found.pop("logits")
                row["budgets"][f"{target}"] = dict(found, offset=told.offset)
        row["predicted_v100"] = predicted(load(args.weights, name), x[::20])
        rows[name] = row
        args.file.write_text(json.dumps(rows, indent=1))
        print(f"{name} ({time.time() - began:.0f} s): {row}", flush=True)


def measure(args: argparse.Namespace) -> None:
    """Milliseconds per image, learned masks, every network in turn; static ones on all engines."""
    from las_mm.benchmark import time_contestants

    torch.set_num_threads(args.threads)
    x, _, _ = images_of(args.data, args.weights)
    known = json.loads(args.file.read_text())
    result = dict(threads=args.threads, rounds=args.rounds, torch=torch.__version__, ms={})
    for batch in args.batches:
        contestants = []
        for path in sorted(args.weights.glob("*.pth")):
            name = path.stem
            job = json.loads(path.with_suffix(".json").read_text())["job"]
            if "-s1" in name or name == "static":  # as fast as others here
                continue
            static = job.get("mode", "static") == "static"
            forms = {"las_mm": load(args.weights, name)}
            if name in args.curve:
                model = load(args.weights, name)
                for masker in model.backbone.maskers():
                    masker.offset = torch.tensor(known[name]["budgets"]["0.5"]["offset"])
                forms["las_mm, budget 0.5"] = model
            if static:
                forms |= engines_of(args.weights, name, batch)
            for engine, model in forms.items():
                contestants.append(contestant(f"{name}: {engine}", model, x, batch))
        contestants = [c for c in contestants if c is not None]
        time_contestants(contestants, args.rounds, 1)
        result["ms"][f"{batch}"] = {c.engine: 1e3 * c.median / batch for c in contestants}
        result["rounds_ms"] = result.get("rounds_ms", {})
        result["rounds_ms"][f"{batch}"] = {
            c.engine: [round(1e3 * r / batch, 4) for r in c.rounds] for c in contestants
        }
        (args.out / "latency.json").write_text(json.dumps(result, indent=1))
        for engine, value in sorted(result["ms"][f"{batch}"].items(), key=lambda e: e[1]):
            print(f"batch {batch}: {engine:45} {value:.3f} ms/image", flush=True)


def engines_of(weights: Path, name: str, batch: int) -> dict:
    """The same static network on ONNX Runtime and OpenVINO, and compiled."""
    found: dict = {}
    model = load(weights, name, "dense")

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images):
            return logits_of(self.model, images)

    whole, example = Whole().eval(), torch.zeros(batch, 3, 32, 32)
    file = weights / f"{name}-{batch}.onnx"
    try:
        if not file.exists():
            export_onnx(whole, example, file, ["logits"])
    except Exception as error:
        print(f"no ONNX: {error}")
        return found
    try:
        import openvino

        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        request = core.compile_model(str(file), "CPU", settings).create_infer_request()
        found["OpenVINO"] = lambda images, r=request: r.infer([images.numpy()], share_inputs=True)
    except ImportError:
        print("no openvino")
    try:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )
        found["ONNX Runtime"] = lambda images, s=session: s.run(None, {"x": images.numpy()})
    except ImportError:
        print("no onnxruntime")
    return found


def contestant(name: str, model, x: torch.Tensor, batch: int):
    """Runs through other images with every call, as the number of kept patches depends on them."""
    from las_mm.benchmark import Contestant

    plain = not isinstance(model, nn.Module)
    starts = range(0, 64 * 16, batch) if batch < 64 else range(0, 64 * 16, 64)
    step = max(1, len(x) // len(starts))
    batches = [x[(i * step) % (len(x) - batch) :][:batch] for i in range(len(starts))]
    if plain:
        batches = [b.contiguous() for b in batches]
    else:
        batches = [b.clone(memory_format=torch.channels_last) for b in batches]
    turn = [0]

    @torch.inference_mode()
    def run():
        turn[0] += 1
        images = batches[turn[0] % len(batches)]
        return model(images) if plain else logits_of(model, images)

    return Contestant(name, "ours", run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/accuracy"))
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.3, 0.4, 0.5, 0.6, 0.7])
    parser.add_argument(
        "--curve", nargs="*", default=["spatial-0.5-s0", "both-0.5-s0", "layer-0.7-s0"]
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.file = args.out / "accuracy.json"
    measure(args) if args.latency else evaluate_all(args)


if __name__ == "__main__":
    main()
