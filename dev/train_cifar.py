"""Trains the networks of docs/accuracy.md on CIFAR-10: a queue of jobs side by side on one GPU.

The loop is lean (images on the device, augmentation in batches, no runner); the networks, their
temperature, budget, bounds and distillation are the package's own. One command does everything
and goes on where it was stopped:

    python dev/train_cifar.py --data cifar10 --work-dir work --seconds 600

``--data`` is a folder with train/CLASS/*.jpg and test/CLASS/*.jpg, or what ``--pack`` made of one:
one file with the JPEGs' common header stored once.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import multiprocessing as mp
import os
import pickle
import tarfile
import time
import traceback
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

BASE = 40
BLOCKS = (2, 3, 3, 1)
SHRUNK_BASE, SHRUNK_BLOCKS = 32, (1, 2, 2, 1)  # about as fast as the dynamic ones
MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)


# ---------------------------------------------------------------- networks
def make_network(
    mode="static", granularity=(4, 4, 2, 1), base=BASE, blocks=BLOCKS, runtime="auto"
) -> nn.Module:
    """An ``ImageClassifier``: a thin bottleneck ResNet for 32 x 32, its stem 3 x 3, stride 1."""
    from mmpretrain.models import ImageClassifier

    from las_mm.models import LASResNet
    from las_mm.models.bottleneck import DynamicBottleneck

    class Thin(LASResNet):
        arch_settings = {50: (DynamicBottleneck, tuple(blocks))}

    backbone = Thin(
        50,
        mode=mode,
        granularity=tuple(granularity),
        base_channels=base,
        stem_channels=base,
        out_indices=(3,),
        style="pytorch",
        runtime=runtime,
    )
    backbone.conv1 = nn.Conv2d(3, base, 3, padding=1, bias=False)
    backbone.maxpool = nn.Identity()
    model = ImageClassifier(
        backbone=dict(type="mmpretrain.ResNet", depth=18),
        neck=dict(type="GlobalAveragePooling"),
        head=dict(type="LinearClsHead", num_classes=10, in_channels=32 * base, topk=(1,)),
    )
    model.backbone = backbone
    return model


def logits_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Images (N, 3, 32, 32), normalised -> (N, 10)."""
    return model.head(model.extract_feat(x))


# ---------------------------------------------------------------- jobs
def jobs(scratch: float, tune: float) -> list[dict]:
    """All jobs, the most valuable first.

    The static network of full size, trained for ``scratch`` epochs, is initialisation and teacher
    of those that are tuned for ``tune`` epochs; the shrunk static ones learn from the same teacher
    for as many epochs as both together.
    """
    made: list[dict] = []

    def add(name: str, seed: int = 0, **settings) -> None:
        made.append(dict(name=f"{name}-s{seed}", seed=seed, teacher="static", **settings))

    def tuned(name: str, seed: int = 0, **settings) -> None:
        add(name, seed, epochs=tune, init="static", **settings)

    def dynamic(mode: str, target: float = 0.5, seed: int = 0, **settings) -> None:
        tuned(f"{mode}-{target}", seed, mode=mode, target=target, **settings)

    def variant(what: str, **settings) -> None:
        tuned(f"spatial-0.5-{what}", mode="spatial", target=0.5, **settings)

    def shrunk(seed: int) -> None:
        add("narrow", seed, epochs=scratch + tune, base=SHRUNK_BASE)
        add("shallow", seed, epochs=scratch + tune, blocks=SHRUNK_BLOCKS)

    modes = ("spatial", "layer", "channel", "both")
    made.append(dict(name="static", seed=0, epochs=scratch))
    for mode in modes:
        dynamic(mode)
    tuned("static-more")
    shrunk(0)
    dynamic("spatial", 0.7)
    dynamic("layer", 0.7)
    dynamic("spatial", 0.3)
    dynamic("layer", 0.3)
    variant("fine", granularity=(1, 1, 1, 1))
    variant("no-distillation", distill=0.0)
    variant("no-bounds", bounds=0.0)
    variant("no-fading", fade=None)
    for mode in modes:
        dynamic(mode, seed=1)
    variant("latency", metric="latency")
    shrunk(1)
    for mode in modes:
        dynamic(mode, seed=2)
    tuned("spatial-0.5-twice", mode="spatial", target=0.5, longer=2)
    shrunk(2)
    tuned("static-more", 1)
    tuned("static-more", 2)
    return made


