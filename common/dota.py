"""DOTA's folders and label files. An object is its four points; who needs a box makes one of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common.coco import is_name, is_number
from common.images import image_files
from common.runtime import UserError

IMAGE_FOLDERS = ("images", "images/images", "images/part*", "images/part*/images", "part*/images", "part*")
LABEL_FOLDERS = ("labelTxt", "labelTxt-v1.0/labelTxt", "labelTxt-v1.0", "labelTxt/labelTxt")


class DotaObject(NamedTuple):
    """points: ((x, y), ...) of its four corners in pixels, in the order of the file. name: of its class. difficult: as
    in the file, False where it does not say. where: "file:line"."""

    points: tuple[tuple[float, float], ...]
    name: str
    difficult: bool
    where: str


def find_dota_files(folder: Path) -> list[tuple[Path, Path]]:
    """[(image, label file)] of a folder of DOTA as it is distributed, whole or in parts, by name. Raises UserError for
    an image or label file without its counterpart, and an image that is there twice."""
    images: dict[str, Path] = {}
    for pattern in IMAGE_FOLDERS:
        for place in sorted(folder.glob(pattern)):
            for name in image_files(place) if place.is_dir() else ():
                if images.setdefault(Path(name).stem, place / name) != place / name:
                    raise UserError(f"{place / name}: also found as {images[Path(name).stem]}; expected one of them")
    labels: dict[str, Path] = {}
    for place in (folder / name for name in LABEL_FOLDERS):
        labels = labels or {path.stem: path for path in place.glob("*.txt") if not path.name.startswith(".")}
    if not images or not labels:
        missing = "label files in labelTxt/" if images else "images in images/"
        raise UserError(f"{folder}: no {missing}; expected a folder of DOTA v1.0 with images/ and labelTxt/, or the "
                        "released lists anno/DOTA/DOTA_train.txt")
    for stem in sorted(images.keys() ^ labels.keys()):
        if stem in images:
            raise UserError(f"{images[stem]}: no label file {stem}.txt in {next(iter(labels.values())).parent}")
        raise UserError(f"{labels[stem]}: no image {stem}.png in {folder / 'images'}")
    return [(images[stem], labels[stem]) for stem in sorted(images)]


def read_label_file(path: str | Path, classes: Sequence[str] | None = None) -> list[DotaObject]:
    """The objects of a DOTA label file. classes: the names to expect, None for any.

    Lines are `x1 y1 x2 y2 x3 y3 x4 y4 class difficult`, difficult optional. Header lines (`imagesource:...`,
    `gsd:...`) and blank ones are skipped. Raises UserError naming any other line."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: could not be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'})") from None
    objects = []
    for number, line in enumerate(lines, 1):
        fields, where = line.split(), f"{path}:{number}"
        if not fields or fields[0].partition(":")[0].lower() in ("imagesource", "gsd"):
            continue
        points = corner_points(fields[:8])
        known = len(fields) in (9, 10) and is_name(fields[8]) and all(map(str.isdigit, fields[9:]))
        if points is None or not known:
            raise UserError(f"{where}: expected 'x1 y1 x2 y2 x3 y3 x4 y4 class difficult', found {line[:80]!r}")
        if classes is not None and fields[8] not in classes:
            raise UserError(f"{where}: class {fields[8][:40]!r} is none of the {len(classes)} of DOTA v1.0; use the "
                            "labels of v1.0 (labelTxt-v1.0), or remove the line")
        objects.append(DotaObject(points, fields[8], fields[9:] not in ([], ["0"]), where))
    return objects


def corner_points(fields: Sequence[str]) -> tuple[tuple[float, float], ...] | None:
    """The points ((x, y), ...) that eight fields of a line give; None for anything but eight numbers that may measure
    an image."""
    try:
        values = [float(value) for value in fields]
    except ValueError:
        return None
    if len(values) != 8 or not all(map(is_number, values)):
        return None
    return tuple(zip(values[0::2], values[1::2], strict=True))


def horizontal_box(points: Sequence[tuple[float, float]]) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the box around the points."""
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)
