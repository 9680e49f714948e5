"""Render a small data set in COCO layout for demos and tests, in seconds and without a network.

The backgrounds are crops of the photographs inside the scikit-image wheel; drawn objects of six
COCO categories lie on them (`_demo_shapes.py`), each annotated with the polygons of its visible
part. The annotation files list all 80 categories, so COCO configs run on them unchanged. What the
photographs themselves show (a cat, a person) is not annotated. On one installation the same
parameters give the same bytes.

Example:
    python tools/make_demo_coco.py --out data/demo_coco
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
from rich.progress import track

import _demo_shapes as shapes

MANIFEST = "manifest.json"
VERSION = 1  # raise it when the pictures change
PHOTOGRAPHS = ["astronaut.png", "brick.png", "chelsea.png", "coffee.png", "grass.png"]
PHOTOGRAPHS += ["gravel.png", "hubble_deep_field.jpg", "motorcycle_left.png", "rocket.jpg"]
ASPECTS = ((1, 0.75), (1, 0.8), (0.75, 1), (0.8, 1))  # (width, height) over the longer side
MIN_INSIDE, MIN_VISIBLE = 0.9, 0.75
CATEGORIES = {
    "person": "1 person",
    "vehicle": "2 bicycle, 3 car, 4 motorcycle, 5 airplane, 6 bus, 7 train, 8 truck, 9 boat",
    "outdoor": "10 traffic light, 11 fire hydrant, 13 stop sign, 14 parking meter, 15 bench",
    "animal": "16 bird, 17 cat, 18 dog, 19 horse, 20 sheep, 21 cow, 22 elephant, 23 bear, "
    "24 zebra, 25 giraffe",
    "accessory": "27 backpack, 28 umbrella, 31 handbag, 32 tie, 33 suitcase",
    "sports": "34 frisbee, 35 skis, 36 snowboard, 37 sports ball, 38 kite, 39 baseball bat, "
    "40 baseball glove, 41 skateboard, 42 surfboard, 43 tennis racket",
    "kitchen": "44 bottle, 46 wine glass, 47 cup, 48 fork, 49 knife, 50 spoon, 51 bowl",
    "food": "52 banana, 53 apple, 54 sandwich, 55 orange, 56 broccoli, 57 carrot, 58 hot dog, "
    "59 pizza, 60 donut, 61 cake",
    "furniture": "62 chair, 63 couch, 64 potted plant, 65 bed, 67 dining table, 70 toilet",
    "electronic": "72 tv, 73 laptop, 74 mouse, 75 remote, 76 keyboard, 77 cell phone",
    "appliance": "78 microwave, 79 oven, 80 toaster, 81 sink, 82 refrigerator",
    "indoor": "84 book, 85 clock, 86 vase, 87 scissors, 88 teddy bear, 89 hair drier, "
    "90 toothbrush",
}


class DemoError(Exception):
    """Something the user can put right, said in one sentence."""


@dataclass(frozen=True)
class Parameters:
    """All that the content of a demo set depends on.

    Args:
        train: Number of training images.
        val: Number of validation images.
        size: Longer side of an image in pixels.
        seed: Seed of all variation.
        version: Version of the drawing code.
    """

    train: int
    val: int
    size: int
    seed: int
    version: int = VERSION

    def __post_init__(self) -> None:
        limits = {"train": (1, 10**5), "val": (1, 10**5), "size": (96, 1024), "seed": (0, 2**32)}
        for name, (low, high) in limits.items():
            if not low <= (value := getattr(self, name)) <= high:
                raise DemoError(f"--{name} must be from {low} to {high}, but is {value}.")

    def image_ids(self) -> dict[str, range]:
        """Return the image ids of each split; they are unique over both."""
        return {
            "train2017": range(1, self.train + 1),
            "val2017": range(self.train + 1, self.train + self.val + 1),
        }

    def files(self) -> set[str]:
        """Return the relative paths of all files of a complete set."""
        splits = self.image_ids()
        images = {f"{split}/{file_name(i)}" for split, ids in splits.items() for i in ids}
        return images | {f"annotations/instances_{split}.json" for split in splits} | {MANIFEST}


def file_name(image_id: int) -> str:
    """Return COCO's file name of an image."""
    return f"{image_id:012d}.jpg"


