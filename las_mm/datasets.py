"""What the data sets of a config say of themselves, checked before they are loaded.

mmdet leaves out what does not fit without a word: a class that no category is called by, objects of
categories that no class names. Training then runs, on other labels than the config says.
"""

from __future__ import annotations

import difflib
import json
import mmap
import os.path as osp
import re
from collections.abc import Iterator, Mapping, Sequence

from mmengine.config import Config, ConfigDict
from mmengine.fileio import get_file_backend, list_from_file
from mmengine.registry import DATASETS
from torch import nn

from las_mm.errors import UserError

# Bytes of an annotation file that the list of its categories is looked for in.
_CATEGORIES = 1 << 24


def check_data(cfg: Config, loaders: tuple[str, ...]) -> None:
    """Every annotation file and image folder of these dataloaders and their evaluators exists.

    Looked for where ``backend_args`` of the data set, or of what reads its images, say.

    Args:
        cfg: The whole config.
        loaders: E.g. ``('train_dataloader', 'val_dataloader')``; absent ones are skipped.

    Raises:
        UserError: A path is missing, or its file backend cannot be used.
    """
    for loader in loaders:
        if cfg.get(loader) is None:
            continue
        for dataset in _datasets(cfg[loader].dataset):
            root = dataset.get("data_root") or ""
            own = dataset.get("backend_args")
            prefix = dataset.get("data_prefix") or {}
            folders = list(prefix.values()) if isinstance(prefix, dict) else [prefix]
            paths = [(dataset.get("ann_file") or "", own)]
            paths += [(folder, _image_backend(dataset) or own) for folder in folders]
            for path, backend_args in paths:
                full = _full_path(path, root)
                if path and not _exists(full, backend_args):
                    raise UserError(
                        f"{full} does not exist ({loader}, data_root {root!r}); the COCO configs "
                        f"take data_root from LAS_MM_COCO, and `python tools/make_demo_coco.py` "
                        f"renders a small data set to try"
                    )
        for name, evaluator in _evaluators(cfg, loader):
            path = evaluator.get("ann_file")
            if path and not _exists(path, evaluator.get("backend_args")):
                raise UserError(f"{path} does not exist (ann_file of {name})")


def check_classes(cfg: Config, model: nn.Module, loaders: tuple[str, ...]) -> None:
    """The classes of data sets, their annotation files and the model's heads are the same.

    Only local files in COCO's format are looked into; the default scope is the config's.

    Args:
        cfg: The whole config.
        model: Its model, built.
        loaders: See :func:`check_data`.

    Raises:
        UserError: They are not.
    """
    for loader in loaders:
        if cfg.get(loader) is None:
            continue
        for dataset in _datasets(cfg[loader].dataset):
            with DATASETS.switch_scope_and_registry(None) as registry:
                kind = dataset.get("type")
                kind = registry.get(kind) if isinstance(kind, str) else kind
            classes = _classes(dataset, kind, loader)
            if classes is None:
                continue
            if _is_coco(kind):
                path = _full_path(dataset.get("ann_file") or "", dataset.get("data_root") or "")
                _check_categories(path, classes, loader, objects=True)
                for name, evaluator in _evaluators(cfg, loader):
                    _check_categories(evaluator.get("ann_file") or "", classes, name)
            _check_heads(model, classes, loader, detector=_is_coco(kind))


def _datasets(cfg: ConfigDict) -> Iterator[ConfigDict]:
    """All dataset configs below a dataset config, wrappers opened."""
    if "dataset" in cfg:
        yield from _datasets(cfg.dataset)
    elif "datasets" in cfg:
        for child in cfg.datasets:
            yield from _datasets(child)
    else:
        yield cfg


def _evaluators(cfg: Config, loader: str) -> Iterator[tuple[str, Mapping]]:
    """Names and configs of the evaluators that go with a dataloader."""
    name = loader.replace("_dataloader", "_evaluator")
    found = cfg.get(name) or []
    for evaluator in found if isinstance(found, (list, tuple)) else [found]:
        if isinstance(evaluator, Mapping):
            yield name, evaluator


def _full_path(path: str, root: str) -> str:
    return path if not path or osp.isabs(path) or "://" in path else osp.join(root, path)


def _image_backend(dataset: Mapping) -> dict | None:
    """``backend_args`` of the transform that reads the images of a data set."""
    for transform in dataset.get("pipeline") or []:
        if "LoadImage" in str(transform.get("type")):
            return transform.get("backend_args")
    return None


def _exists(path: str, backend_args: dict | None) -> bool:
    """Whether there is a file or folder, by its file backend; True where only reading tells."""
    if not backend_args and "://" not in path:
        return osp.exists(path)
    try:
        backend = get_file_backend(path, backend_args=backend_args)
        if not hasattr(backend, "exists"):  # e.g. HTTP
            return True
        return backend.exists(path) or backend.isdir(path)
    except Exception as error:  # a client that is missing, a network: the reason is in the message
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise UserError(
            f"{path} cannot be looked for with backend_args={backend_args}: {reason}"
        ) from error


