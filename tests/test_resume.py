"""Being killed costs nothing but time: training resumes exactly, checkpoints stay whole."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from las_mm import fileio
from las_mm.hooks import AtomicCheckpointHook
from las_mm.hooks.checkpoint import AtomicLocalBackend

ROOT = Path(__file__).resolve().parents[1]
PER_EPOCH = 3  # iterations
EPOCHS = 4
PATIENCE = 1200  # seconds that a process may take on a busy machine
KEYS = ("loss", "loss_rpn_cls", "loss_mask", "loss_budget", "flops_ratio", "grad_norm", "lr")


def start(config: Path, *args: str) -> subprocess.Popen:
    command = [sys.executable, "tools/train.py", str(config), *args]
    log = open(config.with_suffix(".log"), "a")  # noqa: SIM115 - the process writes to it
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # atomics on a GPU add in any order
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a group of its own, data workers included
    )


def finish(process: subprocess.Popen, config: Path) -> None:
    code = process.wait(PATIENCE)
    assert code == 0, config.with_suffix(".log").read_text()[-3000:]


def scalars(work_dir: Path, run: int = -1) -> dict[int, dict]:
    """{iteration counted from 1: logged values} of one start in a work folder."""
    logs = sorted(work_dir.glob("*/vis_data/scalars.json"))
    if not logs:
        return {}
    lines = logs[run].read_text().splitlines(keepends=True)
    entries = (json.loads(line) for line in lines if line.endswith("\n"))
    return {entry["iter"]: entry for entry in entries if "loss" in entry}


def assert_same_training(found: dict[int, dict], reference: dict[int, dict]) -> None:
    for iteration, entry in found.items():
        for key in KEYS:
            expected = reference[iteration][key]
            assert entry[key] == pytest.approx(expected, rel=1e-6), (iteration, key)


def load(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=False)


@pytest.fixture(scope="module")
def options() -> dict:
    # One data worker, flips and IterationSeedHook come with the tiny config.
    return {"train_cfg.max_epochs": EPOCHS, "train_cfg.val_begin": 1000}


@pytest.fixture(scope="module")
def uninterrupted(tiny_config, options, tmp_path_factory) -> Path:
    """Work folder of a whole training whose config names no seed."""
    work_dir = tmp_path_factory.mktemp("uninterrupted")
    config = tiny_config(work_dir, **options)
    assert "randomness" not in config.read_text()
    finish(start(config), config)
    assert sorted(scalars(work_dir)) == list(range(1, EPOCHS * PER_EPOCH + 1))
    return work_dir


def test_killed_training_resumes_as_if_nothing_happened(
    uninterrupted, tiny_config, options, tmp_path
):
    reference = scalars(uninterrupted)
    seed = load(uninterrupted / "epoch_1.pth")["meta"]["seed"]
    config = tiny_config(tmp_path, **options, randomness=dict(seed=seed))
    kill_after = PER_EPOCH + 1 + random.SystemRandom().randrange(2 * PER_EPOCH)
    process = start(config)
    deadline = time.monotonic() + PATIENCE
    while max(scalars(tmp_path), default=0) < kill_after and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(PATIENCE) == -signal.SIGKILL
    first = scalars(tmp_path)
    assert kill_after <= max(first) < EPOCHS * PER_EPOCH
    assert_same_training(first, reference)

    saved = load(Path((tmp_path / "last_checkpoint").read_text()))["meta"]
    assert 0 < saved["iter"] <= max(first)
    finish(start(config, "--resume"), config)
    resumed = scalars(tmp_path)
    assert sorted(resumed) == list(range(saved["iter"] + 1, EPOCHS * PER_EPOCH + 1))
    assert_same_training(resumed, reference)
    final = [load(folder / f"epoch_{EPOCHS}.pth") for folder in (uninterrupted, tmp_path)]
    for key, weight in final[0]["state_dict"].items():
        torch.testing.assert_close(final[1]["state_dict"][key], weight, rtol=1e-5, atol=1e-7)


def test_seed_of_a_resumed_training_comes_from_the_checkpoint(
    uninterrupted, tiny_config, options, tmp_path
):
    config = tiny_config(tmp_path, **options)
    checkpoint = shutil.copy(uninterrupted / "epoch_2.pth", tmp_path)
    (tmp_path / "last_checkpoint").write_text(str(checkpoint))
    finish(start(config, "--resume"), config)
    resumed = scalars(tmp_path)
    assert sorted(resumed) == list(range(2 * PER_EPOCH + 1, EPOCHS * PER_EPOCH + 1))
    assert_same_training(resumed, scalars(uninterrupted))


# ---- one checkpoint


def die(*args, **kwargs) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class HalfWrittenFile:
    """A file whose process is killed in the middle of the first write."""

    def __init__(self, *args) -> None:
        self.file = open(*args)  # noqa: SIM115

    def __enter__(self) -> HalfWrittenFile:
        return self

    def __exit__(self, *args) -> None: ...

    def write(self, data: bytes) -> None:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        die()


def exit_code_of_a_fork(function, *args) -> int:
    """Run ``function`` in a copy of this process, which it may kill."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join(PATIENCE)
    return process.exitcode


