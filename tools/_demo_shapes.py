"""Drawn objects for `make_demo_coco.py`: each has the shape and the texture of one COCO category.

A painter draws one upright object on a square canvas whose coordinates run from -1 to 1 (y points
down) and keeps within the unit circle, so that no rotation cuts it. `render_sprite` turns a
painting into a small anti-aliased picture; `visible_polygons` traces what is seen of it.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

SUPERSAMPLING = 4
MIN_PIECE_PX = 12
Color = tuple[float, float, float]
Points = list[tuple[float, float]]


class Canvas:
    """A square picture and its coverage, drawn without anti-aliasing at high resolution."""

    def __init__(self, side: int) -> None:
        self.side = side
        self.rgb = np.zeros((side, side, 3), np.uint8)
        self.alpha = np.zeros((side, side), np.uint8)

    def _pixels(self, points: Points) -> np.ndarray:
        return np.rint((np.asarray(points) + 1) * (self.side - 1) / 2).astype(np.int32)

    def _length(self, units: float) -> int:
        return max(1, round(units * self.side / 2))

    def _paint(self, draw: Callable, color: Color) -> None:
        draw(self.rgb, tuple(round(255 * c) for c in color))
        draw(self.alpha, 255)

    def polygon(self, points: Points, color: Color) -> None:
        """Fill a polygon."""
        pixels = self._pixels(points)
        self._paint(lambda image, value: cv2.fillPoly(image, [pixels], value), color)

    def polyline(self, points: Points, color: Color, width: float) -> None:
        """Draw an open line with round ends."""
        pixels, thickness = self._pixels(points), self._length(width)
        self._paint(
            lambda image, value: cv2.polylines(image, [pixels], False, value, thickness), color
        )

    def disc(self, center: tuple[float, float], radius: float, color: Color) -> None:
        """Fill a circle."""
        (x, y), r = self._pixels([center])[0].tolist(), self._length(radius)
        self._paint(lambda image, value: cv2.circle(image, (x, y), r, value, -1), color)

    def text(self, word: str, width: float, height: float, color: Color) -> None:
        """Write a word into a box of the given size around the centre."""
        font, thick = cv2.FONT_HERSHEY_SIMPLEX, 28
        (w, h), _ = cv2.getTextSize(word, font, 6, thick)
        glyphs = np.zeros((h + 2 * thick, w + 2 * thick), np.uint8)
        cv2.putText(glyphs, word, (thick, h + thick), font, 6, 255, thick)
        ys, xs = np.nonzero(glyphs)
        glyphs = glyphs[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        size = (self._length(width), self._length(height))
        ink = cv2.resize(glyphs, size, interpolation=cv2.INTER_AREA)[..., None] / 255
        left, top = (self.side - size[0]) // 2, (self.side - size[1]) // 2
        box = self.rgb[top : top + size[1], left : left + size[0]]
        box[:] = np.rint(box * (1 - ink) + 255 * np.asarray(color) * ink)

    def picture(self, photo: np.ndarray, corner: tuple[float, float], size: float) -> None:
        """Paste a square RGB picture; `corner` is its upper left."""
        (left, top), side = self._pixels([corner])[0].tolist(), self._length(size)
        patch = cv2.resize(photo, (side, side), interpolation=cv2.INTER_AREA)
        self.rgb[top : top + side, left : left + side] = patch


def _hsv(hue: float, saturation: float, value: float) -> Color:
    return colorsys.hsv_to_rgb(hue % 1, saturation, value)


def _arc(center: tuple[float, float], radius: float, start: float, stop: float, n: int) -> Points:
    """Return n points on a circle, angles in degrees, clockwise on the screen from +x."""
    angles = np.radians(np.linspace(start, stop, n))
    x, y = center
    return [(x + radius * np.cos(a), y + radius * np.sin(a)) for a in angles]


def _two_hues(rng: np.random.Generator) -> tuple[Color, Color]:
    """Return two strong colours that are far apart in hue."""
    hue = rng.random()
    other = hue + rng.uniform(0.3, 0.7)
    return _hsv(hue, rng.uniform(0.75, 1), 0.95), _hsv(other, rng.uniform(0.6, 1), 0.95)


def paint_sports_ball(canvas: Canvas, rng: np.random.Generator, photo: np.ndarray) -> None:
    """An orange ball with dark seams."""
    seam = _hsv(0.05, 0.6, 0.15)
    canvas.disc((0, 0), 0.95, _hsv(rng.uniform(0.04, 0.09), rng.uniform(0.8, 0.95), 0.95))
    for line in ([(-0.91, 0.0), (0.91, 0.0)], [(0.0, -0.91), (0.0, 0.91)]):
        canvas.polyline(line, seam, 0.07)
    for side, middle in ((-1, 0), (1, 180)):
        canvas.polyline(_arc((1.25 * side, 0), 0.9, middle - 46, middle + 46, 40), seam, 0.07)


def paint_stop_sign(canvas: Canvas, rng: np.random.Generator, photo: np.ndarray) -> None:
    """A red octagon with a white border and the word STOP."""
    red, white = _hsv(rng.uniform(-0.02, 0.015), 0.9, rng.uniform(0.75, 0.9)), (0.96, 0.96, 0.94)
    canvas.polygon(_arc((0, 0), 0.98, 22.5, 337.5, 8), white)
    canvas.polygon(_arc((0, 0), 0.87, 22.5, 337.5, 8), red)
    canvas.text("STOP", width=1.3, height=0.5, color=white)


def paint_kite(canvas: Canvas, rng: np.random.Generator, photo: np.ndarray) -> None:
    """A kite: four panels in two colours, a cross of spars."""
    half, cross = rng.uniform(0.62, 0.72), rng.uniform(-0.4, -0.3)
    top, right, bottom, left = (0, -0.98), (half, cross), (0, 0.98), (-half, cross)
    one, two = _two_hues(rng)
    canvas.polygon([top, right, bottom, left], one)
    for corners in ([right, bottom], [left, top]):
        canvas.polygon([*corners, (0, cross)], two)
    for spar in ([top, bottom], [left, right]):
        canvas.polyline(spar, (0.2, 0.16, 0.12), 0.045)


def paint_clock(canvas: Canvas, rng: np.random.Generator, photo: np.ndarray) -> None:
    """A pale round face with twelve marks and two hands in a dark or coloured rim."""
    rim, ink = _hsv(rng.random(), rng.uniform(0.1, 0.7), rng.uniform(0.15, 0.45)), (0.08,) * 3
    canvas.disc((0, 0), 0.96, rim)
    canvas.disc((0, 0), 0.8, _hsv(rng.uniform(0.1, 0.16), rng.uniform(0, 0.12), 0.97))
    inner, outer = (_arc((0, 0), radius, 0, 330, 12) for radius in (0.62, 0.72))
    for hour in range(12):
        canvas.polyline([inner[hour], outer[hour]], ink, 0.09 if hour % 3 == 0 else 0.05)
    for length, width in ((0.38, 0.1), (0.58, 0.07)):
        angle = rng.uniform(0, 360)
        canvas.polyline([(0, 0), _arc((0, 0), length, angle, angle, 1)[0]], ink, width)
    canvas.disc((0, 0), 0.08, _hsv(0, 0.8, 0.8))


def paint_umbrella(canvas: Canvas, rng: np.random.Generator, photo: np.ndarray) -> None:
    """An open umbrella from the side: striped dome with a scalloped hem, shaft and hook."""
    one, two = _two_hues(rng)
    panels, hem, radius, shaft = 5, 0.12, 0.93, (0.28, 0.18, 0.1)
    hook = _arc((0.14, 0.74), 0.14, 180, 20, 20)
    canvas.polyline([(0, -0.9), (0, 0.74), *hook], shaft, 0.11)
    xs = np.linspace(-radius, radius, panels + 1)
    for i in range(panels):
        # Each panel narrows to the apex; its outer edge follows the dome, its hem is an arc.
        rise = np.linspace(0, 1, 20)
        left, right = (
            [(x * np.sqrt(1 - t * t), hem - radius * t) for t in rise] for x in (xs[i], xs[i + 1])
        )
        half, turns = (xs[i + 1] - xs[i]) / 2, np.linspace(0, np.pi, 15)
        scallop = [(xs[i] + half * (1 + np.cos(a)), hem - 0.1 * np.sin(a)) for a in turns]
        canvas.polygon([*left, *right[::-1], *scallop], one if i % 2 == 0 else two)


def paint_book(canvas: Canvas, rng: np.random.Generator, photo: np.ndarray) -> None:
    """A closed book: coloured cover, spine, page edges, a photograph and lines of title."""
    hue, saturation, w, h = rng.random(), rng.uniform(0.5, 0.8), 0.6, 0.76  # half sides

    def rectangle(x0: float, y0: float, x1: float, y1: float, color: Color) -> None:
        canvas.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], color)

    rectangle(-w, -h, w, h, (0.93, 0.91, 0.84))
    for y in np.linspace(h - 0.06, h, 3):
        canvas.polyline([(-w, y), (w, y)], (0.65, 0.62, 0.55), 0.012)
    rectangle(-w, -h, w - 0.06, h - 0.08, _hsv(hue, saturation, rng.uniform(0.55, 0.85)))
    rectangle(-w, -h, -w + 0.15, h - 0.08, _hsv(hue, saturation, 0.3))
    for y, length in ((-0.6, 0.75), (-0.46, 0.5)):
        rectangle(-0.35, y, -0.35 + length, y + 0.07, (0.97, 0.95, 0.85))
    canvas.picture(photo, (-0.35, -0.28), 0.8)


@dataclass(frozen=True)
class Shape:
    """How objects of one category are painted and turned.

    Args:
        category: COCO name.
        paint: Draws one upright object; gets the canvas, the random generator and a square photo.
        max_turn_deg: Largest rotation to either side.
        round: Whether light falls on it as on a sphere, not as on a flat sheet.
    """

    category: str
    paint: Callable[[Canvas, np.random.Generator, np.ndarray], None]
    max_turn_deg: float
    round: bool = False


SHAPES = (
    Shape("stop sign", paint_stop_sign, 20),
    Shape("umbrella", paint_umbrella, 35),
    Shape("sports ball", paint_sports_ball, 180, round=True),
    Shape("kite", paint_kite, 180),
    Shape("book", paint_book, 50),
    Shape("clock", paint_clock, 25),
)


def _lighting(side: int, light: np.ndarray, is_round: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return brightness factors and highlights, each [side, side, 1]."""
    ys, xs = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j].astype(np.float32)
    toward = xs * light[0] + ys * light[1]
    if not is_round:
        return (0.95 + 0.22 * toward)[..., None], np.zeros((side, side, 1), np.float32)
    depth = np.sqrt(np.clip(1 - xs**2 - ys**2, 0, 1))
    facing = np.clip(0.75 * toward + 0.66 * depth, 0, 1)
    return (0.35 + 0.75 * facing)[..., None], (0.5 * facing**24)[..., None]


