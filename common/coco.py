"""COCO's annotation files: their structure, categories and boxes. Which images and objects are used is decided by who
reads them: recognition's chips (`preparation/chips.py`) or a detector (`detection/data/coco_files.py`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.files import read_json
from common.runtime import UserError

LARGEST = 1e9  # a coordinate, size or area beyond it is no measure of an image
MISFITS, FITS = 0.25, 0.9  # shares of the boxes from which on they are in another convention than COCO's


class CocoFile(NamedTuple):
    """images, annotations: the entries of the file, dicts. categories: {id: name} in ascending id."""

    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    categories: dict[int, str]


def read_coco_file(path: str | Path) -> CocoFile:
    """The CocoFile in `path`. Raises UserError for another structure, and for categories without an id or a name of
    their own."""
    content = read_json(path)
    if not isinstance(content, dict) or not all(
            isinstance(content.get(key), list) and all(isinstance(entry, dict) for entry in content[key])
            for key in ("images", "annotations", "categories")):
        raise UserError(f"{path}: not a COCO annotation file; expected lists of images, annotations and categories")
    pairs = [(entry.get("id"), entry.get("name")) for entry in content["categories"]]
    if not pairs or not all(type(number) is int and is_name(name) for number, name in pairs):
        wrong = next(pair for pair in pairs if type(pair[0]) is not int or not is_name(pair[1])) if pairs else "none"
        raise UserError(f"{path}: category {str(wrong)[:80]}; expected every category to have an id (whole number) and "
                        "a name of printable characters")
    categories = dict(sorted(pairs))
    if len(categories) < len(pairs) or len(set(categories.values())) < len(pairs):
        raise UserError(f"{path}: two categories have the same id or the same name; expected different ones")
    return CocoFile(content["images"], content["annotations"], categories)


def corners_of(bbox: Any, where: str) -> tuple[float, float, float, float]:
    """An annotation's (x, y, width, height) as (left, top, right, bottom). Raises UserError, naming the place `where`,
    for anything but four finite numbers."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(is_number, bbox)):
        raise UserError(f"{where}: bbox {str(bbox)[:80]}; expected [x, y, width, height], finite numbers")
    x, y, width, height = bbox
    return x, y, x + width, y + height


def check_convention(boxes: Sequence[tuple[list[float], tuple[float, float]]], path: str | Path) -> None:
    """Raise UserError where the boxes of an annotation file are in another convention than COCO's [x, y, width,
    height] in pixels: divided by the size of the image, where many lie within its first pixel; corners [x1, y1, x2,
    y2], where many would reach outside their image, and nearly all lie inside it as corners.

    boxes: [(bbox, (width, height) of its image)]."""
    if not boxes:
        return
    stated, sizes = (np.array(column, dtype=np.float64) for column in zip(*boxes, strict=True))  # (B, 4), (B, 2)
    near, far = stated[:, :2], stated[:, 2:]
    fractions = ((stated >= 0) & (stated <= 1)).all(axis=1)
    outside = (near + far > sizes + 1).any(axis=1)  # by more than what rounding and a count from 1 make
    corners = ((near >= -1) & (far > near) & (far <= sizes + 1)).all(axis=1)
    if fractions.mean() > MISFITS:
        found, likely = fractions, "divided by the size of the image"
    elif outside.sum() > 2 and outside.mean() > MISFITS and corners.mean() > FITS:
        found, likely = outside, "corners [x1, y1, x2, y2]"
    else:
        return
    what = "lie within the first pixel" if found is fractions else "reach outside their image"
    raise UserError(f"{path}: {found.sum()} of {len(boxes)} boxes {what}, the first: bbox "
                    f"{boxes[int(found.argmax())][0]}; they are probably {likely}; expected [x, y, width, height] in "
                    "pixels")


def is_crowd(entry: dict[str, Any], where: str) -> bool:
    """Whether an annotation is of a crowd. Raises UserError where `iscrowd` is anything but 0 or 1."""
    crowd = entry.get("iscrowd", 0)
    if type(crowd) not in (int, bool) or crowd not in (0, 1):
        raise UserError(f"{where}: iscrowd {str(crowd)[:40]!r}; expected 0 or 1")
    return bool(crowd)


def is_number(value: Any) -> bool:
    """Whether a value from a file is a number that may measure an image."""
    return type(value) in (int, float) and -LARGEST < value < LARGEST  # false for NaN, too


def is_name(value: Any) -> bool:
    """Whether a value from a file can be the name of a class."""
    return isinstance(value, str) and value.strip() != "" and value.isprintable()
