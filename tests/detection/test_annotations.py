"""Ground truth: COCO files and Pascal VOC's image sets against what was written into them, and every way to get them
wrong as one line that says where and what was expected."""

import re
from pathlib import Path

import numpy as np
import pytest

from common.runtime import UserError
from detection.data.annotations import fingerprint, for_training, read_annotations
from detection.data.records import Findings
from detection.data.voc_files import parse_xml
from tests.support import draw_noise
from tests.support import write_coco as coco
from tests.support import write_voc as voc


def refused(source, *words, **options):
    """Read what must be refused; the message is one line that holds `words`."""
    with pytest.raises(UserError) as error:
        read_annotations(source, **options)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


# ---- COCO ------------------------------------------------------------------------------------------------------------


def test_coco_boxes_become_corners_and_classes_follow_the_category_ids(tmp_path):
    path = coco(tmp_path, [{"bbox": [1, 2, 10, 20], "area": 77.5}, {"bbox": [0.5, 0, 3, 4], "category_id": 9},
                           {"bbox": [5, 6, 7, 8], "iscrowd": 1}])
    found = read_annotations(path)
    assert (found.classes, found.source) == (["plane", "ship"], path)
    first, second = found.records
    assert (first.image_id, first.path, first.width, first.height) == (7, tmp_path / "images" / "a.png", 60, 40)
    assert first.boxes.tolist() == [[1, 2, 11, 22], [0.5, 0, 3.5, 4], [5, 6, 12, 14]]
    assert first.labels.tolist() == [0, 1, 0] and first.difficult.tolist() == [False, False, True]
    assert first.areas.tolist() == [77.5, 12, 56]
    assert (first.boxes.dtype, first.labels.dtype, first.difficult.dtype) == (np.float32, np.int64, bool)
    assert second.image_id == 3 and second.boxes.shape == (0, 4) and second.labels.shape == second.areas.shape == (0,)


def test_coco_images_lie_in_images_or_beside_the_file_or_in_a_folder_named(tmp_path):
    path = coco(tmp_path, [])
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    refused(path, "train.json: image 7: no such image:", "give the folder of the images")
    assert read_annotations(path, images=tmp_path / "elsewhere").records[0].path == tmp_path / "elsewhere" / "a.png"
    refused(path, "nowhere: no such folder", images=tmp_path / "nowhere")
    for file in (tmp_path / "elsewhere").iterdir():
        file.rename(tmp_path / file.name)
    assert read_annotations(str(path)).records[1].path == tmp_path / "b.png"


def test_coco_images_in_the_layout_of_coco_itself(tmp_path):
    path = coco(tmp_path, [])
    (tmp_path / "images").rename(tmp_path / "val2017")
    (tmp_path / "annotations").mkdir()
    path = path.rename(tmp_path / "annotations" / "instances_val2017.json")
    assert read_annotations(path).records[0].path == tmp_path / "val2017" / "a.png"
    elsewhere = path.rename(tmp_path / "val2017.json")  # not in a folder of annotations
    refused(elsewhere, f"no such image: {tmp_path / 'a.png'}")


def boxes_as(convention, count=20):
    """Annotations of boxes all over an image of 60 x 40, in a convention of [x, y, w, h] in pixels."""
    generator = np.random.default_rng(0)
    near, size = generator.uniform(0, 0.7, (count, 2)) * (60, 40), generator.uniform(0.1, 0.3, (count, 2)) * (60, 40)
    return [{"bbox": convention(*box).tolist()} for box in np.hstack([near, size])]


def xywh(x, y, w, h):
    return np.array([x, y, w, h])


def corners(x, y, w, h):
    return np.array([x, y, x + w, y + h])


def fractions(x, y, w, h):
    return np.array([x / 60, y / 40, w / 60, h / 40])


