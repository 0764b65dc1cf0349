"""Reading Pascal VOC's image sets and XML files."""

import os
from pathlib import Path
from xml.etree import ElementTree

from common.coco import is_name, is_number
from common.files import list_lines
from common.images import existing_folders, image_suffixes
from common.runtime import UserError
from detection.data.records import Annotations, Findings, Record, clip, noting, record_of


def read_image_set(path: Path, images: str | Path | None, findings: Findings | None) -> Annotations:
    """The Annotations of one list of image ids; its classes are in the order in which they occur. Else as
    annotations.read_annotations."""
    lines = list_lines(path)
    above = path.absolute().parents
    root = next((folder for folder in above[:3] if (folder / "Annotations").is_dir()), None)
    if root is None:
        raise UserError(f"{path}: no folder Annotations above it; expected an image set of Pascal VOC, such as "
                        "VOC2007/ImageSets/Main/trainval.txt, or a COCO file (.json)")
    folder, = existing_folders([images or root / "JPEGImages"])
    label_of, seen, records = {}, set(), []
    for number, image_id in lines:
        with noting(findings):
            if image_id in seen:
                raise UserError(f"{path}:{number}: image id {image_id} is listed twice; expected it once")
            seen.add(image_id)
            xml = root / "Annotations" / f"{image_id}.xml"
            if not os.path.isfile(xml):
                raise UserError(f"{path}:{number}: no such annotation: {xml}; expected one image id a line")
            records.append(_voc_record(xml, folder, image_id, label_of, findings))
    return Annotations(list(label_of), records, path)


def _voc_record(xml: Path, folder: Path, image_id: str, label_of: dict[str, int], findings: Findings | None) -> Record:
    """One XML file as a Record. Names not yet in `label_of`, {name: label}, are added to it."""
    root = parse_xml(xml)
    size = tuple(_voc_number(root, f"size/{side}", xml) for side in ("width", "height"))
    if not all(side > 0 and side.is_integer() for side in size):
        raise UserError(f"{xml}: <size> is {size[0]:g} x {size[1]:g}; expected whole numbers above 0")
    named = [(root.findtext("filename") or "").strip(), *(image_id + suffix for suffix in image_suffixes())]
    image = next((folder / name for name in named if os.path.isfile(folder / name)), None)
    if image is None:
        raise UserError(f"{xml}: no such image: {folder / image_id}.jpg; give the folder of the images, if they are "
                        "elsewhere")
    size, objects = (int(size[0]), int(size[1])), []
    for number, element in enumerate(root.iterfind("object"), 1):
        with noting(findings):
            objects.append(_voc_object(element, size, f"{xml}: object {number}", label_of, findings))
    return record_of(image, size, objects, image_id)


def _voc_object(element: ElementTree.Element, size: tuple[int, int], where: str, label_of: dict[str, int],
                findings: Findings | None) -> tuple[list[float], int, bool, None]:
    """(box, label, difficult, None) of an <object>."""
    name = (element.findtext("name") or "").strip()
    if not is_name(name):
        raise UserError(f"{where}: <name> is missing; expected the name of its class")
    corners = [_voc_number(element, f"bndbox/{side}", where) for side in ("xmin", "ymin", "xmax", "ymax")]
    difficult = (element.findtext("difficult") or "0").strip()
    if difficult not in ("0", "1"):
        raise UserError(f"{where}: <difficult> is {difficult[:40]!r}; expected 0 or 1")
    box = clip([corner - 1 for corner in corners], size, f"{where} ({name})", corners, findings)
    return box, label_of.setdefault(name, len(label_of)), difficult == "1", None


def _voc_number(element: ElementTree.Element, place: str, where: str | Path) -> float:
    """The number in the element at `place` (a/b), as float."""
    text = (element.findtext(place) or "").strip()
    try:
        value = float(text)
    except ValueError:
        value = None
    if not is_number(value):
        raise UserError(f"{where}: <{place}> is {text[:40]!r}; expected a finite number")
    return value


class _NoDoctype(ElementTree.TreeBuilder):
    """Ends at a document type, before the entities that it may define are expanded a billionfold."""

    def doctype(self, *_: object) -> None:
        raise UserError("holds a document type (DOCTYPE); expected plain XML without one")


def parse_xml(path: str | Path) -> ElementTree.Element:
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
