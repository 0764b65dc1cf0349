"""DOTA's large images as windows with labels of their own, and the detections in windows put together again.

A window has the name that the development kit gives it, <image>__<scale>__<x>___<y>: its near corner in the image when
that is scaled."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from common.dota import DotaObject
from common.runtime import UserError
from detection.data.dota_files import rectangles
from detection.data.tiles import windows
from detection.geometry.oriented import corners, polygon_iof, rotated_nms

LEAST_PART = 0.7  # of an object's area that must lie in a window, for the window to have it
NAME = re.compile(r"(.+)__(\d+(?:\.\d+)?)__(\d+)___(\d+)")


class Window(NamedTuple):
    """box: (x0, y0, x1, y1) in the scaled image, pixels, x1 and y1 excluded. objects: indices of those in it."""

    name: str
    scale: float
    box: tuple[int, int, int, int]
    objects: list[int]


def plan_windows(image: str, items: Sequence[DotaObject], size: tuple[int, int], side: int, overlap: int,
                 scales: Sequence[float]) -> list[Window]:
    """The windows of side x side pixels, which overlap by `overlap`, of an image of `size` (width, height) at each of
    `scales`. An object belongs to each window that at least LEAST_PART of its rectangle lies in."""
    polygons, planned = corners(torch.tensor(rectangles(items), dtype=torch.float64).reshape(-1, 5)), []
    for scale in scales:
        boxes = windows(*(max(int(length * scale), 1) for length in reversed(size)), side, overlap)
        x0, y0, x1, y1 = torch.tensor(boxes, dtype=torch.float64).div(scale).unbind(1)  # (W,)
        frames = torch.stack([x0, y0, x1, y0, x1, y1, x0, y1], dim=1).unflatten(1, (4, 2))
        parts = polygon_iof(polygons, frames[:, None])  # (W, G)
        planned += [Window(f"{image}__{scale:g}__{box[0]}___{box[1]}", scale, box, own.nonzero().squeeze(1).tolist())
                    for box, own in zip(boxes, parts >= LEAST_PART, strict=True)]
    return planned


def window_labels(window: Window, items: Sequence[DotaObject]) -> str:
    """The label file of a window. Objects that it cuts keep the points that lie outside it."""
    lines = []
    for item in (items[index] for index in window.objects):
        points = [value * window.scale - near for point in item.points
                  for value, near in zip(point, window.box[:2], strict=True)]
        lines.append(" ".join(f"{value:.7g}" for value in points) + f" {item.name} {int(item.difficult)}\n")
    return "".join(lines)


def merge_windows(names: Sequence[str], detections: Sequence[Mapping[str, torch.Tensor]],
                  threshold: float = 0.1) -> dict[str, dict[str, torch.Tensor]]:
    """{image: its detections} of the detections in windows: moved to their places in the image, brought to its scale,
    and thinned out by rotated NMS, each class for itself.

    names: of the windows, without suffix. detections: a dict a window, with oriented boxes (M, 5) in its pixels, scores
    (M,) and labels (M,). Returns images in the order of their first windows. Raises UserError for another name."""
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = defaultdict(list)
    for name, found in zip(names, detections, strict=True):
        image, scale, x, y = place_of(name)
        boxes = found["boxes"]
        moved = (boxes + boxes.new_tensor([x, y, 0, 0, 0])) / boxes.new_tensor([scale, scale, scale, scale, 1])
        parts[image].append((moved, found["scores"], found["labels"]))
    merged = {}
    for image, own in parts.items():
        boxes, scores, labels = (torch.cat(values) for values in zip(*own, strict=True))
        boxes, scores, labels = rotated_nms(boxes, scores, labels, threshold, limit=len(boxes))
        merged[image] = {"boxes": boxes, "scores": scores, "labels": labels}
    return merged


def place_of(name: str) -> tuple[str, float, int, int]:
    """(image, scale, x, y) of a window's name."""
    found = NAME.fullmatch(name)
    if not found or float(found[2]) <= 0:
        raise UserError(f"{name}: not the name of a window; expected <image>__<scale>__<x>___<y>, as "
                        "detection.split_dota gives")
    return found[1], float(found[2]), int(found[3]), int(found[4])
