"""Checkpoints are data: what mmengine's runner writes is read, what would run code is not."""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from torch import nn

from las_mm import preflight
from las_mm.checkpoints import CheckpointError, NeedsTrust, read_checkpoint
from las_mm.models import released

HISTORY = b"cmmengine.logging.history_buffer\nHistoryBuffer\n"
GETATTR = b"c__builtin__\ngetattr\n"


def write(path: Path, program: bytes) -> Path:
    """A checkpoint of torch's form whose pickle is ``program``."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            content = program if name.endswith("data.pkl") else source.read(name)
            target.writestr(name, content)
    return path


def attribute(owner: bytes, name: str) -> bytes:
    """The program of ``getattr(owner, name)``."""
    return GETATTR + owner + b"X" + len(name).to_bytes(4, "little") + name.encode() + b"\x86R"


def test_what_the_runner_writes_is_read(tmp_path):
    hub = MessageHub.get_instance("checkpoints")
    hub.update_scalar("train/loss", 1.5)
    hub.update_info("seen", np.float64(3))
    net = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(torch.rand(1, 2)).sum().backward()
    optimizer.step()
    content = dict(
        meta=dict(epoch=1, dataset_meta=dict(classes=("a", "b"))),
        state_dict=net.state_dict(),
        message_hub=hub.state_dict(),
        optimizer=optimizer.state_dict(),
        param_schedulers=[dict(last_step=1)],
    )
    torch.save(content, tmp_path / "epoch_1.pth")
    found = read_checkpoint(tmp_path / "epoch_1.pth")
    assert torch.equal(found["state_dict"]["weight"], net.weight)
    assert found["meta"] == content["meta"]
    assert "train/loss" in found["message_hub"]["log_scalars"]


@pytest.mark.parametrize("core", [b"core", b"_core"])
def test_what_another_numpy_wrote_is_read(core, tmp_path):
    """numpy 2 calls its functions by other names than numpy 1."""
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save(dict(history=history, seen=np.float64(3)), tmp_path / "own.pth")
    with zipfile.ZipFile(tmp_path / "own.pth") as file:
        program = file.read("own/data.pkl")
    other = re.sub(rb"numpy\._?core\.", b"numpy." + core + b".", program)
    assert other.count(b"numpy." + core + b".multiarray\n") >= 2
    found = read_checkpoint(write(tmp_path / "other.pth", other))
    assert found["seen"] == 3


@pytest.mark.parametrize("name", ["__init__", "__class__", "__getstate__", "update", "__globals__"])
def test_no_other_attribute_is_given(name, tmp_path):
    path = write(tmp_path / "crafted.pth", b"\x80\x02" + attribute(HISTORY, name) + b".")
    with pytest.raises(NeedsTrust, match="holds objects other than weights"):
        read_checkpoint(path)
    with pytest.raises(preflight.UserError, match="add --trust-checkpoint"):
        preflight.load_checkpoint(str(path))


def test_attributes_lead_to_no_call(tmp_path, monkeypatch):
    """getattr(getattr(HistoryBuffer, '__init__'), '__globals__') would lead to any module."""
    ran = []
    monkeypatch.setattr(os, "system", ran.append)
    inner = attribute(attribute(HISTORY, "__init__"), "__globals__")
    outer = b"cnumpy\ndtype\n"
    for program in (
        attribute(inner, "get"),
        attribute(outer, "__reduce__"),
        attribute(outer, "mean"),
        attribute(attribute(HISTORY, "mean"), "__globals__"),
        b"cos\nsystem\nX\x02\0\0\0ls\x85R",
        b"c__builtin__\neval\nX\x01\0\0\x001\x85R",
        attribute(HISTORY, "mean") + b")R",  # called
    ):
        path = write(tmp_path / "crafted.pth", b"\x80\x02" + program + b".")
        with pytest.raises(CheckpointError):
            read_checkpoint(path)
    assert ran == []


def test_a_log_history_changes_no_class(tmp_path):
    """The real one takes the statistics that a file names into its class, for all to call."""
    before = dict(HistoryBuffer._statistics_methods)
    buffer = HistoryBuffer([1.0], [1])
    state = {**buffer.__getstate__(), "statistics_methods": {"mean": slice, "mine": slice}}

    class Crafted:
        def __reduce__(self):
            return HistoryBuffer, (), state

    torch.save(dict(state_dict={}, message_hub=Crafted()), tmp_path / "crafted.pth")
    read_checkpoint(tmp_path / "crafted.pth")
    assert HistoryBuffer._statistics_methods == before


def test_a_program_needs_trust(tmp_path):
    class Program:
        def __reduce__(self):
            return print, ("ran",)

    torch.save(dict(state_dict={}, more=Program()), tmp_path / "program.pth")
    with pytest.raises(NeedsTrust):
        read_checkpoint(tmp_path / "program.pth")
    with pytest.raises(ValueError, match="holds objects other than weights"):
        released.load(tmp_path / "program.pth")
    assert preflight.load_checkpoint(str(tmp_path / "program.pth"), trust=True)["more"] is None


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"<html>", pickle.dumps({})[:-3]])
def test_damage_is_said(content, tmp_path):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="a.pth is damaged"):
        read_checkpoint(tmp_path / "a.pth")
