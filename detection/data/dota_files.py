"""Reading folders of DOTA: `images/` and `labelTxt/`, whole images or the windows that detection.split_dota has cut."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.dota import DotaObject, find_dota_files, horizontal_box, read_label_file
from common.files import read_json
from common.images import image_size
from common.runtime import UserError
from detection.data.records import Annotations, Findings, Record, clip, noting, record_of
from detection.geometry.oriented import minimum_area_rectangle

SPLIT = "split.json"  # in a folder of windows: how they were cut, and whether all of them were
LEAST_SIDE = 1e-3  # pixels; a rectangle around points on a line is no wider, after rounding


def read_dota(folder: Path, images: str | Path | None, findings: Findings | None, oriented: bool) -> Annotations:
    """The Annotations of one folder; its classes are in the order in which they occur. Else as
    annotations.read_annotations."""
    if images is not None:
        raise UserError(f"{images}: the images of {folder} are looked for in its own images/; give no folder for them")
    split = read_json(folder / SPLIT) if (folder / SPLIT).exists() else {"finished": True}
    if not isinstance(split, dict) or split.get("finished") is not True:
        raise UserError(f"{folder}: detection.split_dota has not cut all windows; give its command again")
    label_of, records = {}, []
    for image, labels in find_dota_files(folder):
        with noting(findings):
            records.append(_dota_record(image, labels, label_of, findings, oriented))
    return Annotations(list(label_of), records, folder)


def _dota_record(image: Path, labels: Path, label_of: dict[str, int], findings: Findings | None,
                 oriented: bool) -> Record:
    """One label file as a Record. Names not yet in `label_of`, {name: label}, are added to it."""
    size, items, objects = image_size(image), read_label_file(labels), []
    for item, rectangle in zip(items, rectangles(items), strict=True):
        with noting(findings):
            objects.append(_dota_object(item, rectangle, size, label_of, findings, oriented))
    return record_of(image, size, objects, image.stem, oriented)


def rectangles(items: Sequence[DotaObject]) -> list[list[float]]:
    """The minimum-area rectangles [cx, cy, w, h, theta] of objects."""
    points = torch.tensor([item.points for item in items], dtype=torch.float64).reshape(-1, 4, 2)
    return minimum_area_rectangle(points).tolist()


def _dota_object(item: DotaObject, rectangle: list[float], size: tuple[int, int], label_of: dict[str, int],
                 findings: Findings | None, oriented: bool) -> tuple[Any, ...]:
    """(box, label, difficult, area) of an object in an image of `size` (width, height)."""
    if min(rectangle[2:4]) < LEAST_SIDE:
        raise UserError(f"{item.where}: points {item.points} have no area; expected the corners of an object")
    upright = clip(horizontal_box(item.points), size, item.where, item.points, findings)
    if findings and sides_cross(item.points):
        findings.errors.append(f"{item.where}: two sides of {item.points} cross; expected its corners in their order")
    label = label_of.setdefault(item.name, len(label_of))
    area = rectangle[2] * rectangle[3] if oriented else None
    return rectangle if oriented else upright, label, item.difficult, area


def sides_cross(points: Sequence[tuple[float, float]]) -> bool:
    """Whether opposite sides of a quadrilateral cross, as they do where its corners are out of order."""
    a, b, c, d = points
    return _cross(a, b, c, d) or _cross(b, c, d, a)


def _cross(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float], d: tuple[float, float]) -> bool:
    """Whether the segments a b and c d cross at a point inside both."""
    return _side(a, b, c) * _side(a, b, d) < 0 and _side(c, d, a) * _side(c, d, b) < 0


def _side(a: tuple[float, float], b: tuple[float, float], p: tuple[float, float]) -> float:
    """On which side of the line from a to b a point lies: above 0, below 0, or 0 on it."""
    return (b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0])
