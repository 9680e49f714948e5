"""Pictures from image files of every kind: the pixels that the network gets, or a reason."""

from __future__ import annotations

from types import SimpleNamespace

import cv2
import mmcv
import numpy as np
import pytest
from mmcv.transforms import Compose, LoadImageFromFile
from mmengine.fileio import LocalBackend, register_backend
from PIL import Image

from conftest import load_tool
from las_mm import preflight
from las_mm.cli import masks as drawing
from las_mm.hooks import masks as masks_module
from las_mm.pictures import UnreadableImage, check_whole, loaders, read_image, to_rgb

HEIGHT, WIDTH = 48, 64


@pytest.fixture(autouse=True)
def scope():
    yield
    preflight.reset_scope()


@pytest.fixture(scope="module")
def rgb() -> np.ndarray:
    """A smooth picture, so that JPEG changes little."""
    corners = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return cv2.resize(corners, (WIDTH, HEIGHT))


@pytest.fixture(scope="module")
def folder(rgb, tmp_path_factory):
    """An image of each kind; the name says which."""
    path = tmp_path_factory.mktemp("pictures")
    image, gray = Image.fromarray(rgb), Image.fromarray(rgb).convert("L")
    rotated = Image.Exif()
    rotated[0x0112] = 6  # turn clockwise to see it upright
    image.save(path / "plain.png")
    Image.merge("RGBA", (*image.split(), gray)).save(path / "rgba.png")
    gray.save(path / "gray.png")
    image.quantize(64).save(path / "palette.png")
    cv2.imwrite(str(path / "rgb16.png"), rgb[..., ::-1].astype(np.uint16) * 257)
    cv2.imwrite(str(path / "gray16.png"), np.asarray(gray).astype(np.uint16) * 257)
    image.save(path / "rotated.jpg", exif=rotated, quality=98, subsampling=0)
    image.convert("CMYK").save(path / "cmyk.jpg", quality=98)
    return path


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    path = tmp_path_factory.mktemp("broken")
    noise = np.random.default_rng(0).integers(0, 256, (400, 300, 3), dtype=np.uint8)
    for name in ("long.jpg", "short.png"):
        Image.fromarray(noise).save(path / name)
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: len(content) * 3 // 4])
    (path / "empty.png").write_bytes(b"")
    (path / "text.png").write_text("no image")
    return path


def expected(name: str, rgb: np.ndarray) -> np.ndarray:
    """What people see of it."""
    if name.startswith("gray"):
        return np.asarray(Image.fromarray(rgb).convert("L").convert("RGB"))
    return np.rot90(rgb, k=-1) if name == "rotated.jpg" else rgb


