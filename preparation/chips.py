"""Objects annotated in large images -> one grey chip an object: DOTA's labelTxt and COCO's JSON.

The readers only plan the chips (`Chip`); `cut_chips` decodes each large image once and writes its chips."""

import math
import os
import re
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from common.coco import check_convention, corners_of, is_crowd, read_coco_file
from common.dota import find_dota_files, horizontal_box, read_label_file
from common.images import ValueRange, decode_grey, existing_folders, image_size, unreadable
from common.runtime import UserError
from common.workers import in_processes
from preparation.sources import Source, read_released
from recognition.published import DOTA

MIN_EDGE = 4  # pixels; a chip of an object smaller than this is widened with the pixels around it

Box = tuple[float, float, float, float]  # left, top, right, bottom
PixelBox = tuple[int, int, int, int]


class Chip(NamedTuple):
    """A chip to be cut. image: path of the large image. box: (left, top, right, bottom) in whole pixels, inside the
    image, right and bottom excluded. name: relative path of the chip, without its split."""

    image: str
    box: PixelBox
    name: str


# ---- boxes -----------------------------------------------------------------------------------------------------------


def chip_box(box: Box, size: tuple[int, int], margin: float) -> PixelBox | None:
    """The part of an image to cut out for an object, or None where the object lies wholly outside.

    box: (left, top, right, bottom), floats, in pixels. size: (width, height) of the image. margin: the chip's edges are
    1 + margin times the box's, half of it on each side. The result is in whole pixels, rounded outwards, with edges of
    at least MIN_EDGE where the image is that large, and clipped to the image: there is no padding."""
    if not overlaps(box, size):
        return None
    left, right = _chip_edges(box[0], box[2], size[0], margin)
    top, bottom = _chip_edges(box[1], box[3], size[1], margin)
    return left, top, right, bottom


def overlaps(box: Box, size: tuple[int, int]) -> bool:
    """Whether any part of `box` lies in an image of `size`."""
    return all(box[axis] < size[axis] and (box[axis + 2] > 0 or box[axis] == 0) for axis in (0, 1))