def _classes(dataset: Mapping, kind: type | None, loader: str) -> list[str] | None:
    """The class names that a data set gets; ``None`` where it says nothing.

    Raises:
        UserError: They are not given as a list of names.
    """
    given = dataset.get("metainfo") or {}
    if "CLASSES" in given and "classes" not in given:
        raise UserError(f"metainfo.CLASSES of {loader} is read by no one; write metainfo.classes")
    classes = given.get("classes", dataset.get("classes"))
    if classes is None:
        classes = (getattr(kind, "METAINFO", None) or {}).get("classes")
    if isinstance(classes, str):
        if not osp.isfile(classes):
            raise UserError(
                f"metainfo.classes of {loader} must be a list of names or a file of them, got the "
                f"text {classes!r}; for one class write ({classes!r},)"
            )
        classes = list_from_file(classes)
    return list(classes) if isinstance(classes, Sequence) else None


def _is_coco(kind: type | None) -> bool:
    """Whether it is mmdet's data set of COCO's format, that finds categories by class names."""
    try:
        from mmdet.datasets import CocoDataset
        from mmdet.datasets.lvis import LVISV05Dataset
    except ImportError:
        return False
    coco = isinstance(kind, type) and issubclass(kind, CocoDataset)
    return coco and not issubclass(kind, LVISV05Dataset)


def _check_categories(path: str, classes: list[str], where: str, objects: bool = False) -> None:
    """An annotation file has these classes, in their order, and objects of them.

    Raises:
        UserError: It has not.
    """
    if not osp.isfile(path) or not path.endswith(".json"):
        return
    categories, used = _contents(path)
    names = {category["name"]: category["id"] for category in categories}
    if not names:
        return
    for name in classes:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {_listed(names)}"
            raise UserError(
                f"class {name!r} of {where} (metainfo.classes, or its data set's own) is no "
                f"category of {path}; {hint}"
            )
    called = [category["name"] for category in categories if category["name"] in set(classes)]
    for listed, whose in (
        (classes, f"metainfo.classes of {where}"),
        (called, f"categories of {path}"),
    ):
        twice = [name for name in listed if listed.count(name) > 1]
        if twice:
            raise UserError(f"{whose} name {twice[0]!r} twice; labels would be shifted")
    ordered = [name for name in names if name in set(classes)]
    if ordered != classes:
        i = next(i for i, pair in enumerate(zip(ordered, classes)) if len(set(pair)) > 1)
        raise UserError(
            f"metainfo.classes of {where} are in another order than the categories of {path}, "
            f"which labels follow: label {i} would be called {classes[i]!r} and be {ordered[i]!r}"
        )
    unknown = sorted(used - set(names.values()))
    if unknown:
        raise UserError(
            f"{path} has objects of category {_listed(unknown)}, which is none of its categories "
            f"({_listed(sorted(names.values()))}): they belong to another data set"
        )
    wanted = {names[name] for name in classes}
    if objects and used and not used & wanted:
        raise UserError(
            f"{path} has no object of the classes of {where} ({_listed(classes)}): its objects are "
            f"of category {_listed(sorted(used))}"
        )


def _contents(path: str) -> tuple[list[dict], set[int]]:
    """(categories, category ids of objects) of a file in COCO's format.

    Not parsed as a whole: that would take COCO's half a gigabyte many seconds and more memory.
    """
    with open(path, "rb") as file:
        if not file.read(1):
            return [], set()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            used = {int(found) for found in re.findall(rb'"category_id"\s*:\s*(-?\d+)', data)}
            for match in re.finditer(rb'"categories"\s*:\s*(?=\[)', data):
                text = data[match.end() : match.end() + _CATEGORIES].decode(errors="replace")
                try:
                    found, _ = json.JSONDecoder().raw_decode(text)
                except json.JSONDecodeError:
                    continue
                if all(isinstance(c, dict) and {"id", "name"} <= c.keys() for c in found):
                    return found, used
    return [], used


def _check_heads(model: nn.Module, classes: list[str], loader: str, detector: bool) -> None:
    """Heads have as many classes as the data set; a classifier's may have more.

    Raises:
        UserError: They have not.
    """
    for name, module in model.named_modules():
        count = getattr(module, "num_classes", None)
        # A region proposal network tells objects from background; semantic branches have others.
        other = re.search(r"rpn_head|semantic|data_preprocessor|backbone", name)
        if not isinstance(count, int) or other or not name:
            continue
        if count < len(classes) or (detector and count != len(classes)):
            raise UserError(
                f"num_classes of model.{name} is {count}, and the data set of {loader} has "
                f"{len(classes)} ({_listed(classes)}): use --cfg-options "
                f"model.{name}.num_classes={len(classes)}, or other metainfo.classes"
            )


def _listed(values: Sequence | Mapping) -> str:
    """A few of them."""
    shown = [str(value) for value in list(values)[:5]]
    return ", ".join([*shown, "..."] if len(values) > 5 else shown)
