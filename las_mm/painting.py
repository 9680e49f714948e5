"""A model's predictions drawn on an image: boxes, instance masks, semantic maps, labels."""

from __future__ import annotations

import cv2
import numpy as np
import torch


def paint_predictions(
    image: np.ndarray, sample, meta: dict, score_thr: float
) -> tuple[np.ndarray, str, list]:
    """The image with the predicted masks, a caption, and the instances' (box, label, colour)."""
    classes = meta.get("classes") or ()

    def name(label: int) -> str:
        return str(classes[label]) if label < len(classes) else f"class {label}"

    painted, found = image.astype(np.float32), []
    if (predicted := getattr(sample, "pred_label", None)) is not None:
        scores = getattr(sample, "pred_score", None)
        texts = [
            name(label) if scores is None else f"{name(label)} {scores[label].item():.0%}"
            for label in predicted.flatten().tolist()
        ]
        return image, f"prediction: {', '.join(texts) or 'none'}", found
    if (semantic := getattr(sample, "pred_sem_seg", None)) is not None:
        labels = semantic.sem_seg.squeeze(0).cpu().numpy()
        for label in np.unique(labels):
            _blend(painted, labels == label, _color(int(label), meta))
    instances = getattr(sample, "pred_instances", None)
    if instances is not None and "scores" in instances:
        instances = instances[instances.scores > score_thr].cpu()
        masks = _numpy(instances.get("masks"))
        boxes = _numpy(instances.get("bboxes"))
        for i, (label, score) in enumerate(zip(instances.labels.tolist(), instances.scores)):
            color = _color(label, meta)
            if masks is not None and masks.shape[1:] == image.shape[:2]:
                _blend(painted, masks[i].astype(bool), color)
            if boxes is not None and boxes.shape[1] == 4:
                found.append((boxes[i], f"{name(label)} {score:.0%}", color))
        caption = f"predictions with scores over {score_thr:g}: {len(instances)}"
    else:
        caption = "image" if semantic is None else "prediction"
    return painted.round().astype(np.uint8), caption, found


def draw_box(axis, box: np.ndarray, label: str, color: tuple, window: tuple) -> None:
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = (float(v) for v in box)
    color = tuple(c / 255 for c in color)
    axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, lw=1.4))
    axis.text(
        max(x0, window[0]),
        max(y0, window[2]),
        label,
        fontsize=6.5,
        color="white" if np.dot(color, (0.3, 0.59, 0.11)) < 0.6 else "black",
        va="top",
        clip_on=True,
        bbox=dict(facecolor=color, alpha=0.8, pad=0.8, edgecolor="none"),
    )


def _blend(painted: np.ndarray, mask: np.ndarray, color: tuple) -> None:
    painted[mask] = 0.5 * painted[mask] + 0.5 * np.float32(color)


def _color(label: int, meta: dict) -> tuple[int, int, int]:
    palette = meta.get("palette")
    if isinstance(palette, (list, tuple)) and label < len(palette):
        return tuple(palette[label])
    hue = np.uint8([[[int(label * 0.618 % 1 * 179), 200, 230]]])  # golden ratio: neighbours differ
    return tuple(int(c) for c in cv2.cvtColor(hue, cv2.COLOR_HSV2RGB)[0, 0])


def _numpy(values) -> np.ndarray | None:
    """A tensor, mmdet's boxes or mmdet's masks as an array."""
    if hasattr(values, "to_ndarray"):
        return values.to_ndarray()
    values = getattr(values, "tensor", values)
    return values.numpy() if isinstance(values, torch.Tensor) else values