def render_sprite(
    shape: Shape, side: int, light: np.ndarray, photo: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Paint one randomly turned, slightly squeezed and lit object.

    Args:
        shape: What to paint.
        side: Side of the result in pixels.
        light: Unit vector (x, y) towards the lamp, in image coordinates.
        photo: Square RGB picture, uint8, for painters that show one.
        rng: Source of all variation.

    Returns:
        Colour times coverage [side, side, 3] and coverage [side, side, 1], float32 from 0 to 1.
    """
    canvas = Canvas(side * SUPERSAMPLING)
    shape.paint(canvas, rng, photo)
    picture = np.dstack([canvas.rgb, canvas.alpha]).astype(np.float32) / 255
    picture[..., :3] *= picture[..., 3:]
    turn = np.radians(rng.uniform(-shape.max_turn_deg, shape.max_turn_deg))
    squeeze = 1.0 if shape.round else rng.uniform(0.85, 1)
    cos, sin, middle = np.cos(turn), np.sin(turn), (canvas.side - 1) / 2
    linear = np.array([[cos * squeeze, -sin], [sin * squeeze, cos]])
    matrix = np.column_stack([linear, middle - linear @ (middle, middle)])
    picture = cv2.warpAffine(picture, matrix, (canvas.side, canvas.side), flags=cv2.INTER_LINEAR)
    picture = cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA)
    rgb, alpha = picture[..., :3], picture[..., 3:]
    brightness, highlight = _lighting(side, light, shape.round)
    grain = rng.normal(1, 0.02, (side, side, 1)).astype(np.float32)
    rgb = rgb * brightness * grain * rng.uniform(0.85, 1.1) + highlight * alpha
    return np.clip(rgb, 0, alpha).astype(np.float32), alpha


def random_crop(photo: np.ndarray, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Cut a random window of the given aspect out of a photograph and resize it."""
    scale = min(photo.shape[1] / width, photo.shape[0] / height) * rng.uniform(0.6, 1)
    w, h = int(width * scale), int(height * scale)
    left, top = rng.integers(photo.shape[1] - w + 1), rng.integers(photo.shape[0] - h + 1)
    crop = photo[top : top + h, left : left + w]
    crop = cv2.resize(crop, (width, height), interpolation=cv2.INTER_AREA)
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def make_background(
    photo: np.ndarray, width: int, height: int, light: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return a blurred, paler and unevenly lit crop, float32 from 0 to 1."""
    image = random_crop(photo, width, height, rng).astype(np.float32) / 255
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.003, 0.007) * max(width, height))
    grey = image.mean(axis=2, keepdims=True)
    image = grey + (image - grey) * rng.uniform(0.35, 0.7)
    if np.array_equal(photo[..., 0], photo[..., 2]):  # a grey photograph gets a tint
        image = image * (1 + rng.uniform(-0.15, 0.15, 3).astype(np.float32))
    ys, xs = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    toward = 1 + rng.uniform(0.1, 0.25) * (xs * light[0] + ys * light[1])
    return 0.08 + image * toward[..., None] * rng.uniform(0.6, 0.85)


def visible_polygons(coverage: np.ndarray) -> list[np.ndarray] | None:
    """Trace the region of coverage above one half to a fraction of a pixel.

    Args:
        coverage: [height, width], from 0 to 1.

    Returns:
        Polygons [n, 2] of (x, y) with pixel (0, 0) spanning 0..1, as COCO counts; None where the
        region is empty or has a hole, which COCO's polygons cannot say.
    """
    from skimage.measure import approximate_polygon, find_contours

    height, width = coverage.shape
    polygons = []
    for contour in find_contours(np.pad(coverage, 1), 0.5):
        points = approximate_polygon(contour[:, ::-1] - 0.5, 0.2)[:-1]
        points = np.clip(points, 0, (width, height)).round(2)
        area = signed_area(points)
        if area < -MIN_PIECE_PX:
            return None
        if area > MIN_PIECE_PX:
            polygons.append(points)
    return polygons or None


def signed_area(points: np.ndarray) -> float:
    """Return the area of a polygon, positive where its points run as `find_contours` runs."""
    x, y = points.T
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