def coco_categories() -> list[dict]:
    """Return the 80 categories of COCO 2017 with their ids."""
    return [
        {"supercategory": group, "id": int(item.split(" ", 1)[0]), "name": item.split(" ", 1)[1]}
        for group, items in CATEGORIES.items()
        for item in items.split(", ")
    ]


def load_photographs() -> dict[str, np.ndarray]:
    """Return the photographs of the installed scikit-image wheel by name, RGB, uint8."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise DemoError("The photographs come from scikit-image: `pip install scikit-image`.")
    folder = Path(spec.origin).parent / "data"
    present = [name for name in PHOTOGRAPHS if (folder / name).is_file()]
    if not present:
        raise DemoError(f"There is no photograph in {folder}: reinstall scikit-image.")
    images = {name: cv2.imread(str(folder / name)) for name in present}
    return {name: cv2.cvtColor(image, cv2.COLOR_BGR2RGB) for name, image in images.items()}


class Scene:
    """One picture under construction: objects are added on top of each other.

    Args:
        background: [height, width, 3], float32 from 0 to 1.
        light: Unit vector (x, y) towards the lamp.
        rng: Source of all variation.
    """

    def __init__(self, background: np.ndarray, light: np.ndarray, rng: np.random.Generator):
        self.image, self.light, self.rng = background, light, rng
        self.height, self.width = background.shape[:2]
        self.categories: list[str] = []
        self.visible: list[np.ndarray] = []  # coverage [height, width] that later objects left
        self.whole: list[float] = []  # area in pixels before others covered it

    def add(self, category: str, rgb: np.ndarray, alpha: np.ndarray) -> None:
        """Lay an object with a soft shadow where there is room for it, or leave it out."""
        side = alpha.shape[0]
        for _ in range(40):
            x = self.rng.integers(-side // 8, self.width - side + side // 8 + 1)
            y = self.rng.integers(-side // 8, self.height - side + side // 8 + 1)
            moved = self._moved(alpha, x, y)
            left = [*(visible * (1 - moved) for visible in self.visible), moved]
            wanted = [*(MIN_VISIBLE * whole for whole in self.whole), MIN_INSIDE * alpha.sum()]
            if all(v.sum() >= w for v, w in zip(left, wanted, strict=True)) and all(
                shapes.visible_polygons(v) for v in left
            ):
                break
        else:
            return
        shadow = self._moved(alpha, *((x, y) - self.light * 0.07 * side))
        shadow = cv2.GaussianBlur(shadow, (0, 0), 0.05 * side)
        self.image = self.image * (1 - 0.5 * shadow[..., None])
        self.image = self.image * (1 - moved[..., None]) + self._moved(rgb, x, y)
        self.categories.append(category)
        self.visible = left
        self.whole.append(float(moved.sum()))

    def _moved(self, picture: np.ndarray, x: float, y: float) -> np.ndarray:
        shift = np.array([[1, 0, x], [0, 1, y]], np.float64)
        return cv2.warpAffine(picture, shift, (self.width, self.height))

    def annotations(self) -> list[dict]:
        """Return the COCO annotations of the objects, without ids."""
        ids = {category["name"]: category["id"] for category in coco_categories()}
        result = []
        for name, coverage in zip(self.categories, self.visible, strict=True):
            polygons = shapes.visible_polygons(coverage)
            corners = np.concatenate(polygons)
            (x0, y0), (x1, y1) = corners.min(axis=0), corners.max(axis=0)
            result.append(
                {
                    "category_id": ids[name],
                    "segmentation": [polygon.ravel().tolist() for polygon in polygons],
                    "area": round(sum(shapes.signed_area(polygon) for polygon in polygons), 2),
                    "bbox": [round(float(v), 2) for v in (x0, y0, x1 - x0, y1 - y0)],
                    "iscrowd": 0,
                }
            )
        return result


def render_scene(
    image_id: int, photos: list[np.ndarray], size: int, rng: np.random.Generator
) -> tuple[np.ndarray, list[dict]]:
    """Render one picture (RGB, uint8) with its annotations."""
    width, height = (round(size * share) for share in ASPECTS[rng.integers(len(ASPECTS))])
    angle = rng.uniform(-np.pi, 0)  # the lamp hangs above
    light = np.array([np.cos(angle), np.sin(angle)])
    photo = photos[rng.integers(len(photos))]
    scene = Scene(shapes.make_background(photo, width, height, light, rng), light, rng)
    for k in range(rng.integers(2, 6)):  # the first takes turns, so that no category is rare
        turn = rng.integers(len(shapes.SHAPES)) if k else image_id
        shape = shapes.SHAPES[turn % len(shapes.SHAPES)]
        side = round(min(width, height) * np.exp(rng.uniform(np.log(0.25), np.log(0.55))))
        cover = shapes.random_crop(photos[rng.integers(len(photos))], 128, 128, rng)
        scene.add(shape.category, *shapes.render_sprite(shape, side, light, cover, rng))
    noise = rng.normal(0, 0.008, scene.image.shape)
    return np.rint(np.clip(scene.image + noise, 0, 1) * 255).astype(np.uint8), scene.annotations()


def write_split(folder: Path, split: str, ids: range, photos: list, parameters: Parameters) -> None:
    """Write the images and the annotation file of one split."""
    (folder / split).mkdir()
    images, annotations = [], []
    for image_id in track(ids, description=f"{split:9}"):
        rng = np.random.default_rng((parameters.seed, image_id))
        picture, found = render_scene(image_id, photos, parameters.size, rng)
        height, width = picture.shape[:2]
        path = folder / split / file_name(image_id)
        _, jpeg = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
        path.write_bytes(jpeg.tobytes())
        images.append({"id": image_id, "file_name": path.name, "width": width, "height": height})
        for k, annotation in enumerate(found):
            annotations.append({"id": image_id * 10 + k, "image_id": image_id, **annotation})
    content = {
        "info": {"description": "Drawn objects on scikit-image photographs", "version": "1.0"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": coco_categories(),
    }
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def state(out: Path, parameters: Parameters, force: bool) -> bool:
    """Return whether the wanted set is already there; raise where `out` must not be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        there = Parameters(**json.loads((out / MANIFEST).read_text())["parameters"])
    except (OSError, ValueError, KeyError, TypeError, DemoError):
        raise DemoError(f"{out} is not a demo set of this tool: name another --out.") from None
    present = {p.relative_to(out).as_posix() for p in out.rglob("*") if not p.is_dir()}
    if strangers := sorted(present - there.files()):
        raise DemoError(f"{out} also holds {strangers[0]}, which is not of the demo set: move it.")
    if force:
        return False
    if there != parameters:
        raise DemoError(f"{out} holds another demo set, {there}: pass --force to replace it.")
    return present == there.files()


