"""What preflight says of data sets that do not fit, before any of them is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.fileio import LocalBackend, register_backend
from mmengine.registry import init_default_scope
from torch import nn

from las_mm import preflight
from las_mm.datasets import check_classes, check_data
from las_mm.errors import UserError

pytest.importorskip("mmdet")
NAMES = ("cat", "dog", "bird")


class MappedBackend(LocalBackend):
    """A store whose paths stand for others, as petrel's and a cluster's do."""

    def __init__(self, path_mapping: dict | None = None) -> None:
        self.path_mapping = path_mapping or {}

    def _map(self, path: object) -> str:
        path = str(path)
        for old, new in self.path_mapping.items():
            path = path.replace(old, new)
        return path

    def exists(self, filepath: object) -> bool:
        return super().exists(self._map(filepath))

    def isdir(self, filepath: object) -> bool:
        return super().isdir(self._map(filepath))

    def get(self, filepath: object) -> bytes:
        return super().get(self._map(filepath))


class Unreachable(LocalBackend):
    def exists(self, filepath: object) -> bool:
        raise ConnectionError("no route to host")


register_backend("las_mm_test_mapped", MappedBackend, force=True)
register_backend("las_mm_test_unreachable", Unreachable, force=True)


def annotations(path: Path, names=NAMES, used=(1, 2, 3), first=1, **more) -> str:
    categories = [dict(id=i, name=name) for i, name in enumerate(names, first)]
    objects = [dict(id=i, image_id=1, category_id=c) for i, c in enumerate(used)]
    info = {"description": 'says "categories": [] and "category_id" in a text'}
    content = dict(info=info, images=[], annotations=objects, categories=categories, **more)
    path.write_text(json.dumps(content))
    return str(path)


def config(tmp_path, classes=NAMES, ann_file=None, evaluator=None, **dataset) -> Config:
    init_default_scope("mmdet")
    ann_file = ann_file or annotations(tmp_path / "a.json")
    dataset = dict(type="CocoDataset", ann_file=ann_file, **dataset)
    if classes is not None:
        dataset["metainfo"] = dict(classes=classes)
    cfg = dict(train_dataloader=dict(dataset=dict(type="RepeatDataset", times=2, dataset=dataset)))
    if evaluator is not None:
        cfg["train_evaluator"] = [dict(type="CocoMetric", ann_file=evaluator)]
    return Config(cfg)


@pytest.fixture(autouse=True)
def scope():
    yield
    preflight.reset_scope()


class Head(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes


def model(num_classes: int = 3) -> nn.Module:
    return nn.ModuleDict(dict(rpn_head=Head(1), bbox_head=Head(num_classes)))


def refusal(cfg: Config, heads: int = 3) -> str:
    with pytest.raises(UserError) as error:
        check_classes(cfg, model(heads), ("train_dataloader", "val_dataloader"))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_fits_passes(tmp_path):
    for kwargs in (
        {},
        dict(classes=("cat", "bird")),
        dict(ann_file=annotations(tmp_path / "b.json", first=90, used=(91, 92))),
        dict(evaluator=annotations(tmp_path / "c.json", used=())),
        dict(ann_file=annotations(tmp_path / "d.json", used=())),  # images without objects
    ):
        cfg = config(tmp_path, **kwargs)
        check_classes(cfg, model(len(kwargs.get("classes", NAMES))), ("train_dataloader",))


def test_misspelt_class(tmp_path):
    message = refusal(config(tmp_path, classes=("cat", "dogg", "bird")))
    assert "class 'dogg' of train_dataloader" in message
    assert f"is no category of {tmp_path / 'a.json'}; did you mean 'dog'?" in message
    # Without metainfo the classes are COCO's, of which the file has not all.
    message = refusal(config(tmp_path, classes=None))
    assert "class 'person' of train_dataloader (metainfo.classes, or its data set's own)" in message
    message = refusal(config(tmp_path, evaluator=annotations(tmp_path / "e.json", names=("ox",))))
    assert "class 'cat' of train_evaluator" in message and "it has ox" in message


def test_classes_that_are_no_list(tmp_path):
    assert "got the text 'cat'; for one class write ('cat',)" in refusal(config(tmp_path, "cat"))
    (tmp_path / "names.txt").write_text("cat\ndog\nbird\n")
    check_classes(config(tmp_path, str(tmp_path / "names.txt")), model(), ("train_dataloader",))
    cfg = config(tmp_path)
    dataset = cfg.train_dataloader.dataset.dataset
    dataset.metainfo = dict(CLASSES=NAMES)
    assert "metainfo.CLASSES of train_dataloader is read by no one" in refusal(cfg)


def test_order_that_labels_would_not_follow(tmp_path):
    message = refusal(config(tmp_path, ("dog", "cat", "bird")))
    assert "in another order than the categories of" in message
    assert "label 0 would be called 'dog' and be 'cat'" in message
    assert "name 'cat' twice" in refusal(config(tmp_path, ("cat", "cat", "dog")))
    twice = annotations(tmp_path / "t.json", names=("cat", "cat", "dog", "bird"))
    assert f"categories of {twice} name 'cat' twice" in refusal(config(tmp_path, ann_file=twice))


def test_objects_of_another_data_set(tmp_path):
    other = annotations(tmp_path / "o.json", used=(1, 17, 18))
    message = refusal(config(tmp_path, ann_file=other))
    assert f"{other} has objects of category 17, 18, which is none of its categories" in message
    assert "(1, 2, 3): they belong to another data set" in message
    birds = annotations(tmp_path / "p.json", used=(3, 3))
    message = refusal(config(tmp_path, ("cat", "dog"), ann_file=birds), heads=2)
    assert "has no object of the classes of train_dataloader (cat, dog)" in message


@pytest.mark.parametrize("heads", [80, 2])
def test_num_classes_that_does_not_fit(tmp_path, heads):
    message = refusal(config(tmp_path), heads)
    assert (
        f"num_classes of model.bbox_head is {heads}, and the data set of train_dataloader has 3"
        in message
    )
    assert "--cfg-options model.bbox_head.num_classes=3" in message


def test_classifiers_may_have_more(tmp_path):
    init_default_scope("mmpretrain")
    cfg = Config(dict(train_dataloader=dict(dataset=dict(type="CIFAR10"))))
    check_classes(cfg, model(1000), ("train_dataloader",))
    assert "num_classes of model.bbox_head is 5, and the data set" in refusal(cfg, 5)


def test_a_real_detector(tiny_config, tmp_path):
    cfg = Config.fromfile(tiny_config(tmp_path))
    detector = preflight.build_model(cfg)
    check_classes(cfg, detector, ("train_dataloader", "val_dataloader"))
    detector.roi_head.mask_head.num_classes = 7
    with pytest.raises(UserError, match="num_classes of model.roi_head.mask_head is 7"):
        check_classes(cfg, detector, ("train_dataloader",))


# ---- files


def mapped(tmp_path) -> dict:
    return dict(backend="las_mm_test_mapped", path_mapping={"store/": f"{tmp_path}/"})


def test_paths_are_looked_for_in_their_store(tmp_path):
    (tmp_path / "images").mkdir()
    annotations(tmp_path / "a.json")
    backend = mapped(tmp_path)
    cfg = config(
        tmp_path,
        ann_file="a.json",
        data_root="store/",
        data_prefix=dict(img="images/"),
        backend_args=backend,
        pipeline=[dict(type="LoadImageFromFile", backend_args=backend)],
    )
    check_data(cfg, ("train_dataloader",))
    dataset = cfg.train_dataloader.dataset.dataset
    dataset.data_prefix.img = "gone/"
    with pytest.raises(UserError, match="store/gone/ does not exist"):
        check_data(cfg, ("train_dataloader",))
    dataset.data_prefix.img = "images/"
    dataset.pipeline[0].backend_args = None  # what reads images looks on this machine
    dataset.backend_args = backend
    check_data(cfg, ("train_dataloader",))
    dataset.backend_args = None
    with pytest.raises(UserError, match="store/a.json does not exist"):
        check_data(cfg, ("train_dataloader",))


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (dict(backend="las_mm_test_unreachable"), "no route to host"),
        (dict(backend="no_such_store"), "no_such_store"),
        (dict(backend="las_mm_test_mapped", path_maping={}), "path_maping"),
    ],
)
def test_a_store_that_cannot_be_used(tmp_path, backend, reason):
    cfg = config(tmp_path, backend_args=backend)
    with pytest.raises(UserError, match=f"cannot be looked for with backend_args=.*{reason}"):
        check_data(cfg, ("train_dataloader",))


def test_stores_that_only_reading_tells_about(tmp_path):
    cfg = config(tmp_path, ann_file="https://example.com/a.json")
    check_data(cfg, ("train_dataloader",))


def test_evaluators_file(tmp_path):
    cfg = config(tmp_path, evaluator=str(tmp_path / "gone.json"))
    with pytest.raises(
        UserError, match=r"gone.json does not exist \(ann_file of train_evaluator\)"
    ):
        check_data(cfg, ("train_dataloader",))