def test_boxes_in_another_convention_are_refused(tmp_path):
    assert len(read_annotations(coco(tmp_path, boxes_as(xywh))).records[0].boxes) == 20
    path = coco(tmp_path, boxes_as(corners))
    message = refused(path, "train.json: ", "of 20 boxes reach outside their image, the first: bbox [", "]; they are "
                      "probably corners [x1, y1, x2, y2]; expected [x, y, width, height] in pixels")
    findings = Findings([], [])
    read_annotations(path, findings=findings)
    assert findings.errors == [message]
    refused(coco(tmp_path, boxes_as(fractions)), "20 of 20 boxes lie within the first pixel", "probably divided by the "
            "size of the image")
    both = coco(tmp_path, boxes_as(lambda *box: corners(*box) / (60, 40, 60, 40)))
    refused(both, "probably divided by the size")


def test_odd_boxes_are_no_other_convention(tmp_path):
    whole = [{"bbox": [1, 1, 60, 40]}] * 5  # counted from 1
    beyond = [{"bbox": [50, 30, 12, 15]}] * 5  # objects cut by the border: no corners
    tiny = [{"bbox": [0, 0, 1, 1]}]
    assert len(read_annotations(coco(tmp_path, whole + beyond + tiny)).records[0].boxes) == 11


def test_a_box_partly_outside_is_clipped(tmp_path):
    path = coco(tmp_path, [{"bbox": [-5, -3, 10, 10]}, {"bbox": [50, 30, 10.4, 99]}, {"bbox": [1, 1, 2, 2]}])
    findings = Findings([], [])
    record = read_annotations(path, findings=findings).records[0]
    assert record.boxes.tolist() == [[0, 0, 5, 7], [50, 30, 60, 40], [1, 1, 3, 3]]
    assert record.areas.tolist() == [35, 100, 4]
    assert findings.errors == [] and len(findings.clipped) == 2
    assert "annotation 101: box [50, 30, 10.4, 99] reaches outside its image of 60 x 40" in findings.clipped[1]


def test_classes_are_matched_by_name_and_never_by_place(tmp_path):
    path = coco(tmp_path, [{"bbox": [1, 2, 3, 4]}, {"bbox": [1, 2, 3, 4], "category_id": 9}])
    found = read_annotations(path, classes=["ship", "tug", "plane"])
    assert found.records[0].labels.tolist() == [2, 0]
    assert found.classes == ["ship", "tug", "plane"]
    refused(path, "train.json: unknown category 'ship' (in a.png); expected plane, tug", classes=["plane", "tug"])
    refused(path, "unknown category 'plane'", classes=["Plane", "ship"])


NAN, HUGE = float("nan"), 10**400


@pytest.mark.parametrize("entry, words", [
    ({"bbox": [1, 2, 0, 5]}, "box [1, 2, 0, 5] has no area; expected a width"),
    ({"bbox": [1, 2, 5, -5]}, "has no area"),
    ({"bbox": [1000, 2, 1e-9, 5]}, "has no area"),
    ({"bbox": [60, 2, 5, 5]}, "lies outside its image; expected it within 60 x 40 pixels"),
    ({"bbox": [2, -9, 5, 5]}, "lies outside its image"),
    ({"bbox": [NAN, 2, 5, 5]}, "bbox [nan, 2, 5, 5]; expected [x, y, width, height], finite numbers"),
    ({"bbox": [1, 2, float("inf"), 5]}, "finite numbers"),
    ({"bbox": [1, 2, HUGE, 5]}, "finite numbers"),
    ({"bbox": [1, 2, 5]}, "bbox [1, 2, 5]; expected"),
    ({"bbox": [1, 2, "5", 5]}, "expected [x, y, width, height]"),
    ({"bbox": [1, 2, True, 5]}, "expected [x, y, width, height]"),
    ({}, "bbox None; expected"),
    ({"bbox": [1, 2, 3, 4], "category_id": 4}, "category_id 4 is unknown; expected the id of one of `categories`"),
    ({"bbox": [1, 2, 3, 4], "category_id": [2]}, "category_id [2] is unknown"),
    ({"bbox": [1, 2, 3, 4], "image_id": 8}, "image_id 8 is unknown; expected the id of one of `images`"),
    ({"bbox": [1, 2, 3, 4], "image_id": {}}, "image_id {} is unknown"),
    ({"bbox": [1, 2, 3, 4], "image_id": "7"}, "image_id 7 is unknown"),
    ({"bbox": [1, 2, 3, 4], "area": NAN}, "area nan; expected a number of at least 0"),
    ({"bbox": [1, 2, 3, 4], "area": -1}, "area -1; expected"),
    ({"bbox": [1, 2, 3, 4], "iscrowd": "0"}, "iscrowd '0'; expected 0 or 1"),
])
def test_a_bad_coco_annotation_is_named(tmp_path, entry, words):
    refused(coco(tmp_path, [{"bbox": [0, 0, 5, 5]}, entry]), f"{tmp_path / 'train.json'}: annotation 101", words)