def render(out: Path, parameters: Parameters) -> None:
    """Render the set beside `out` and move it there once it is complete."""
    photos = load_photographs()
    draft = out.with_name(f".{out.name}.draft-{os.getpid()}")
    try:
        (draft / "annotations").mkdir(parents=True)
        for split, ids in parameters.image_ids().items():
            write_split(draft, split, ids, list(photos.values()), parameters)
        manifest = {"parameters": asdict(parameters), "photographs": list(photos)}
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        if out.exists():
            shutil.rmtree(out)
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Render a small COCO-layout detection and instance-segmentation data set.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("data/demo_coco"), help="folder to make")
    parser.add_argument("--train", type=int, default=64, help="number of training images")
    parser.add_argument("--val", type=int, default=12, help="number of validation images")
    parser.add_argument("--size", type=int, default=320, help="longer side of an image in pixels")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other pictures")
    parser.add_argument("--force", action="store_true", help="replace an existing demo set")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit code."""
    args = parse_args(argv)
    try:
        parameters = Parameters(args.train, args.val, args.size, args.seed)
        if state(args.out.resolve(), parameters, args.force):
            print(f"{args.out} already holds this demo set; nothing to do.")
            return 0
        render(args.out.resolve(), parameters)
    except (DemoError, OSError) as error:
        print(f"make_demo_coco.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {args.train} training, {args.val} validation images.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
