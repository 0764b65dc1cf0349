"""Ground truth: COCO's JSON files, Pascal VOC's image sets and DOTA's folders, as boxes in pixels.

A source is a COCO `.json`, a VOC image set (`VOC2007/ImageSets/Main/trainval.txt`), a folder of DOTA (`images/` and
`labelTxt/`), or several of them, which become one ("07+12"). Every box that cannot be learned from or tested against is
an error that names its place."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.files import file_identity
from common.runtime import UserError
from detection.data.coco_files import read_coco
from detection.data.dota_files import read_dota
from detection.data.records import Annotations, Findings, Record
from detection.data.voc_files import read_image_set


def read_annotations(source: str | Path | Sequence[str | Path], images: str | Path | None = None,
                     classes: Sequence[str] | None = None, findings: Findings | None = None,
                     oriented: bool = False) -> Annotations:
    """Read the ground truth of `source`: a path, several joined by commas, or a list of paths.

    images: the folder of the images. None is, for COCO, the folder `images` beside the file, ../train2017 of
    annotations/instances_train2017.json, or the file's own; for VOC JPEGImages. classes: the names expected, in id
    order: of a checkpoint, or of the training set. None takes COCO's categories in the order of their ids (of the first
    COCO source), or all names in VOC's files in alphabetical order. A class is matched by name, never by place.
    findings: None, or Findings to add to, where reading goes on. oriented: whether boxes are oriented, the rectangles
    of least area around DOTA's four points and COCO's polygons (of a crowd around its box); VOC has none.

    COCO's (x, y, width, height) and VOC's 1-based corners, from which 1 is subtracted, become 0-based corners. A box
    that reaches outside its image is clipped to it.

    Raises UserError with file and object for a box without area, outside its image or not finite, an unknown category
    or image, something missing, an image given twice, an image that is not there, and for broken JSON or XML."""
    paths = [Path(part) for part in ([source] if isinstance(source, Path) else
                                     source.split(",") if isinstance(source, str) else source)]
    parts = [_read_part(path, images, findings, oriented) for path in paths]
    coco = [part for part in parts if part.source.suffix.lower() == ".json"]
    if classes is None:
        classes = coco[0].classes if coco else sorted({name for part in parts for name in part.classes})
    if not classes:
        if findings and findings.errors:
            raise UserError(findings.errors[0])
        raise UserError(f"{paths[0]}: no object, and so no class; expected annotated images")
    return Annotations(list(classes), _join(parts, classes), Path(",".join(map(str, paths))),
                       parts[0].category_ids if len(parts) == 1 else None)


def _read_part(path: Path, images: str | Path | None, findings: Findings | None, oriented: bool) -> Annotations:
    """The Annotations of one source, by its kind."""
    if path.suffix.lower() == ".json":
        return read_coco(path, images, findings, oriented)
    if path.is_dir():
        return read_dota(path, images, findings, oriented)
    if oriented:
        raise UserError(f"{path}: boxes of Pascal VOC are horizontal; expected a folder of DOTA, or a COCO file "
                        "(.json) with polygons")
    return read_image_set(path, images, findings)


def _join(parts: Sequence[Annotations], classes: Sequence[str]) -> list[Record]:
    """The records of all `parts`, labelled by place in `classes`. Raises UserError for other classes and for an image
    that occurs twice."""
    number_of, source_of, records = {name: number for number, name in enumerate(classes)}, {}, []
    for part in parts:
        for label, name in enumerate(part.classes):
            place = next((record.path.name for record in part.records if label in record.labels), None)
            if name not in number_of and place:
                raise UserError(f"{part.source}: unknown category {name!r} (in {place}); expected {', '.join(classes)}")
        number = np.array([number_of.get(name, -1) for name in part.classes], dtype=np.int64)
        for record in part.records:
            file = file_identity(record.path)
            if file in source_of:
                raise UserError(f"{part.source}: image {record.path} is also in {source_of[file]}; expected it once")
            source_of[file] = part.source
            records.append(replace(record, labels=number[record.labels]))
    return records


def for_training(annotations: Annotations, min_side: int = 32) -> Annotations:
    """What of `annotations` is trained on: images with both sides at least `min_side` pixels, those without objects
    among them; of their objects those that are not difficult and at least one pixel wide and high, the published COCO
    recipe, or two pixels for oriented boxes, that of DOTA. What is left out of an image is background there."""
    records = []
    for record in annotations.records:
        if min(record.width, record.height) < min_side:
            continue
        oriented = record.boxes.shape[1] == 5
        sides = record.boxes[:, 2:4] if oriented else record.boxes[:, 2:] - record.boxes[:, :2]  # (G, 2)
        kept = ~record.difficult & (sides >= (2 if oriented else 1)).all(axis=1) & (record.areas > 0)
        records.append(replace(record, boxes=record.boxes[kept], labels=record.labels[kept],
                               difficult=record.difficult[kept], areas=record.areas[kept]))
    return replace(annotations, records=records)


def check_apart(train: Annotations, test: Annotations) -> None:
    """Raise UserError where an image file of `train` is one of `test`, under whatever path."""
    trained_on = {file_identity(record.path) for record in train.records}
    shared = [record.path for record in test.records if file_identity(record.path) in trained_on]
    if shared:
        raise UserError(f"{test.source}: {len(shared)} of its {len(test.records)} images are trained on too, the "
                        f"first: {shared[0]}; expected other images to test on")


def fingerprint(annotations: Annotations) -> str:
    """16 hexadecimal digits that change with the classes, the images' names and sizes, and every object; not with the
    folder that they lie in."""
    digest = hashlib.sha256(json.dumps(annotations.classes).encode())
    for record in annotations.records:
        place = [record.image_id, record.path.name, record.width, record.height, len(record.labels)]
        digest.update(json.dumps(place).encode())
        for values in (record.boxes, record.labels, record.difficult, record.areas):
            digest.update(values.tobytes())
    return digest.hexdigest()[:16]
