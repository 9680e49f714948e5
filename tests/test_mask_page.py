"""The page of what was computed: its records, and how a browser shows them."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from las_mm.mask_page import MaskPage
from las_mm.models import LASResNet, LAUDT2TViT

IMAGE = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
META = dict(img_shape=(80, 120), ori_shape=(60, 90), scale_factor=(4 / 3, 4 / 3))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def activation_of(mode, batch=2, **kwargs):
    torch.manual_seed(0)
    net = LASResNet(
        50, mode=mode, base_channels=8, stem_channels=8, granularity=(4, 2, 2, 1), **kwargs
    ).eval()
    for masker in net.maskers():
        for parameter in masker.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        net(torch.randn(batch, 3, 96, 128))
    return net.network_activation()


def records(path):
    text = path.read_text(encoding="utf-8")
    found = re.findall(r'<script type="application/json" (\S+?)="\w+">(.*?)</script>', text)
    images = [json.loads(content) for kind, content in found if kind == "class"]
    (about,) = [json.loads(content) for kind, content in found if kind == "id"]
    return about, images


def values(grid):
    data = np.frombuffer(base64.b64decode(grid["data"]), np.uint8)
    return data.reshape(grid["h"], grid["w"])


@pytest.fixture
def page(tmp_path):
    """``page(*adds, **settings)``: records of a page of these images."""

    def make(*adds, **settings):
        with MaskPage(tmp_path / "a" / "page.html", "net <1>", **settings) as page:
            for add in adds:
                page.add(**{**dict(name="a.jpg", image=IMAGE, metainfo=META), **add})
        return records(tmp_path / "a" / "page.html")

    return make


def test_patches(page):
    activation = activation_of("spatial")
    about, (record,) = page(dict(activation=activation, image_index=1, measured_ms=1.5))
    assert about == dict(title="net <1>", rates=["activation_rate"], axes=["position"], device=None)
    assert record["seen"] == [80, 120] and record["measured_ms"] == 1.5
    assert [stage["stage"] for stage in record["stages"]] == [1, 2, 3, 4]
    block, mask = record["blocks"][3], activation.masks[3]  # the first of stage 2: S=2, stride 8
    assert block["grid"]["cell"] == [16, 16]
    assert (values(block["grid"]) / 255 == mask[1, 0, :5, :8].numpy()).all()  # 80 x 120 of 96 x 128
    assert all(0 <= block["rates"]["position"] <= 1 for block in record["blocks"])
    assert record["picture"].startswith("data:image/jpeg;base64,")


def test_channels_and_layers(page):
    about, (record,) = page(dict(activation=activation_of("both")))
    assert about["axes"] == ["channel", "position"]  # in the order of the operators
    block = record["blocks"][0]
    assert len(block["bits"]["channel"]) == 4  # 8 channels in pairs
    shares = [
        bits["bits"]["channel"].count("1") / len(bits["bits"]["channel"])
        for bits in record["blocks"]
    ]
    assert shares == pytest.approx([b["rates"]["channel"] for b in record["blocks"]], abs=1e-3)
    _, (record,) = page(dict(activation=activation_of("layer")))
    assert {block["bits"]["layer"] for block in record["blocks"]} <= {"0", "1"}
    assert all(block["grid"] is None for block in record["blocks"])
    about, (record,) = page(dict(activation=activation_of("static")))
    assert about["rates"] == [] and record["flops_ratio"] == 1


def test_tokens(page):
    torch.manual_seed(0)
    sizes = dict(embed_dims=32, num_layers=3, num_heads=4)
    net = LAUDT2TViT(sizes, img_size=64).eval()
    with torch.no_grad():
        net(torch.randn(1, 3, 64, 64))
    about, (record,) = page(dict(activation=net.network_activation(), metainfo={}))
    assert {"token", "head", "attention", "mlp"} <= set(about["axes"])
    block = record["blocks"][1]
    assert (block["grid"]["h"], block["grid"]["w"], block["grid"]["axis"]) == (4, 4, "token")
    assert len(block["bits"]["head"]) == 4


def test_names_cannot_end_the_element(page):
    name = "</script><b>&\"'.jpg"
    _, (record,) = page(dict(activation=activation_of("spatial", 1), name=name))
    assert record["name"] == name


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("before")
    with pytest.raises(KeyError), MaskPage(path, "x") as page:
        page.add("a", IMAGE, activation_of("spatial", 1))
        raise KeyError
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_nothing_is_loaded_from_elsewhere(page, tmp_path):
    page(dict(activation=activation_of("spatial", 1)))
    text = (tmp_path / "a" / "page.html").read_text()
    assert not re.search(r"(?:src|href)\s*=\s*[\"']|https?://|@import|url\(", text)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH (apt-get install chromium)")
def test_a_browser_shows_it(page, tmp_path):
    activation = activation_of("both")
    page(
        dict(activation=activation, name="first & best.jpg", measured_ms=2.0),
        dict(activation=activation, image_index=1, name="<second>.jpg", measured_ms=1.0),
    )
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000")
    dom = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", f"file://{tmp_path}/a/page.html"],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    assert len(re.findall(r"<tr[^>]*>(?:<td>.*?</td>)+</tr>", dom)) == 2
    assert "first &amp; best.jpg" in dom and "&lt;second&gt;.jpg" in dom
    assert len(re.findall(r"<figcaption>stage \d: \d+ %</figcaption>", dom)) == 4
    assert "channel by block" in dom and 'id="block">Block ' in dom