@pytest.mark.parametrize("changes, words", [
    ({"images": {}}, "not a COCO annotation file; expected lists of images, annotations and categories"),
    ({"annotations": [3]}, "not a COCO annotation file"),
    ({"categories": []}, "expected every category to have an id (whole number) and a name"),
    ({"categories": [{"id": 1}]}, "expected every category to have an id"),
    ({"categories": [{"id": 1, "name": "\n"}]}, "expected every category to have an id"),
    ({"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}, "the same id or the same name"),
    ({"images": []}, "no images"),
    ({"images": [{"id": 7, "file_name": "a.png", "width": 60, "height": 40}] * 2}, "two images have the id 7"),
    ({"images": [{"file_name": "a.png", "width": 60, "height": 40}]}, "image number 0: id is missing"),
    ({"images": [{"id": 7, "file_name": "a.png", "width": 60}]}, "image 7: width 60, height None; expected whole"),
    ({"images": [{"id": 7, "file_name": "a.png", "width": 60, "height": 0}]}, "image 7: width 60, height 0; expected"),
    ({"images": [{"id": 7, "file_name": "a.png", "width": HUGE, "height": 9}]}, "expected whole numbers"),
    ({"images": [{"id": 7, "width": 60, "height": 40}]}, "image 7: no file_name; expected"),
    ({"images": [{"id": 7, "file_name": "c.png", "width": 60, "height": 40}]}, "no such image"),
    ({"images": [{"id": 7, "file_name": "\0\ud800" + "x" * 9999, "width": 60, "height": 40}]}, "no such image"),
    ({"images": [{"id": 7, "file_name": "../images", "width": 60, "height": 40}]}, "no such image"),
    ({"images": [{"id": k, "file_name": "a.png", "width": 60, "height": 40} for k in (7, 8)]}, "expected it once"),
])
def test_a_bad_coco_file_is_named(tmp_path, changes, words):
    refused(coco(tmp_path, [], changes=changes), "train.json: ", words)


def test_broken_and_absent_files_are_named(tmp_path):
    (tmp_path / "a.json").write_text('{"images": [],\n "annotations": [}')
    refused(tmp_path / "a.json", "a.json:2: not valid JSON")
    (tmp_path / "a.json").write_text("[" * 100_000)
    refused(tmp_path / "a.json", "a.json: could not be read")
    refused(tmp_path / "b.json", "b.json: could not be read (No such file")
    refused(tmp_path / "b.txt", "b.txt: no such list")
    (tmp_path / "c.txt").write_text("000001\n")
    refused(tmp_path / "c.txt", "c.txt: no folder Annotations above it; expected an image set of Pascal VOC")
    (tmp_path / "d.txt").write_text("\n")
    refused(tmp_path / "d.txt", "d.txt: the list is empty")


def test_the_two_empty_boxes_of_the_published_coco_file_are_left_out(tmp_path):
    images = [(200365, "a.png"), (550395, "b.png")]
    content = [{"image_id": 200365, "bbox": [296.65, 388.33, 1.03, 0.0]}, {"image_id": 200365, "bbox": [1, 2, 3, 4]},
               {"image_id": 550395, "bbox": [9.98, 188.56, 15.52, 0.0]}]
    found = read_annotations(coco(tmp_path, content, images))
    assert [record.boxes.tolist() for record in found.records] == [[[1, 2, 4, 6]], []]
    content[2]["bbox"][0] = 9.99
    refused(coco(tmp_path, content, images), "annotation 102: box [9.99, 188.56, 15.52, 0.0] has no area")


def test_findings_hold_every_error_and_reading_goes_on(tmp_path):
    path = coco(tmp_path, [{"bbox": [1, 2, 0, 5]}, {"bbox": [1, 2, 3, 4]}, {"bbox": [99, 2, 3, 4]},
                           {"bbox": [1, 2, 3, 4], "image_id": 3}])
    (tmp_path / "images" / "b.png").unlink()
    findings = Findings([], [])
    records = read_annotations(path, findings=findings).records
    assert [record.boxes.tolist() for record in records] == [[[1, 2, 4, 6]]]
    assert [re.search(r"(image|annotation) \d+: .*?(no \w+|outside)", error)[0] for error in findings.errors] == [
        "image 3: no such", "annotation 100: box [1, 2, 0, 5] has no area",
        "annotation 102: box [99, 2, 3, 4] lies outside"]


# ---- Pascal VOC ------------------------------------------------------------------------------------------------------


def test_voc_boxes_lose_one_and_difficult_is_kept(tmp_path):
    path = voc(tmp_path / "VOC2007", {"000005": [
        ("tvmonitor", 8, 12, 35, 40, "<difficult>1</difficult>"), ("bird", 1, 1, 60, 40, "<difficult>0</difficult>"),
        ("bird", 2.5, 3, 4.5, 6, "<part><name>head</name><bndbox><xmin>9</xmin></bndbox></part>")], "000007": []})
    found = read_annotations(path)
    assert found.classes == ["bird", "tvmonitor"]
    record, empty = found.records
    assert record.boxes.tolist() == [[7, 11, 34, 39], [0, 0, 59, 39], [1.5, 2, 3.5, 5]]
    assert record.labels.tolist() == [1, 0, 0] and record.difficult.tolist() == [True, False, False]
    assert record.areas.tolist() == [27 * 28, 59 * 39, 6]
    assert (record.image_id, record.width, record.height) == ("000005", 60, 40)
    assert record.path == tmp_path / "VOC2007" / "JPEGImages" / "000005.jpg"
    assert empty.image_id == "000007" and empty.boxes.shape == (0, 4)


def test_voc_takes_the_file_named_in_the_xml_else_the_id_with_any_suffix(tmp_path):
    path = voc(tmp_path, {"a": [("x", 1, 1, 9, 9, "")], "b": []})
    xml = tmp_path / "Annotations" / "a.xml"
    xml.write_text(xml.read_text().replace("a.jpg", "other.png"))
    assert read_annotations(path).records[0].path == tmp_path / "JPEGImages" / "a.jpg"
    (tmp_path / "JPEGImages" / "a.jpg").rename(tmp_path / "JPEGImages" / "a.png")
    assert read_annotations(path).records[0].path == tmp_path / "JPEGImages" / "a.png"
    draw_noise(tmp_path / "JPEGImages" / "other.png")
    assert read_annotations(path).records[0].path == tmp_path / "JPEGImages" / "other.png"
    (tmp_path / "JPEGImages").rename(tmp_path / "far")
    refused(path, "JPEGImages: no such folder")
    assert read_annotations(path, images=tmp_path / "far").records[1].path == tmp_path / "far" / "b.jpg"


def test_07_and_12_become_one_in_alphabetical_class_order(tmp_path):
    first = voc(tmp_path / "VOC2007", {"000001": [("sofa", 1, 1, 9, 9, "")], "000002": [("car", 1, 1, 9, 9, "")]})
    second = voc(tmp_path / "VOC2012", {"2008_000001": [("boat", 1, 1, 9, 9, ""), ("car", 1, 1, 9, 9, "")]})
    for source in (f"{first},{second}", [first, str(second)], (str(first), second)):
        found = read_annotations(source)
        assert found.classes == ["boat", "car", "sofa"] and found.source == Path(f"{first},{second}")
        assert [record.image_id for record in found.records] == ["000001", "000002", "2008_000001"]
        assert [record.labels.tolist() for record in found.records] == [[2], [1], [0, 1]]
    refused([first, first], "000001.jpg is also in", "expected it once")
    refused(second, "unknown category 'boat' (in 2008_000001.jpg); expected sofa, car", classes=["sofa", "car"])


def test_coco_sources_are_joined_by_the_names_of_their_categories(tmp_path):
    first = coco(tmp_path / "a", [{"bbox": [1, 2, 3, 4]}])
    second = coco(tmp_path / "b", [{"bbox": [1, 2, 3, 4], "category_id": 1}], categories=((1, "ship"),))
    assert [record.labels.tolist() for record in read_annotations([first, second]).records] == [[0], [], [1], []]
    refused([second, first], "a/train.json: unknown category 'plane' (in a.png); expected ship")


@pytest.mark.parametrize("old, new, words", [
    ("</object>", "", "5.xml:2: not valid XML (mismatched tag)"),
    ("<xmax>20</xmax>", "", "5.xml: object 1: <bndbox/xmax> is ''; expected a finite number"),
    ("<xmax>20</xmax>", "<xmax>nan</xmax>", "object 1: <bndbox/xmax> is 'nan'; expected a finite number"),
    ("<xmax>20</xmax>", "<xmax>1e999</xmax>", "expected a finite number"),
    ("<xmax>20</xmax>", "<xmax>5</xmax>", "object 1 (cat): box [5.0, 6.0, 5.0, 30.0] has no area; expected"),
    ("<xmin>5</xmin><ymin>6</ymin><xmax>20</xmax>", "<xmin>61</xmin><ymin>6</ymin><xmax>80</xmax>",
     "box [61.0, 6.0, 80.0, 30.0] lies outside its image; expected it within 60 x 40 pixels"),
    ("<name>cat</name>", "", "object 1: <name> is missing; expected the name of its class"),
    ("<name>cat</name>", "<name>a\nb</name>", "object 1: <name> is missing"),
    ("</bndbox>", "</bndbox><difficult>maybe</difficult>", "<difficult> is 'maybe'; expected 0 or 1"),
    ("<width>60</width>", "", "5.xml: <size/width> is ''; expected a finite number"),
    ("<width>60</width>", "<width>0</width>", "5.xml: <size> is 0 x 40; expected whole numbers above 0"),
    ("<width>60</width>", "<width>60.5</width>", "expected whole numbers above 0"),
    ("<annotation>", "<?xml version='1.0' encoding='no-such'?><annotation>", "5.xml"),
])
def test_a_bad_xml_file_is_named(tmp_path, old, new, words):
    path = voc(tmp_path, {"5": [("cat", 5, 6, 20, 30, "")]})
    xml = tmp_path / "Annotations" / "5.xml"
    assert old in xml.read_text()
    xml.write_text(xml.read_text().replace(old, new, 1))
    refused(path, str(tmp_path), words)


def test_a_bad_image_set_is_named(tmp_path):
    path = voc(tmp_path, {"5": [("cat", 5, 6, 20, 30, "")]})
    path.write_text("5\n5\n")
    refused(path, "trainval.txt:2: image id 5 is listed twice; expected it once")
    path.write_text("5\n\n5  1\n")
    refused(path, "trainval.txt:3: no such annotation: ", "5  1.xml; expected one image id a line")
    path.write_text("5\n")
    (tmp_path / "JPEGImages" / "5.jpg").unlink()
    for findings in (None, Findings([], [])):
        refused(path, "5.xml: no such image: ", "5.jpg; give the folder", findings=findings)
    refused(voc(tmp_path / "b", {"1": []}), "trainval.txt: no object, and so no class; expected annotated images")


BOMB = '<!DOCTYPE a [<!ENTITY x "ha">' + "".join(
    f'<!ENTITY {chr(98 + k)} "{"&x;" * 10 if not k else f"&{chr(97 + k)};" * 10}">' for k in range(12)) + "]><a>&m;</a>"


@pytest.mark.parametrize("text", [BOMB, '<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>', "<!DOCTYPE a><a/>",
                                  '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>'])
def test_a_document_type_is_refused(tmp_path, text):
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(UserError, match=r"a\.xml: holds a document type \(DOCTYPE\); expected plain XML without one"):
        parse_xml(tmp_path / "a.xml")


@pytest.mark.parametrize("content", [
    b"", b"\0" * 99, b"<a>" * 300_000, b"<a>\xff</a>", b"\xff\xfe<\0a\0>\0", b"<a>&x;</a>",
    "<?xml version='1.0' encoding='utf-7'?><a>ü</a>".encode(), bytes(range(256)) * 9])
def test_hostile_xml_is_one_line(tmp_path, content):
    (tmp_path / "a.xml").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.xml") as error:
        parse_xml(tmp_path / "a.xml")
    assert "\n" not in str(error.value)


def test_deeply_nested_xml_does_not_end_the_program(tmp_path):
    path = voc(tmp_path, {"5": [("cat", 5, 6, 20, 30, "")]})
    xml = tmp_path / "Annotations" / "5.xml"
    xml.write_text(xml.read_text().replace("<object>", "<b>" * 100_000 + "</b>" * 100_000 + "<object>"))
    assert len(read_annotations(path).records[0].labels) == 1


# ---- for training, fingerprint ---------------------------------------------------------------------------------------


def test_training_leaves_out_difficult_and_tiny_objects_and_tiny_images_but_not_images_without_objects(tmp_path):
    path = coco(tmp_path, [{"bbox": [1, 2, 3, 4]}, {"bbox": [1, 2, 3, 4], "iscrowd": 1}, {"bbox": [1, 2, 0.9, 4]},
                           {"bbox": [1, 2, 3, 0.9]}, {"bbox": [5, 5, 1, 1], "category_id": 9},
                           {"bbox": [1, 2, 3, 5], "area": 0}, {"bbox": [1, 2, 3, 4], "image_id": 3, "iscrowd": 1}])
    found = read_annotations(path)
    first, second = for_training(found).records
    assert first.boxes.tolist() == [[1, 2, 4, 6], [5, 5, 6, 6], [1, 2, 4, 7]] and first.labels.tolist() == [0, 1, 0]
    # An area of 0, which some tools write for none, is that of the box.
    assert not first.difficult.any() and first.areas.tolist() == [12, 1, 15] and first.image_id == 7
    assert second.image_id == 3 and second.boxes.shape == (0, 4) and second.labels.shape == (0,)
    assert len(for_training(found, min_side=40).records) == 2 and for_training(found, min_side=41).records == []
    assert len(found.records[0].labels) == 6 and for_training(found).classes == found.classes


def test_the_fingerprint_changes_with_every_part_of_the_ground_truth(tmp_path):
    entry = {"bbox": [1, 2, 3, 4]}
    same = fingerprint(read_annotations(coco(tmp_path / "a", [entry])))
    assert re.fullmatch("[0-9a-f]{16}", same) and same == fingerprint(read_annotations(coco(tmp_path / "b", [entry])))
    changed = [
        coco(tmp_path / "0", []), coco(tmp_path / "1", [{**entry, "category_id": 9}]),
        coco(tmp_path / "2", [{**entry, "bbox": [1, 2, 3, 4.25]}]), coco(tmp_path / "3", [{**entry, "image_id": 3}]),
        coco(tmp_path / "4", [{**entry, "iscrowd": 1}]), coco(tmp_path / "5", [{**entry, "area": 11}]),
        coco(tmp_path / "6", [entry], categories=((9, "ship"), (2, "jet"))),
        coco(tmp_path / "7", [entry], images=((7, "a.png"), (3, "c.png"))),
        coco(tmp_path / "8", [entry], images=((3, "b.png"), (7, "a.png")))]
    assert len({same, *(fingerprint(read_annotations(path)) for path in changed)}) == 10
