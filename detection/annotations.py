"""Ground truth: COCO's JSON files and Pascal VOC's image sets, as boxes in pixels.

A source is a COCO `.json`, a VOC image set (`VOC2007/ImageSets/Main/trainval.txt`), or several of either, which become
one ("07+12"). Every box that cannot be learned from or tested against is an error that names its place."""

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from dataset import list_lines
from files import read_json
from runtime import UserError
from sources import IMAGE_SUFFIXES, existing_folders

LARGEST = 1e9  # a coordinate, size or area beyond it is no measure of an image
# The two boxes of no area in the published instances_train2017.json: their image ids and near corners.
COCO_EMPTY = {200365: [296.65, 388.33], 550395: [9.98, 188.56]}


@dataclass(frozen=True, eq=False)
class Record:
    """The ground truth of one image.

    path: of its file. width, height: in pixels, as the annotation says. boxes: (G, 4) float32, x1 y1 x2 y2 in pixels,
    continuous, inside the image. labels: (G,) int64, ids of classes. difficult: (G,) bool, VOC's difficult or COCO's
    crowd: not trained on, ignored when tested. image_id: int or str, as in the file. areas: (G,) float64, COCO's own
    `area` (of the mask), else that of the box."""

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
    commas. category_ids: of each class; COCO's own, VOC's counted from 1."""

    classes: list
    records: list
    source: Path
    category_ids: list


class Findings(NamedTuple):
    """What a reader that goes on after an error has found, in sentences. errors: what is wrong; the object or image was
    left out. clipped: boxes that reach outside their image."""

    errors: list
    clipped: list


def read_annotations(source, images=None, classes=None, findings=None):
    """Read the ground truth of `source`: a path, several joined by commas, or a list of paths.

    images: the folder of the images. None is, for COCO, the folder `images` beside the file, else the file's own; for
    VOC JPEGImages. classes: the names expected, in id order: of a checkpoint, or of the training set. None takes COCO's
    categories in the order of their ids (of the first COCO source), or all names in VOC's files in alphabetical order.
    A class is matched by name, never by place. findings: None, or Findings to add to, where reading goes on.

    COCO's (x, y, width, height) and VOC's 1-based corners, from which 1 is subtracted, become 0-based corners. A box
    that reaches outside its image is clipped to it.

    Raises UserError with file and object for a box without area, outside its image or not finite, an unknown category
    or image, something missing, an image given twice, an image that is not there, and for broken JSON or XML."""
    paths = [Path(part) for part in ([source] if isinstance(source, Path) else
                                     source.split(",") if isinstance(source, str) else source)]
    parts = [_read_coco(path, images, findings) if path.suffix.lower() == ".json" else
             _read_image_set(path, images, findings) for path in paths]
    coco = [part for part in parts if part.source.suffix.lower() == ".json"]
    if classes is None:
        classes = coco[0].classes if coco else sorted({name for part in parts for name in part.classes})
    if not classes:
        first = findings.errors[:1] if findings else []
        raise UserError(*first or [f"{paths[0]}: no object, and so no class; expected annotated images"])
    category_of = dict(zip(coco[0].classes, coco[0].category_ids, strict=True)) if coco else {}
    free = max(category_of.values(), default=0) + 1  # for classes that the file lacks: an id that is no other's
    categories = [category_of.get(name, free + number) for number, name in enumerate(classes)]
    return Annotations(list(classes), _join(parts, classes), Path(",".join(map(str, paths))), categories)


def _join(parts, classes):
    """The records of all `parts`, labelled by place in `classes`. Raises UserError for other classes and for an image
    that occurs twice."""
    number_of, source_of, records = {name: number for number, name in enumerate(classes)}, {}, []
    for part in parts:
        for label, name in enumerate(part.classes):
            if name not in number_of:
                place = next((f" (in {r.path.name})" for r in part.records if label in r.labels), "")
                raise UserError(f"{part.source}: unknown category {name!r}{place}; expected {', '.join(classes)}")
        number = np.array([number_of[name] for name in part.classes], dtype=np.int64)
        for record in part.records:
            if record.path in source_of:
                raise UserError(f"{part.source}: image {record.path} is also in {source_of[record.path]}; expected it "
                                "once")
            source_of[record.path] = part.source
            records.append(replace(record, labels=number[record.labels]))
    return records


def for_training(annotations, min_side=32):
    """What of `annotations` is trained on: images with both sides at least `min_side` pixels, those without objects
    among them; of their objects those that are not difficult and at least one pixel wide and high, the published COCO
    recipe. What is left out of an image is background there."""
    records = []
    for record in annotations.records:
        if min(record.width, record.height) < min_side:
            continue
        sides = record.boxes[:, 2:] - record.boxes[:, :2]  # (G, 2)
        kept = ~record.difficult & (sides >= 1).all(axis=1) & (record.areas > 0)
        records.append(replace(record, boxes=record.boxes[kept], labels=record.labels[kept],
                               difficult=record.difficult[kept], areas=record.areas[kept]))
    return replace(annotations, records=records)


def fingerprint(annotations):
    """16 hexadecimal digits that change with the classes, the images' names and sizes, and every object; not with the
    folder that they lie in."""
    digest = hashlib.sha256(json.dumps(annotations.classes).encode())
    for record in annotations.records:
        place = [record.image_id, record.path.name, record.width, record.height, len(record.labels)]
        digest.update(json.dumps(place).encode())
        for values in (record.boxes, record.labels, record.difficult, record.areas):
            digest.update(values.tobytes())
    return digest.hexdigest()[:16]


# ---- objects ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _noting(findings):
    """Where there are findings, a UserError inside becomes one of them."""
    try:
        yield
    except UserError as error:
        if findings is None:
            raise
        findings.errors.append(str(error))


def _record(path, size, objects, image_id):
    """objects: [(box, label, difficult, area or None)]."""
    boxes = np.array([box for box, *_ in objects], dtype=np.float32).reshape(-1, 4)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) if area is None else area for box, _, _, area in objects]
    return Record(path, *size, boxes, np.array([label for _, label, _, _ in objects], dtype=np.int64),
                  np.array([difficult for _, _, difficult, _ in objects], dtype=bool), image_id,
                  np.array(areas, dtype=np.float64))


def _clip(box, size, where, shown, findings):
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


def _is_number(value):
    return type(value) in (int, float) and -LARGEST < value < LARGEST  # false for NaN, too


def _is_name(value):
    return isinstance(value, str) and value.strip() != "" and value.isprintable()


# ---- COCO ------------------------------------------------------------------------------------------------------------


def _read_coco(path, images, findings):
    """One COCO file. Its classes are in ascending category id."""
    content = read_json(path)
    if not isinstance(content, dict) or not all(
            isinstance(content.get(key), list) and all(isinstance(entry, dict) for entry in content[key])
            for key in ("images", "annotations", "categories")):
        raise UserError(f"{path}: not a COCO annotation file; expected lists of images, annotations and categories")
    categories = _coco_categories(content["categories"], path)
    label_of = {category: label for label, category in enumerate(categories)}
    beside = path.parent / "images"
    folder = beside if images is None and beside.is_dir() else existing_folders([images or path.parent])[0]
    sizes, places, objects = {}, {}, {}
    for number, entry in enumerate(content["images"]):
        with _noting(findings):
            image_id, size = _coco_image(entry, f"{path}: image {entry.get('id', f'number {number}')}")
            if sizes.setdefault(image_id, size) is not size:
                raise UserError(f"{path}: two images have the id {image_id!r}; expected different ones")
            objects[image_id] = []
            places[image_id] = _existing_image(folder, entry.get("file_name"), f"{path}: image {image_id}")
    if not sizes and not (findings and findings.errors):
        raise UserError(f"{path}: no images; expected a list of them")
    for number, entry in enumerate(content["annotations"]):
        with _noting(findings):
            where = f"{path}: annotation {entry.get('id', f'number {number}')}"
            found = _coco_object(entry, sizes, label_of, where, findings)
            if found:
                objects[entry["image_id"]].append(found)
    records = [_record(place, sizes[image_id], objects[image_id], image_id) for image_id, place in places.items()]
    return Annotations(list(categories.values()), records, path, list(categories))


def _coco_categories(entries, path):
    """{category id: name}, ascending."""
    pairs = [(entry.get("id"), entry.get("name")) for entry in entries]
    if not pairs or not all(type(number) is int and _is_name(name) for number, name in pairs):
        raise UserError(f"{path}: expected every category to have an id (whole number) and a name")
    categories = dict(sorted(pairs))
    if len(categories) < len(pairs) or len(set(categories.values())) < len(pairs):
        raise UserError(f"{path}: two categories have the same id or the same name; expected different ones")
    return categories


def _coco_image(entry, where):
    """(id, (width, height)) of an entry of `images`."""
    if type(entry.get("id")) not in (int, str):
        raise UserError(f"{where}: id is missing; expected a whole number or a text")
    size = entry.get("width"), entry.get("height")
    if not all(type(side) is int and 0 < side < LARGEST for side in size):
        raise UserError(f"{where}: width {str(size[0])[:40]}, height {str(size[1])[:40]}; expected whole numbers above "
                        "0")
    return entry["id"], size


def _existing_image(folder, name, where):
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: no file_name; expected the name of the image's file in {folder}")
    if not os.path.isfile(folder / name):
        raise UserError(f"{where}: no such image: {folder / name}; give the folder of the images, if they are "
                        "elsewhere")
    return folder / name


def _coco_object(entry, sizes, label_of, where, findings):
    """(box, label, crowd, area) of an entry of `annotations`; None for the two that are known to be empty."""
    image_id, category, bbox = entry.get("image_id"), entry.get("category_id"), entry.get("bbox")
    if type(image_id) not in (int, str) or image_id not in sizes:
        raise UserError(f"{where}: image_id {str(image_id)[:40]} is unknown; expected the id of one of `images`")
    if type(category) is not int or category not in label_of:
        raise UserError(f"{where}: category_id {str(category)[:40]} is unknown; expected the id of one of `categories`")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
        raise UserError(f"{where}: bbox {str(bbox)[:80]}; expected [x, y, width, height], finite numbers")
    area = entry.get("area")
    if area is not None and not (_is_number(area) and area >= 0):
        raise UserError(f"{where}: area {str(area)[:40]}; expected a number of at least 0")
    x, y, width, height = bbox
    if height == 0 and COCO_EMPTY.get(image_id) == [x, y]:
        return None
    box = _clip((x, y, x + width, y + height), sizes[image_id], where, bbox, findings)
    return box, label_of[category], bool(entry.get("iscrowd")), area


# ---- Pascal VOC ------------------------------------------------------------------------------------------------------


def _read_image_set(path, images, findings):
    """One list of image ids. Its classes are in the order in which they occur."""
    lines = list_lines(path)
    above = path.absolute().parents
    root = next((folder for folder in above[:3] if (folder / "Annotations").is_dir()), None)
    if root is None:
        raise UserError(f"{path}: no folder Annotations above it; expected an image set of Pascal VOC, such as "
                        "VOC2007/ImageSets/Main/trainval.txt, or a COCO file (.json)")
    folder, = existing_folders([images or root / "JPEGImages"])
    label_of, seen, records = {}, set(), []
    for number, image_id in lines:
        with _noting(findings):
            if image_id in seen:
                raise UserError(f"{path}:{number}: image id {image_id} is listed twice; expected it once")
            seen.add(image_id)
            xml = root / "Annotations" / f"{image_id}.xml"
            if not os.path.isfile(xml):
                raise UserError(f"{path}:{number}: no such annotation: {xml}; expected one image id a line")
            records.append(_voc_record(xml, folder, image_id, label_of, findings))
    return Annotations(list(label_of), records, path, list(range(1, len(label_of) + 1)))


def _voc_record(xml, folder, image_id, label_of, findings):
    """One XML file as a Record. Names not yet in `label_of`, {name: label}, are added to it."""
    root = parse_xml(xml)
    size = tuple(_voc_number(root, f"size/{side}", xml) for side in ("width", "height"))
    if not all(side > 0 and side.is_integer() for side in size):
        raise UserError(f"{xml}: <size> is {size[0]:g} x {size[1]:g}; expected whole numbers above 0")
    named = [(root.findtext("filename") or "").strip(), *(image_id + suffix for suffix in IMAGE_SUFFIXES)]
    image = next((folder / name for name in named if os.path.isfile(folder / name)), None)
    if image is None:
        raise UserError(f"{xml}: no such image: {folder / image_id}.jpg; give the folder of the images, if they are "
                        "elsewhere")
    size, objects = (int(size[0]), int(size[1])), []
    for number, element in enumerate(root.iterfind("object"), 1):
        with _noting(findings):
            objects.append(_voc_object(element, size, f"{xml}: object {number}", label_of, findings))
    return _record(image, size, objects, image_id)


def _voc_object(element, size, where, label_of, findings):
    """(box, label, difficult, None) of an <object>."""
    name = (element.findtext("name") or "").strip()
    if not _is_name(name):
        raise UserError(f"{where}: <name> is missing; expected the name of its class")
    corners = [_voc_number(element, f"bndbox/{side}", where) for side in ("xmin", "ymin", "xmax", "ymax")]
    difficult = (element.findtext("difficult") or "0").strip()
    if difficult not in ("0", "1"):
        raise UserError(f"{where}: <difficult> is {difficult[:40]!r}; expected 0 or 1")
    box = _clip([corner - 1 for corner in corners], size, f"{where} ({name})", corners, findings)
    return box, label_of.setdefault(name, len(label_of)), difficult == "1", None


def _voc_number(element, place, where):
    """The number in the element at `place` (a/b), as float."""
    text = (element.findtext(place) or "").strip()
    try:
        value = float(text)
    except ValueError:
        value = None
    if not _is_number(value):
        raise UserError(f"{where}: <{place}> is {text[:40]!r}; expected a finite number")
    return value


class _NoDoctype(ElementTree.TreeBuilder):
    """Ends at a document type, before the entities that it may define are expanded a billionfold."""

    def doctype(self, *_):
        raise UserError("holds a document type (DOCTYPE); expected plain XML without one")


def parse_xml(path):
    """The root element of an XML file. Raises UserError naming the file, and the line where the parser gives one."""
    try:
        return ElementTree.fromstring(Path(path).read_bytes(), ElementTree.XMLParser(target=_NoDoctype()))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except ElementTree.ParseError as error:
        reason = str(error).partition(": line ")[0]
        raise UserError(f"{path}:{error.position[0]}: not valid XML ({reason})") from None
    # A ValueError or LookupError: an encoding that Python does not know.
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"{path}: could not be read ({getattr(error, 'strerror', None) or error})") from None