MOMENTS = {
    "before a byte is written": (fileio, "open", die),
    "in the middle of the bytes": (fileio, "open", HalfWrittenFile),
    "before they are on the disk": (os, "fsync", die),
    "before the file gets its name": (os, "replace", die),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_while_writing_leaves_the_old_file(moment, tmp_path):
    path = tmp_path / "epoch_1.pth"
    path.write_bytes(b"old")

    def put() -> None:
        owner, name, value = MOMENTS[moment]
        setattr(owner, name, value)
        AtomicLocalBackend().put(b"new" * 100_000, path)

    assert exit_code_of_a_fork(put) == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    if moment != "before a byte is written":  # the test did interrupt it
        (draft,) = tmp_path.glob(".epoch_1.pth.draft-*")
        assert draft.stat().st_size == 300_000 // (2 if "middle" in moment else 1)


def test_put_replaces_the_whole_file(tmp_path):
    path = tmp_path / "folder" / "epoch_1.pth"
    backend = AtomicLocalBackend()
    for content in (b"a longer content", b"short"):
        backend.put(content, path)
        assert path.read_bytes() == content
    backend.put_text("\N{LATIN SMALL LETTER E WITH ACUTE}", path)
    assert path.read_text("utf-8") == "\u00e9"
    assert list(path.parent.iterdir()) == [path]


class FakeRunner:
    """What CheckpointHook needs of a runner, around mmengine's own save_checkpoint."""

    def __init__(self, work_dir: Path) -> None:
        from mmengine.logging import MessageHub, MMLogger

        self.work_dir = str(work_dir)
        self.timestamp = "now"
        self.message_hub = MessageHub.get_instance(f"resume-{work_dir}")
        self.logger = MMLogger.get_instance("resume")
        self.model = nn.Linear(2, 2)
        self.epoch = self.iter = 0
        self.max_epochs = 100

    def save_checkpoint(self, out_dir, filename, meta, backend_args, **_) -> None:
        from mmengine.runner.checkpoint import save_checkpoint

        content = dict(meta=meta, state_dict=self.model.state_dict())
        save_checkpoint(content, os.path.join(out_dir, filename), backend_args=backend_args)

    def train_epochs(self, hook, count: int) -> None:
        for _ in range(count):
            hook.after_train_epoch(self)
            self.epoch += 1
            self.iter += PER_EPOCH


@pytest.fixture
def runner(tmp_path):
    return FakeRunner(tmp_path)


@pytest.fixture
def hook(runner):
    hook = AtomicCheckpointHook(interval=1, max_keep_ckpts=2)
    hook.before_train(runner)
    return hook


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pth"))


def last(folder: Path) -> Path:
    return Path((folder / "last_checkpoint").read_text())


def test_hook_keeps_as_many_checkpoints_as_asked_and_no_drafts(hook, runner, tmp_path):
    runner.train_epochs(hook, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "epoch_3.pth",
        "epoch_4.pth",
        "last_checkpoint",
    ]
    assert last(tmp_path) == tmp_path / "epoch_4.pth"
    assert load(last(tmp_path))["meta"] == dict(epoch=4, iter=3 * PER_EPOCH)


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_failed_write_costs_no_checkpoint(broken, hook, runner, tmp_path, monkeypatch):
    runner.train_epochs(hook, 2)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, fail)
        with pytest.raises(OSError, match="disk full"):
            runner.train_epochs(hook, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "epoch_1.pth",
        "epoch_2.pth",
        "last_checkpoint",
    ]
    assert last(tmp_path) == tmp_path / "epoch_2.pth"


