"""``las_mm plot``: curves of work folders."""

from __future__ import annotations

import json

import pytest

from las_mm import cli

pytest.importorskip("matplotlib")


def write_log(folder, *losses: float) -> None:
    (folder / "run" / "vis_data").mkdir(parents=True)
    keys = dict(flops_ratio=0.5, latency_ms=2.0, static_latency_ms=4.0, latency_ratio=0.5)
    entries = [dict(keys, step=i, loss=loss, loss_cls=1) for i, loss in enumerate(losses, 1)]
    lines = [json.dumps(entry) for entry in [*entries, {"step": 9, "coco/bbox_mAP": 0.1}]]
    (folder / "run" / "vis_data" / "scalars.json").write_text("\n".join([*lines, '{"step": 1']))


def test_two_trainings(tmp_path, capsys):
    for name, losses in (("a", (2, 1)), ("b", (3, 2.5))):
        write_log(tmp_path / name, *losses)
    out = tmp_path / "pictures" / "curves.png"
    cli.main(["plot", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG")
    first, second, wrote = capsys.readouterr().out.splitlines()
    assert first.startswith("a: loss 2.000 -> 1.000, FLOPs ratio 0.500 -> 0.500, predicted latency")
    assert "(0.50 of the static network's 4.000 ms)" in first
    assert second.startswith("b: loss 3.000 -> 2.500") and wrote == f"wrote {out}"


def test_refusals(tmp_path, refused):
    for folder in ("x/a", "y/a"):
        write_log(tmp_path / folder, 1)
    both = [str(tmp_path / folder) for folder in ("x/a", "y/a")]
    assert "must differ in their last name" in refused(cli.main, ["plot", *both])
    said = refused(cli.main, ["plot", both[0], "--out", "curves.txt"])
    assert "--out must end in one of .png, .pdf, .svg, .jpg, got curves.txt" in said
