"""Tests of tools/make_demo_coco.py: what it writes, and what it refuses."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("skimage", reason="the photographs are in the scikit-image wheel")
COCO = pytest.importorskip("pycocotools.coco").COCO

TOOLS = Path(__file__).resolve().parents[1] / "tools"
SMALL = ["--train", "3", "--val", "2", "--size", "160"]
SPLITS = {"train2017": 3, "val2017": 2}


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        import make_demo_coco

        yield make_demo_coco


@pytest.fixture(scope="module")
def demo(tool, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "set"
    assert tool.main(["--out", str(out), *SMALL]) == 0
    return out


def load(out, split):
    return COCO(str(out / "annotations" / f"instances_{split}.json"))


def fingerprint(folder):
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def run(tool, *args):
    """Return the exit code, whether argparse or main decides it."""
    try:
        return tool.main([str(arg) for arg in args])
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize(("split", "count"), SPLITS.items())
def test_layout_and_images(demo, split, count):
    coco = load(demo, split)
    assert len(coco.imgs) == count == len(list((demo / split).glob("*.jpg")))
    for image in coco.imgs.values():
        picture = cv2.imread(str(demo / split / image["file_name"]))
        assert picture.shape == (image["height"], image["width"], 3)
        assert max(picture.shape) == 160
        assert 1 <= len(coco.getAnnIds(image["id"])) <= 5


def test_ids_are_unique_and_categories_are_those_of_coco(demo, tool):
    train, val = (load(demo, split) for split in SPLITS)
    for key in ("images", "annotations"):
        ids = [entry["id"] for coco in (train, val) for entry in coco.dataset[key]]
        assert len(ids) == len(set(ids))
        assert min(ids) >= 1
    categories = {c["id"]: c["name"] for c in train.dataset["categories"]}
    assert len(categories) == len(set(categories.values())) == 80
    assert set(range(1, 91)) - set(categories) == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert (categories[1], categories[38], categories[90]) == ("person", "kite", "toothbrush")
    assert {shape.category for shape in tool.shapes.SHAPES} <= set(categories.values())
    assert train.dataset["categories"] == val.dataset["categories"]


@pytest.mark.parametrize("split", SPLITS)
def test_polygons_areas_and_boxes_agree(demo, split):
    coco = load(demo, split)
    for annotation in coco.anns.values():
        image = coco.imgs[annotation["image_id"]]
        for polygon in annotation["segmentation"]:
            points = np.reshape(polygon, (-1, 2))
            assert len(points) >= 3
            assert (points >= 0).all()
            assert (points <= (image["width"], image["height"])).all()
        mask = coco.annToMask(annotation)
        assert mask.sum() == pytest.approx(annotation["area"], rel=0.04)
        ys, xs = np.nonzero(mask)
        x, y, w, h = annotation["bbox"]
        box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        assert np.allclose(box, (x, y, x + w, y + h), atol=1.5)
        assert annotation["iscrowd"] == 0


@pytest.mark.parametrize("split", SPLITS)
def test_masks_of_one_image_do_not_overlap(demo, split):
    coco = load(demo, split)
    for image_id in coco.imgs:
        masks = [coco.annToMask(a) for a in coco.imgToAnns[image_id]]
        twice = (np.sum(masks, axis=0) > 1).sum()
        assert twice <= 0.03 * np.sum(masks)  # polygons of neighbours may share pixels of a seam


def test_hidden_parts_are_not_annotated(tool):
    rng = np.random.default_rng(0)
    scene = tool.Scene(np.zeros((100, 120, 3), np.float32), np.array([0.0, -1.0]), rng)
    disc = cv2.circle(np.zeros((60, 60), np.float32), (30, 30), 25, 1.0, -1)[..., None]
    for _ in range(3):
        scene.add("clock", disc * np.ones(3, np.float32), disc)
    assert len(scene.visible) > 1
    assert np.sum(scene.visible, axis=0).max() <= 1 + 1e-6
    assert all(v.sum() >= tool.MIN_VISIBLE * disc.sum() * 0.9 for v in scene.visible)


def test_polygons_follow_the_region(tool):
    coverage = np.zeros((20, 30), np.float32)
    coverage[5:15, 0:10] = 1
    (polygon,) = tool.shapes.visible_polygons(coverage)
    assert tool.shapes.signed_area(polygon) == pytest.approx(100, abs=1)
    assert polygon.min(axis=0).tolist() == [0, 5]
    assert polygon.max(axis=0).tolist() == [10, 15]
    coverage[5:15, 20:30] = 1
    assert len(tool.shapes.visible_polygons(coverage)) == 2
    coverage[7:13, 2:8] = 0
    assert tool.shapes.visible_polygons(coverage) is None  # a hole
    assert tool.shapes.visible_polygons(np.zeros((9, 9))) is None


def test_two_runs_give_the_same_bytes(demo, tmp_path):
    command = [sys.executable, TOOLS / "make_demo_coco.py", "--out", tmp_path / "again", *SMALL]
    subprocess.run(command, check=True, capture_output=True)
    assert fingerprint(tmp_path / "again") == fingerprint(demo)
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


def test_second_call_does_nothing(demo, tool, monkeypatch, capsys):
    monkeypatch.setattr(tool, "render", lambda *_: pytest.fail("rendered twice"))
    assert run(tool, "--out", demo, *SMALL) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_other_parameters_need_force_and_an_incomplete_set_is_redone(tool, tmp_path, capsys):
    out = tmp_path / "set"
    tiny = ("--out", out, "--train", 1, "--val", 1, "--size", 96)
    assert run(tool, *tiny) == 0
    before = fingerprint(out)
    assert run(tool, *tiny, "--seed", 1) == 2
    assert "--force" in capsys.readouterr().err
    assert fingerprint(out) == before
    assert run(tool, *tiny, "--seed", 1, "--force") == 0
    assert fingerprint(out) != before
    (out / "val2017" / "000000000002.jpg").unlink()
    assert run(tool, *tiny, "--seed", 1) == 0
    assert set(fingerprint(out)) == set(before)


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_foreign_files_are_never_overwritten(tool, tmp_path, capsys, force):
    (tmp_path / "thesis.txt").write_text("mine")
    assert run(tool, "--out", tmp_path, *SMALL, *force) == 2
    assert str(tmp_path) in capsys.readouterr().err
    parameters = {"train": 3, "val": 2, "size": 160, "seed": 0, "version": tool.VERSION}
    (tmp_path / tool.MANIFEST).write_text(json.dumps({"parameters": parameters}))
    assert run(tool, "--out", tmp_path, *SMALL, *force) == 2
    assert "thesis.txt" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("option", "value"),
    [("--train", "0"), ("--val", "-1"), ("--size", "20"), ("--size", "big"), ("--seed", "-7")],
)
def test_bad_arguments_are_named(tool, tmp_path, capsys, option, value):
    assert run(tool, "--out", tmp_path / "set", option, value) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert option in message
    assert value in message
    assert not (tmp_path / "set").exists()


def test_a_failure_leaves_nothing_behind(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "write_split", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    assert run(tool, "--out", tmp_path / "set", *SMALL) == 2
    assert list(tmp_path.iterdir()) == []


def test_missing_scikit_image_is_said(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)
    assert run(tool, "--out", tmp_path / "set", *SMALL) == 2
    assert "pip install scikit-image" in capsys.readouterr().err
