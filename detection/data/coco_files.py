"""Reading COCO's JSON files."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.coco import LARGEST, check_convention, corners_of, is_crowd, is_number, read_coco_file
from common.images import existing_folders
from common.runtime import UserError
from detection.data.records import Annotations, Findings, clip, noting, record_of
from detection.geometry.oriented import from_horizontal, minimum_area_rectangle

# The two boxes of no area in the published instances_train2017.json: their image ids and near corners.
COCO_EMPTY = {200365: [296.65, 388.33], 550395: [9.98, 188.56]}


def read_coco(path: Path, images: str | Path | None, findings: Findings | None, oriented: bool) -> Annotations:
    """The Annotations of one COCO file; its classes are in ascending category id. Else as
    annotations.read_annotations."""
    content = read_coco_file(path)
    label_of = {category: label for label, category in enumerate(content.categories)}
    folder = _image_folder(path) if images is None else existing_folders([images])[0]
    sizes, places, objects, stated = {}, {}, {}, []
    for number, entry in enumerate(content.images):
        with noting(findings):
            image_id, size = _coco_image(entry, f"{path}: image {entry.get('id', f'number {number}')}")
            if sizes.setdefault(image_id, size) is not size:
                raise UserError(f"{path}: two images have the id {image_id!r}; expected different ones")
            objects[image_id] = []
            places[image_id] = _existing_image(folder, entry.get("file_name"), f"{path}: image {image_id}")
    if not sizes and not (findings and findings.errors):
        raise UserError(f"{path}: no images; expected a list of them")
    for number, entry in enumerate(content.annotations):
        with noting(findings):
            where = f"{path}: annotation {entry.get('id', f'number {number}')}"
            found = _coco_object(entry, sizes, label_of, where, findings)
            if found:
                objects[entry["image_id"]].append(_turned(entry, found, where) if oriented else found)
                stated.append((entry["bbox"], sizes[entry["image_id"]]))
    with noting(findings):
        check_convention(stated, path)
    records = [record_of(place, sizes[image_id], objects[image_id], image_id, oriented)
               for image_id, place in places.items()]
    ids = {name: category for category, name in content.categories.items()}
    return Annotations(list(ids), records, path, ids)


def _image_folder(path: Path) -> Path:
    """The folder of the images of a COCO file: `images` beside it; in COCO's own layout train2017 beside the folder of
    annotations/instances_train2017.json; else that of the file."""
    candidates, parent = [path.parent / "images"], path.absolute().parent
    if parent.name == "annotations":
        candidates.append(parent.parent / path.stem.rpartition("_")[2])
    return next((folder for folder in candidates if folder.is_dir()), path.parent)


def _coco_image(entry: dict[str, Any], where: str) -> tuple[int | str, tuple[int, int]]:
    """(id, (width, height)) of an entry of `images`."""
    if type(entry.get("id")) not in (int, str):
        raise UserError(f"{where}: id is missing; expected a whole number or a text")
    size = entry.get("width"), entry.get("height")
    if not all(type(side) is int and 0 < side < LARGEST for side in size):
        raise UserError(f"{where}: width {str(size[0])[:40]}, height {str(size[1])[:40]}; expected whole numbers above "
                        "0")
    return entry["id"], size


def _existing_image(folder: Path, name: Any, where: str) -> Path:
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: no file_name; expected the name of the image's file in {folder}")
    if not os.path.isfile(folder / name):
        raise UserError(f"{where}: no such image: {folder / name}; give the folder of the images, if they are "
                        "elsewhere")
    return folder / name


def _coco_object(entry: dict[str, Any], sizes: dict[int | str, tuple[int, int]], label_of: dict[int, int], where: str,
                 findings: Findings | None) -> tuple[list[float], int, bool, float | None] | None:
    """(box, label, crowd, area) of an entry of `annotations`; None for the two that are known to be empty."""
    image_id, category, bbox = entry.get("image_id"), entry.get("category_id"), entry.get("bbox")
    if type(image_id) not in (int, str) or image_id not in sizes:
        raise UserError(f"{where}: image_id {str(image_id)[:40]} is unknown; expected the id of one of `images`")
    if type(category) is not int or category not in label_of:
        raise UserError(f"{where}: category_id {str(category)[:40]} is unknown; expected the id of one of `categories`")
    corners = corners_of(bbox, where)
    area = entry.get("area")
    if area is not None and not (is_number(area) and area >= 0):
        raise UserError(f"{where}: area {str(area)[:40]}; expected a number of at least 0")
    if area == 0:  # which no box with a width and a height has
        area = None
    if bbox[3] == 0 and COCO_EMPTY.get(image_id) == bbox[:2]:
        return None
    box = clip(corners, sizes[image_id], where, bbox, findings)
    return box, label_of[category], is_crowd(entry, where), area


# ---- oriented boxes --------------------------------------------------------------------------------------------------


def _turned(entry: dict[str, Any], found: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    """What `_coco_object` has found with an oriented box: the rectangle of least area around the object's polygons, all
    of them together; for a crowd, whose mask is no polygon, its own box."""
    box, label, crowd, area = found
    rectangle = from_horizontal(torch.tensor(box)) if crowd else _rectangle(entry.get("segmentation"), where)
    return rectangle.tolist(), label, crowd, float(rectangle[2] * rectangle[3]) if area is None else area


def _rectangle(polygons: Any, where: str) -> torch.Tensor:
    """The rectangle (5,) of least area around the polygons of a segmentation."""
    if not isinstance(polygons, list) or not polygons or not all(map(_is_polygon, polygons)):
        raise UserError(f"{where}: segmentation {str(polygons)[:80]}; expected polygons, [[x1, y1, x2, y2, x3, y3, ...]"
                        ", ...] of finite numbers, that an oriented box can be put around")
    hull = convex_hull([point for polygon in polygons for point in zip(polygon[::2], polygon[1::2], strict=True)])
    if len(hull) < 3:
        raise UserError(f"{where}: segmentation {str(polygons)[:80]} has no area; expected the outline of an object")
    return minimum_area_rectangle(torch.tensor(hull, dtype=torch.float64))


def _is_polygon(value: Any) -> bool:
    return isinstance(value, list) and len(value) >= 6 and len(value) % 2 == 0 and all(map(is_number, value))


def convex_hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of the convex hull of points (x, y): two or one where they lie on a line, which has no area (Andrew's
    monotone chain, Information Processing Letters 1979)."""
    points = sorted(set(points))
    return points if len(points) < 3 else _half_hull(points)[:-1] + _half_hull(points[::-1])[:-1]


def _half_hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The chain from the first to the last of sorted points that has them all on one side."""
    chain = []
    for x, y in points:
        while len(chain) > 1 and ((chain[-1][0] - chain[-2][0]) * (y - chain[-2][1])
                                  <= (chain[-1][1] - chain[-2][1]) * (x - chain[-2][0])):
            chain.pop()
        chain.append((x, y))
    return chain