def test_order_is_checkpoint_then_marker_then_removal(hook, runner, tmp_path, monkeypatch):
    runner.train_epochs(hook, 2)
    events = []
    replace, unlink = os.replace, Path.unlink

    def spy_replace(source, target):
        assert load(source) if str(target).endswith(".pth") else True  # complete before renamed
        events.append(("write", Path(target).name))
        replace(source, target)

    def spy_unlink(path, missing_ok=False):
        if ".draft-" not in path.name:
            events.append(("remove", path.name))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(os, "replace", spy_replace)
    monkeypatch.setattr(Path, "unlink", spy_unlink)
    runner.train_epochs(hook, 1)
    assert events == [
        ("write", "epoch_3.pth"),
        ("write", "last_checkpoint"),
        ("remove", "epoch_1.pth"),
    ]


def test_stray_drafts_do_not_disturb(hook, runner, tmp_path):
    from mmengine.runner import find_latest_checkpoint

    runner.train_epochs(hook, 1)
    strays = [tmp_path / f".{name}.draft-1" for name in ("epoch_2.pth", "last_checkpoint")]
    strays.append(tmp_path / f".epoch_2.pth.draft-{os.getpid()}")  # of a process with our number
    for stray in strays:
        stray.write_bytes(b"half a checkpoi")
    assert find_latest_checkpoint(str(tmp_path)) == str(tmp_path / "epoch_1.pth")
    runner.train_epochs(hook, 2)
    assert checkpoints(tmp_path) == ["epoch_2.pth", "epoch_3.pth"]
    assert load(last(tmp_path))["meta"]["epoch"] == 3


def test_resumed_hook_goes_on_removing(hook, runner, tmp_path):
    runner.train_epochs(hook, 2)
    resumed = AtomicCheckpointHook(interval=1, max_keep_ckpts=2)
    resumed.before_train(runner)
    runner.train_epochs(resumed, 1)
    assert checkpoints(tmp_path) == ["epoch_2.pth", "epoch_3.pth"]


@pytest.mark.parametrize(
    ("kind", "number", "complete"),
    [("fsync", 1, 2), ("replace", 1, 2), ("fsync", 2, 3), ("replace", 2, 3)],
    ids=["writing", "naming", "writing the marker", "naming the marker"],
)
def test_kill_in_the_hook_leaves_a_good_last_checkpoint(
    kind, number, complete, hook, runner, tmp_path
):
    runner.train_epochs(hook, 2)

    def train() -> None:
        original, calls = getattr(os, kind), iter(range(1, 10))
        setattr(os, kind, lambda *a: die() if next(calls) == number else original(*a))
        runner.train_epochs(hook, 1)

    assert exit_code_of_a_fork(train) == -signal.SIGKILL
    # The marker is behind at worst, and nothing that it could have named is gone or half.
    assert last(tmp_path) == tmp_path / "epoch_2.pth"
    assert checkpoints(tmp_path) == [f"epoch_{i}.pth" for i in range(1, complete + 1)]
    for name in checkpoints(tmp_path):
        assert "weight" in load(tmp_path / name)["state_dict"]


def test_remote_backends_are_refused():
    with pytest.raises(ValueError, match="backend_args"):
        AtomicCheckpointHook(backend_args=dict(backend="petrel"))
