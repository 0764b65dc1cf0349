"""Ground truth in memory, from whatever file it was read: the boxes of an image, and those of many images."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.runtime import UserError


@dataclass(frozen=True, eq=False)
class Record:
    """The ground truth of one image.

    path: of its file. width, height: in pixels, as the annotation says. boxes: (G, 4) float32, x1 y1 x2 y2 in pixels,
    continuous, inside the image; or oriented boxes (G, 5) float32, see detection.geometry.oriented, which may reach
    outside it. labels: (G,) int64, ids of classes. difficult: (G,) bool, VOC's and DOTA's difficult or COCO's crowd:
    not trained on, ignored when tested. image_id: int or str, as in the file. areas: (G,) float64, COCO's own `area`
    (of the mask), else that of the box."""

    path: Path
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray
    image_id: int | str
    areas: np.ndarray


@dataclass(frozen=True, eq=False)
class Annotations:
    """The ground truth of many images. classes: names in id order. source: where it was read, several joined by
    commas. category_ids: {name: id} as the file has them, where the source is one COCO file."""

    classes: list[str]
    records: list[Record]
    source: Path
    category_ids: dict[str, int] | None = None


class Findings(NamedTuple):
    """The findings of a reader that goes on after an error, in sentences. errors: each an object or image that was left
    out, or an object of DOTA with sides that cross. clipped: boxes that reach outside their image, horizontal ones cut
    off there."""

    errors: list[str]
    clipped: list[str]


@contextlib.contextmanager
def noting(findings: Findings | None) -> Iterator[None]:
    """Where there are findings, a UserError inside becomes one of them."""
    try:
        yield
    except UserError as error:
        if findings is None:
            raise
        findings.errors.append(str(error))


def record_of(path: Path, size: tuple[int, int], objects: Sequence[tuple[Any, ...]], image_id: int | str,
              oriented: bool = False) -> Record:
    """A Record of an image of `size` (width, height). objects: [(box, label, difficult, area)]; of horizontal boxes the
    area may be None."""
    boxes = np.array([box for box, *_ in objects], dtype=np.float32).reshape(-1, 5 if oriented else 4)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) if area is None else area for box, _, _, area in objects]
    return Record(path, *size, boxes, np.array([label for _, label, _, _ in objects], dtype=np.int64),
                  np.array([difficult for _, _, difficult, _ in objects], dtype=bool), image_id,
                  np.array(areas, dtype=np.float64))


def clip(box: Sequence[float], size: tuple[int, int], where: str, shown: Any, findings: Findings | None) -> list[float]:
    """The part of a box that lies in an image of `size` (width, height), rounded to float32. shown: the box as its file
    has it, for messages."""
    left, top, right, bottom = box = np.array(box, dtype=np.float32).tolist()
    if right <= left or bottom <= top:
        raise UserError(f"{where}: box {shown} has no area; expected a width and a height above 0")
    inside = [max(left, 0), max(top, 0), min(right, size[0]), min(bottom, size[1])]
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        raise UserError(f"{where}: box {shown} lies outside its image; expected it within {size[0]} x {size[1]} pixels")
    if findings and inside != box:
        findings.clipped.append(f"{where}: box {shown} reaches outside its image of {size[0]} x {size[1]} pixels")
    return inside