def _chip_edges(near: float, far: float, length: int, margin: float) -> tuple[int, int]:
    """The two edges of a chip along one axis of an image of `length` pixels."""
    pad = (far - near) * margin / 2
    near, far = max(math.floor(near - pad), 0), min(math.ceil(far + pad), length)
    if far - near < MIN_EDGE:
        near = min(max((near + far - MIN_EDGE) // 2, 0), max(length - MIN_EDGE, 0))
        far = min(near + MIN_EDGE, length)
    return near, far


def square_box(box: Box, size: tuple[int, int], margin: float) -> PixelBox | None:
    """Like `chip_box`, but a square with side (1 + margin) times the longer edge, around the same centre.

    A square that reaches beyond the image is shifted into it, and clipped where it is larger than the image."""
    if not overlaps(box, size):
        return None
    side = max(round((1 + margin) * max(box[2] - box[0], box[3] - box[1])), MIN_EDGE)
    near, far = [], []
    for axis in (0, 1):
        start = round((box[axis] + box[axis + 2] - side) / 2)
        near.append(max(min(start, size[axis] - side), 0))
        far.append(min(near[axis] + side, size[axis]))
    return (*near, *far)


# ---- DOTA ------------------------------------------------------------------------------------------------------------


def read_dota(paths: list[Path], margin: float) -> Source:
    """DOTA v1.0: the released chips, or one or two folders (train, val) with `images/` and `labelTxt/`."""
    released = read_released(paths, DOTA, "DOTA", "DOTA")
    if released:
        return released
    if len(paths) > 2:
        raise UserError(f"dota: expected the train folder and the val folder, found {len(paths)} sources")
    skipped, parts = [], []
    for folder in existing_folders(paths):
        parts.append(_read_dota_folder(folder, margin, skipped))
    return Source(DOTA["classes"], parts[0], parts[1] if len(parts) == 2 else None, DOTA, _skipped_note(skipped))


def _read_dota_folder(folder: Path, margin: float, skipped: list[str]) -> list[tuple[Chip, int]]:
    """[(Chip, label)] of every object in one folder. Adds the places of objects outside their image to `skipped`."""
    samples = []
    for image, labels in find_dota_files(folder):
        size = image_size(image)
        for number, item in enumerate(read_label_file(labels, DOTA["classes"])):
            box = chip_box(horizontal_box(item.points), size, margin)
            if box is None:
                skipped.append(item.where)
            else:
                name = f"{item.name}/{_file_name(image.stem)}_{number}.png"
                samples.append((Chip(str(image), box, name), DOTA["classes"].index(item.name)))
    return samples


# ---- COCO ------------------------------------------------------------------------------------------------------------


def read_coco(paths: list[Path], margin: float, images: Path | None = None) -> Source:
    """COCO annotation files: train, and test where there are two. images: the folder of the images, None to search for
    it. Classes are in ascending category id; crowd annotations are skipped."""
    if len(paths) > 2:
        raise UserError(f"coco: expected TRAIN.json and perhaps TEST.json, found {len(paths)} sources")
    skipped, crowds, parts, categories = [], 0, [], None
    for path in map(Path, paths):
        content = read_coco_file(path)
        if categories not in (None, content.categories):
            raise UserError(f"{path}: categories differ from those of {paths[0]}; expected the same ids and names")
        categories = content.categories
        samples, crowds_here = _read_coco_file(content, path, categories, margin, images, skipped)
        parts.append(samples)
        crowds += crowds_here
    notes = _skipped_note(skipped) + ([f"crowd annotations skipped: {crowds}"] if crowds else [])
    return Source(list(categories.values()), parts[0], parts[1] if len(parts) == 2 else None, notes=notes)


def _read_coco_file(content, path, categories, margin, images, skipped):
    """([(Chip, label)], number of crowd annotations) of one annotation file."""
    image_of = {str(entry.get("id")): entry for entry in content.images}
    if len(image_of) < len(content.images):
        raise UserError(f"{path}: two images have the same id")
    label_of = {category: label for label, category in enumerate(categories)}
    places, located, samples, stated, crowds = _image_places(path, images), {}, [], [], 0
    for number, annotation in enumerate(content.annotations):
        where = f"{path}: annotation {annotation.get('id', f'number {number}')}"
        if is_crowd(annotation, where):
            crowds += 1
            continue
        image_id, category = str(annotation.get("image_id")), annotation.get("category_id")
        if image_id not in image_of or type(category) is not int or category not in label_of:
            raise UserError(f"{where}: image_id {image_id} or category_id {category} is not in the file's lists")
        if image_id not in located:
            located[image_id] = _locate(image_of[image_id], places, path)
        image, size = located[image_id]
        stated.append((annotation.get("bbox"), size))
        box = square_box(_box_of(annotation, where), size, margin)
        if box is None:
            skipped.append(where)
            continue
        name = f"{_file_name(categories[category])}/{_file_name(image.stem)}_{number}.png"
        samples.append((Chip(str(image), box, name), label_of[category]))
    check_convention(stated, path)
    return samples, crowds


def _box_of(annotation, where):
    """(left, top, right, bottom) of an object, which may be as narrow as a line."""
    box = corners_of(annotation.get("bbox"), where)
    if box[2] < box[0] or box[3] < box[1]:
        raise UserError(f"{where}: bbox {str(annotation['bbox'])[:80]} has a negative width or height")
    return box


def _image_places(path, images):
    """The folders that may hold the images of an annotation file, in the order of the search."""
    if images is not None:
        return existing_folders([images])
    parent = path.resolve().parent
    siblings = sorted((place for place in parent.parent.iterdir() if place.is_dir() and place != parent),
                      key=lambda place: (place.name not in path.stem, place.name))
    return [parent, parent / "images", *siblings]


def _locate(entry, places, path):
    """(path, (width, height)) of an image of a COCO file. Raises UserError if its size is not the one in the file."""
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise UserError(f"{path}: image {entry.get('id')} has no file_name")
    image = next((place / name for place in places if (place / name).is_file()), None)
    if image is None:
        raise UserError(f"{path}: image {name} is not beside the file, in images/ or in a neighbouring folder; give "
                        "--images DIR")
    size = image_size(image)
    stated = entry.get("width", size[0]), entry.get("height", size[1])
    if stated != size:
        raise UserError(f"{image}: is {size[0]} x {size[1]} pixels, but {path} says {stated[0]} x {stated[1]}: its "
                        "boxes belong to another version of the image")
    return image, size


# ---- cutting ---------------------------------------------------------------------------------------------------------


def cut_chips(chips: list[tuple[str, Chip]], folder: Path, processes: int | None,
              value_range: ValueRange | None) -> None:
    """Write grey PNGs. chips: [(relative path in `folder`, Chip)]. value_range: as of `common.images.decode`. Raises
    UserError naming the image or chip."""
    chips_of = {}
    for path, chip in chips:
        chips_of.setdefault(chip.image, []).append((os.path.join(folder, path), chip.box))
    for place in {os.path.dirname(target) for cuts in chips_of.values() for target, _ in cuts}:
        os.makedirs(place, exist_ok=True)
    with tqdm(total=len(chips), desc="cutting chips", unit="chip", disable=None) as bar:
        jobs = [(path, cuts, value_range) for path, cuts in chips_of.items()]
        for reason, count in in_processes(_cut_image, jobs, processes):
            if reason:
                raise UserError(reason)
            bar.update(count)


def _cut_image(job):
    """Cut all chips of one image. Returns (None, their number), or (error, 0)."""
    path, cuts, value_range = job
    try:
        grey = decode_grey(path, value_range)
    # A damaged file can make a decoder raise any exception.
    except Exception as error:
        return f"{path}: {unreadable(error)}", 0
    for target, box in cuts:
        try:
            grey.crop(box).save(target)
        except OSError as error:
            return f"{target}: could not be written ({error.strerror or error})", 0
    return None, len(cuts)


def _file_name(text):
    """`text` as a plain file name: no separators, no spaces, not hidden."""
    return re.sub(r"[^\w.-]+", "_", text)[:80].strip(".") or "_"


def _skipped_note(skipped):
    if not skipped:
        return []
    return [f"objects skipped because they lie wholly outside their image: {len(skipped)}, the first at {skipped[0]}"]