# ---------------------------------------------------------------- data
def split_jpeg(data: bytes) -> tuple[bytes, bytes]:
    """What stands before the compressed pixels, and these."""
    i = 2
    while True:
        marker, length = data[i + 1], int.from_bytes(data[i + 2 : i + 4], "big")
        i += 2 + length
        if marker == 0xDA:
            return data[:i], data[i:]


def pack(folder: Path, out: Path, every: int = 1) -> None:
    """Write all training images and the test images, or some, to one file."""
    heads: dict[bytes, int] = {}
    found = []
    for part in ("train", "test"):
        for label, name in enumerate(sorted(p.name for p in (folder / part).iterdir())):
            files = sorted((folder / part / name).glob("*.jpg"))
            for file in files if part == "train" else files[::every]:
                head, rest = split_jpeg(file.read_bytes())
                found.append((part == "test", label, heads.setdefault(head, len(heads)), rest))
    out.write_bytes(pickle.dumps((list(heads), found), protocol=5))


def _decode(chunk: list[bytes]) -> np.ndarray:
    import cv2

    return np.stack([cv2.imdecode(np.frombuffer(b, np.uint8), 1)[..., ::-1] for b in chunk])


def load_data(path: Path, processes: int) -> dict[str, np.ndarray]:
    """Images uint8 (N, 32, 32, 3) in RGB, and labels, of 'train' and 'test'."""
    heads, found = pickle.loads(path.read_bytes())
    files = [heads[h] + rest for _, _, h, rest in found]
    chunks = [files[i : i + 1000] for i in range(0, len(files), 1000)]
    if processes > 1:
        with mp.get_context("fork").Pool(processes) as pool:
            images = np.concatenate(pool.map(_decode, chunks))
    else:
        images = np.concatenate([_decode(chunk) for chunk in chunks])
    test = np.array([f[0] for f in found])
    labels = np.array([f[1] for f in found])
    return {
        "train": images[~test],
        "train_labels": labels[~test],
        "test": images[test],
        "test_labels": labels[test],
    }


@lru_cache
def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))


def normalise(x: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) -> float32, channels last."""
    mean, std = _statistics(x.device)
    return ((x.float() - mean) / std).contiguous(memory_format=torch.channels_last)


def augment(padded: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Crops of 32 from images padded by 4, flipped half of the time.

    Nothing flat is put into them (holes, borders of zeros): flat patches are skipped first, and a
    network that trained on such images would compute more on others.
    """
    n, device = len(index), padded.device
    span = torch.arange(32, device=device)
    rows = torch.randint(0, 9, (n, 1), device=device) + span
    columns = span.expand(n, 32)
    flip = torch.rand(n, 1, device=device) < 0.5
    columns = torch.randint(0, 9, (n, 1), device=device) + torch.where(flip, 31 - columns, columns)
    channels = torch.arange(3, device=device).view(1, 3, 1, 1)
    at = index.view(n, 1, 1, 1), channels, rows.view(n, 1, 32, 1), columns.view(n, 1, 1, 32)
    return normalise(padded[at])