KINDS = ["plain.png", "rgba.png", "gray.png", "palette.png", "rgb16.png", "gray16.png"]
KINDS += ["rotated.jpg", "cmyk.jpg"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("color", ["color", "color_ignore_orientation", "unchanged"])
def test_every_kind_is_shown_as_the_network_gets_it(name, color, folder, rgb):
    reader = LoadImageFromFile(color_type=color)
    seen = reader.transform(dict(img_path=str(folder / name)))["img"]
    image = read_image(str(folder / name), [reader])
    np.testing.assert_array_equal(image, seen)
    picture = to_rgb(image)
    assert picture.dtype == np.uint8 and picture.flags.c_contiguous
    wanted = expected(name, rgb)
    if (
        color != "color" and name == "rotated.jpg"
    ):  # the loader leaves it lying: so does the overlay
        wanted = rgb
    assert picture.shape == wanted.shape
    difference = np.abs(picture.astype(float) - wanted).mean()
    assert difference < (8 if name in ("palette.png", "cmyk.jpg", "rotated.jpg") else 1.1), (
        difference
    )


def test_floats_and_more_channels():
    image = np.full((2, 3, 5), 300.0, np.float32)
    image[..., 0] = -4
    picture = to_rgb(image)  # BGR
    assert picture.tolist() == [[[255, 255, 0]] * 3] * 2
    assert to_rgb(np.zeros((2, 2, 1), np.uint8)).shape == (2, 2, 3)


@pytest.mark.parametrize("name", ["long.jpg", "short.png"])
def test_truncated_files_are_told(name, broken):
    with pytest.raises(UnreadableImage, match=f"{name} is damaged: .*truncated"):
        check_whole(broken / name)


@pytest.mark.parametrize("name", ["empty.png", "text.png", "gone.png"])
@pytest.mark.parametrize("readers", [[], [LoadImageFromFile(color_type="unchanged")]])
def test_what_is_no_image(name, readers, broken):
    with pytest.raises(UnreadableImage, match=f"{name} is no image that can be read"):
        read_image(str(broken / name), readers)


# ---- tools/visualize_masks.py


visualize = load_tool("visualize_masks").main


@pytest.fixture(scope="module")
def config(tiny_config, tmp_path_factory):
    pytest.importorskip("mmdet")
    return tiny_config(tmp_path_factory.mktemp("visualize"))


def test_the_tool_draws_every_kind(config, folder, tmp_path, monkeypatch, rgb):
    shown, shapes = {}, {}

    def draw(image, activation, data_sample, title, **_):
        shown[title] = image
        shapes[title] = data_sample.ori_shape
        return image

    monkeypatch.setattr(drawing, "draw_masks", draw)
    visualize([str(config), str(folder), "--out-dir", str(tmp_path)])
    assert len(shown) == len(KINDS) == len(list(tmp_path.glob("*.png")))
    assert (tmp_path / "index.html").is_file()
    for name in KINDS:
        stem = name.rpartition(".")[0]
        wanted = expected(name, rgb)
        assert shown[stem].shape == wanted.shape and shapes[stem] == wanted.shape[:2]
        assert np.abs(shown[stem].astype(float) - wanted).mean() < 8
    assert np.array_equal(shown["plain"], rgb)


def test_the_tool_follows_the_configs_loader(config, folder, tmp_path, monkeypatch):
    """A loader that leaves rotated images lying; a store that holds other files."""
    shown = []
    monkeypatch.setattr(drawing, "draw_masks", lambda image, *_, **__: shown.append(image) or image)
    first = "test_dataloader.dataset.pipeline.0"
    options = [f"{first}.color_type=color_ignore_orientation", f"{first}.backend_args.backend=gone"]
    arguments = [str(config), str(folder / "rotated.jpg"), "--out-dir", str(tmp_path)]
    visualize([*arguments, "--cfg-options", *options])
    assert shown[0].shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("name", ["long.jpg", "short.png", "empty.png", "text.png"])
def test_the_tool_says_what_it_cannot_read(name, config, broken, tmp_path, refused):
    arguments = [str(config), str(broken / name), "--out-dir", str(tmp_path)]
    assert f"{broken / name} is " in refused(visualize, arguments)


def test_the_tool_names_the_backbones(config, folder, refused):
    arguments = [str(config), str(folder), "--module", "teacher"]
    assert "module='teacher' names no dynamic backbone" in refused(visualize, arguments)


# ---- MaskVisualizationHook


class Mapped(LocalBackend):
    def __init__(self, path_mapping: dict) -> None:
        ((self.old, self.new),) = path_mapping.items()

    def get(self, filepath) -> bytes:
        return super().get(str(filepath).replace(self.old, self.new))


register_backend("las_mm_test_pictures", Mapped, force=True)


def hook_with(*readers) -> masks_module.MaskVisualizationHook:
    hook = masks_module.MaskVisualizationHook()
    hook._readers = list(readers)
    return hook


def test_the_hook_reads_through_the_pipelines_backend(folder, rgb):
    backend = dict(backend="las_mm_test_pictures", path_mapping={"store:": f"{folder}/"})
    pipeline = Compose([LoadImageFromFile(backend_args=backend)])
    lost = Compose([LoadImageFromFile(backend_args=dict(backend="local"))])
    inner = SimpleNamespace(pipeline=pipeline)
    dataset = SimpleNamespace(
        datasets=[SimpleNamespace(dataset=SimpleNamespace(pipeline=lost)), inner]
    )
    found = list(loaders(dataset))
    assert found == [lost.transforms[0], pipeline.transforms[0]]
    sample = SimpleNamespace(metainfo=dict(img_path="store:plain.png"))
    image = hook_with(*found)._original_image(sample, 0, {}, None)
    np.testing.assert_array_equal(image, rgb)
    plain = SimpleNamespace(metainfo=dict(img_path=str(folder / "rgba.png")))
    np.testing.assert_array_equal(hook_with()._original_image(plain, 0, {}, None), rgb)


def test_the_hook_goes_on_after_an_image_that_it_cannot_read(folder, broken, tmp_path, monkeypatch):
    said, drawn = [], []
    monkeypatch.setattr(
        masks_module, "draw_masks", lambda image, *_, **__: drawn.append(1) or image
    )
    hook = hook_with(LoadImageFromFile())
    hook._passes._passes = [(2, object())]
    samples = [
        SimpleNamespace(metainfo=dict(img_path=str(path)))
        for path in (broken / "text.png", folder / "rotated.jpg")
    ]
    runner = SimpleNamespace(
        model=None,
        work_dir=str(tmp_path),
        visualizer=None,
        logger=SimpleNamespace(warning=said.append),
    )
    hook._draw_batch(runner, 0, {}, samples)
    assert len(drawn) == 1 and (tmp_path / "masks" / "rotated.png").is_file()
    assert mmcv.imread(str(tmp_path / "masks" / "rotated.png")).shape == (WIDTH, HEIGHT, 3)
    assert (
        len(said) == 1 and "no picture of text: " in said[0] and "text.png is no image" in said[0]
    )