# ---------------------------------------------------------------- one job
def write_atomically(path: Path, write) -> None:
    """``write(temporary)``, then rename."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    write(part)
    os.replace(part, path)


@torch.no_grad()
def evaluate(model: nn.Module, x: torch.Tensor, y: torch.Tensor, batch: int = 500) -> dict:
    """Top-1 and, of a dynamic network, FLOPs ratio and mean rates."""
    from las_mm.models import collect_activations
    from las_mm.models.flops import flops_report

    model.eval()
    right, ratios, rates, channels = 0, [], [], []
    for i in range(0, len(x), batch):
        out = logits_of(model, normalise(x[i : i + batch]))
        right += (out.argmax(1) == y[i : i + batch]).sum().item()
        activation = collect_activations(model)
        ratios.append(flops_report(activation).ratio.item())
        rates.append(activation.rates.tolist())
        channels.append(activation.rates_channel.tolist())
    return dict(
        top1=100 * right / len(x),
        flops_ratio=float(np.mean(ratios)),
        rates=np.mean(rates, 0).round(4).tolist(),
        rates_channel=np.mean(channels, 0).round(4).tolist(),
    )


def schedule(job: dict, budget, steps: int, peak: float) -> np.ndarray:
    """Learning rate, temperature, noise and both bounds of every step, (steps, 5)."""
    from las_mm.hooks import TemperatureHook

    warm = 0.1 if "init" in job else 0.2
    hook = TemperatureHook(5.0, 0.1, noise_fade=job.get("fade", (0.5, 0.75)))
    table = np.empty((steps, 5), np.float32)
    for step in range(steps):
        progress = step / steps
        if progress < warm:
            factor = (step + 1) / (warm * steps)
        else:
            factor = 0.5 * (1 + math.cos(math.pi * (progress - warm) / (1 - warm)))
        table[step] = (
            peak * min(1.0, factor),
            hook.temperature(step, steps),
            hook.noise(step, steps),
            *budget.bounds(progress),
        )
    return table


class Step:
    """One step of training: on a GPU captured once as a CUDA graph, then replayed.

    All that changes from step to step is read from tensors on the device, by a counter there.
    """

    def __init__(self, body: Callable[[], None], device: str, eager: bool = False) -> None:
        self.body = body
        self.graph = None
        # cuDNN tries its algorithms, and the optimiser makes its state, before the capture.
        self.eager_steps = 4 if device == "cuda" and not eager else -1
        self.stream = torch.cuda.Stream() if device == "cuda" else None

    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        if self.eager_steps < 0:
            self.body()
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            if self.eager_steps > 0:
                self.body()
        torch.cuda.current_stream().wait_stream(self.stream)
        if self.eager_steps == 0:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                self.body()
            self.graph = graph
            graph.replay()
        self.eager_steps -= 1


def train(job: dict, data: dict[str, torch.Tensor], args: argparse.Namespace) -> str:
    """Train one job, or go on with it; ``'done'`` or ``'stopped'``."""
    from evaluate_cifar import shuffled
    from las_mm.losses import BudgetLoss
    from las_mm.models import collect_activations
    from las_mm.models.distill import distillation
    from las_mm.models.flops import flops_report

    work, device = Path(args.work_dir), args.device
    final, partial = work / f"{job['name']}.pth", work / f"{job['name']}.partial"
    if final.exists():
        return "done"
    torch.manual_seed(1000 + job["seed"])
    arch = {k: job[k] for k in ("base", "blocks") if k in job}
    dynamic = {k: job[k] for k in ("mode", "granularity") if k in job}
    model = make_network(**arch, **dynamic)
    model.init_weights()
    if "init" in job:
        weights = torch.load(work / f"{job['init']}.pth", weights_only=True)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if unexpected or any("masker" not in key for key in missing):
            raise ValueError(f"{job['init']} does not fit {job['name']}: {missing}, {unexpected}")
    model.to(device, memory_format=torch.channels_last)
    distill = job.get("distill", 0.5)
    teacher = None
    if "teacher" in job and distill:
        teacher = make_network()
        teacher.load_state_dict(torch.load(work / f"{job['teacher']}.pth", weights_only=True))
        teacher.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    images, labels = data["padded"], data["train_labels"]
    batch = args.batch_size
    per_epoch = len(images) // batch
    steps = max(2, round(job["epochs"] * job.get("longer", 1) * per_epoch))
    latency = job.get("metric") == "latency"
    budget = BudgetLoss(
        args.latency_target if latency else job.get("target", 0.5),
        network_weight=10.0,
        bounds_weight=job.get("bounds", 10.0),
        **(dict(metric="latency", device="v100", batch_size=64) if latency else {}),
    )
    peak = (args.tune_lr if "init" in job else args.lr) * batch / 512
    table = torch.from_numpy(schedule(job, budget, steps, peak)).to(device)
    now = table[0].clone()
    counter = torch.zeros((), dtype=torch.long, device=device)
    order = torch.zeros(per_epoch * batch, dtype=torch.long, device=device)
    span = torch.arange(batch, device=device)
    ratio, last_loss = torch.ones(2, device=device).unbind()
    is_dynamic = job.get("mode", "static") != "static"
    for masker in model.backbone.maskers() if is_dynamic else ():
        masker.temperature, masker.noise = now[1], now[2]
    budget.bounds = lambda progress: (now[3], now[4])
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.SGD(
        [dict(params=decay, weight_decay=5e-4), dict(params=rest, weight_decay=0.0)],
        lr=now[0],
        momentum=0.9,
        nesterov=True,
        fused=True,
    )
    step, spent = 0, 0.0
    if partial.exists():
        state = torch.load(partial, weights_only=True)
        model.load_state_dict(state["model"])
        for parameter, momentum in zip(decay + rest, state["momenta"]):
            optimizer.state[parameter]["momentum_buffer"] = momentum.to(device)
        step, spent = state["step"], state["spent"]
        counter.fill_(step)
        torch.set_rng_state(state["rng"])
        if device == "cuda":
            torch.cuda.set_rng_state(state["rng_device"])
    began = saved = time.time()

    def save() -> None:
        state = dict(
            model=model.state_dict(),
            momenta=[optimizer.state[p]["momentum_buffer"] for p in decay + rest],
            step=step,
            spent=spent + time.time() - began,
            rng=torch.get_rng_state(),
        )
        if device == "cuda":
            state["rng_device"] = torch.cuda.get_rng_state()
        write_atomically(partial, lambda part: torch.save(state, part))

    def body() -> None:
        now.copy_(table.index_select(0, counter.view(1))[0])
        index = order[(counter % per_epoch) * batch + span]
        x, y = augment(images, index), labels[index]
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            out = logits_of(model, x)
            if teacher is not None:
                with torch.no_grad():
                    wanted = logits_of(teacher, x)
        loss = F.cross_entropy(out.float(), y)
        if teacher is not None:
            loss = loss + distill * distillation(out, wanted, 4.0)
        if is_dynamic:
            activation = collect_activations(model)
            report = flops_report(activation)
            loss = loss + budget(activation, 0.0, report)
            ratio.copy_(report.ratio.detach())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        last_loss.copy_(loss.detach())
        counter.add_(1)

    model.train()
    epoch = -1
    ratios: list[torch.Tensor] = []
    advance = Step(body, device, eager=latency or args.eager)
    while step < steps:
        if step % 20 == 0:
            if device == "cuda":
                torch.cuda.synchronize()
            if time.time() > args.deadline and step:
                save()
                return "stopped"
            if time.time() - saved > args.save_every:
                save()
                saved = time.time()
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            shuffle = torch.Generator().manual_seed(7919 * job["seed"] + epoch + 1)
            order.copy_(torch.randperm(len(images), generator=shuffle)[: len(order)])
        advance()
        if step >= steps - 20:
            ratios.append(ratio.clone())
        step += 1
    seconds = spent + time.time() - began
    result = evaluate(model, data["test"], data["test_labels"])
    if is_dynamic:
        test = normalise(data["test"])
        result["shuffled_top1"] = shuffled(model, test, data["test_labels"])["top1"]
    result.update(
        job=job,
        steps=steps,
        batch_size=batch,
        seconds=round(seconds, 1),
        loss=last_loss.item(),
        train_flops_ratio=torch.stack(ratios).mean().item(),
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        native_ops=args.native,
    )
    weights = {k: v.cpu().contiguous() for k, v in model.state_dict().items()}
    write_atomically(
        work / f"{job['name']}.json", lambda part: part.write_text(json.dumps(result, indent=1))
    )
    write_atomically(final, lambda part: torch.save(weights, part))
    partial.unlink(missing_ok=True)
    return "done"


# ---------------------------------------------------------------- the queue
def _worker(number: int, todo, done, args: argparse.Namespace) -> None:
    import mmpretrain.models  # noqa: F401  (takes seconds, while the images are decoded)

    from las_mm import hooks, losses, ops  # noqa: F401

    device = args.device
    args.native = bool(ops.has_kernels(device))
    torch.set_num_threads(args.threads)
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        torch.zeros(1, device=device)
    done.put((number, "", "ready", 0.0))
    job = todo.get()
    if job is None:
        return
    arrays = {path.stem: np.load(path) for path in (args.work_dir / "arrays").glob("*.npy")}
    data = {k: torch.from_numpy(np.ascontiguousarray(v)).to(device) for k, v in arrays.items()}
    data["padded"] = F.pad(
        data.pop("train").permute(0, 3, 1, 2).float(), (4,) * 4, mode="reflect"
    ).byte()
    data["test"] = data["test"].permute(0, 3, 1, 2)
    while job is not None:
        began = time.time()
        try:
            found = train(job, data, args)
        except Exception:
            traceback.print_exc()
            found = "failed"
        done.put((number, job["name"], found, time.time() - began))
        job = todo.get()


def bundle(work: Path, out: Path, order: list[str], limit: int, part: int = 15 << 20) -> None:
    """Write results, and weights as float16 not written before, to parts of one tar.

    At most ``limit`` bytes of weights, the first in order first; join the parts with ``cat``.
    """
    told = work / "bundled.json"
    before = set(json.loads(told.read_text())) if told.exists() else set()
    stream = io.BytesIO()
    taken, total = [], 0
    with tarfile.open(fileobj=stream, mode="w") as tar:

        def add(name: str, blob: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))

        for name in order:
            if (work / f"{name}.json").exists():
                add(f"{name}.json", (work / f"{name}.json").read_bytes())
        for name in order:
            path = work / f"{name}.pth"
            if name in before or not path.exists() or "-s1" in name or "-s2" in name:
                continue
            weights = torch.load(path, weights_only=True)
            half = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
            blob = io.BytesIO()
            torch.save(half, blob)
            total += len(blob.getvalue())
            if total > limit:
                break
            add(path.name, blob.getvalue())
            taken.append(name)
    out.mkdir(parents=True, exist_ok=True)
    data = stream.getvalue()
    for i in range(0, len(data), part):
        piece = data[i : i + part]
        write_atomically(out / f"weights.tar.{i // part}", lambda p, b=piece: p.write_bytes(b))
    write_atomically(told, lambda p: p.write_text(json.dumps(sorted(before | set(taken)))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pack", type=Path, help="only pack the folder --data into this file")
    parser.add_argument("--work-dir", type=Path, default=Path("work"))
    parser.add_argument("--out", type=Path, help="folder for a bundle of results and weights")
    parser.add_argument("--limit", type=int, default=58 << 20, help="bytes of weights in it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--decoders", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=600, help="from --start to the end")
    parser.add_argument("--start", type=float, default=time.time(), help="seconds since 1970")
    parser.add_argument("--save-every", type=float, default=60)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--scratch", type=float, default=30, help="epochs of the static networks")
    parser.add_argument("--tune", type=float, default=10, help="epochs of the others")
    parser.add_argument("--lr", type=float, default=0.6)
    parser.add_argument("--tune-lr", type=float, default=0.2)
    parser.add_argument("--latency-target", type=float, default=0.75)
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--only", nargs="*", help="names of jobs")
    parser.add_argument("--subset", type=int, help="training images, for a trial")
    args = parser.parse_args()
    if args.pack:
        pack(args.data, args.pack)
        return
    data = args.data
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if data.is_dir():
        data = args.work_dir / "cifar10.bin"
        pack(args.data, data)
    args.deadline = args.start + args.seconds
    context = mp.get_context("spawn")
    todo, done = context.Queue(), context.Queue()
    workers = [
        context.Process(target=_worker, args=(i, todo, done, args), daemon=True)
        for i in range(args.workers)
    ]
    for worker in workers:
        worker.start()
    arrays = load_data(data, args.decoders)
    if args.subset:
        arrays = {k: v[:: max(1, len(v) // args.subset)] for k, v in arrays.items()}
    (args.work_dir / "arrays").mkdir(exist_ok=True)
    for name, array in arrays.items():
        np.save(args.work_dir / "arrays" / f"{name}.npy", array)
    print(f"{time.time() - args.start:.0f} s: {len(arrays['train'])} images decoded", flush=True)
    queue = jobs(args.scratch, args.tune)
    if args.only:
        queue = [job for job in queue if job["name"] in args.only]
    order = [job["name"] for job in queue]
    finished = {name for name in order if (args.work_dir / f"{name}.pth").exists()}
    waiting = [job for job in queue if job["name"] not in finished]
    running = 0
    while waiting or running:
        for job in list(waiting):
            needs = {job[k] for k in ("init", "teacher") if k in job}
            if running < args.workers and needs <= finished and time.time() < args.deadline:
                todo.put(job)
                waiting.remove(job)
                running += 1
        if not running:
            break
        try:
            number, name, found, seconds = done.get(timeout=1)
        except Exception:
            late = time.time() > args.deadline + 5
            if late or not any(worker.is_alive() for worker in workers):
                print("workers are late or dead", flush=True)
                break
            continue
        if found == "ready":
            print(f"{time.time() - args.start:.0f} s: worker {number} ready", flush=True)
            continue
        running -= 1
        if found == "done":
            finished.add(name)
            told = json.loads((args.work_dir / f"{name}.json").read_text())
            found = f"top-1 {told['top1']:.2f} FLOPs {told['flops_ratio']:.3f}"
        print(f"{time.time() - args.start:.0f} s: {name} {found} ({seconds:.0f} s)", flush=True)
    for worker in workers:
        worker.terminate()
    if args.out:
        bundle(args.work_dir, args.out, order, args.limit)
    print(
        f"{time.time() - args.start:.0f} s: end, {len(finished)} of {len(order)} done", flush=True
    )


if __name__ == "__main__":
    main()
