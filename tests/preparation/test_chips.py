"""Objects annotated in large images, in DOTA's folders and COCO's files, and the part of the image that becomes an
object's chip."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import prepare_dataset
from common.runtime import UserError
from dataset import read_info, read_split
from preparation.chips import MIN_EDGE, chip_box, square_box
from recognition.published import DOTA
from tests.support import counts_of, draw_noise, error_line, prepare, real, run_tool, write_dota

pytestmark = pytest.mark.usefixtures("without_pictures")


@given(st.tuples(*[st.floats(-30, 90)] * 4), st.tuples(*[st.integers(1, 60)] * 2), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_boxes_stay_inside_and_hold_their_object(values, size, margin):
    box = (*np.minimum(values[:2], values[2:]).tolist(), *np.maximum(values[:2], values[2:]).tolist())
    for cut in (chip_box, square_box):
        result = cut(box, size, margin)
        outside = any(box[axis] >= size[axis] or (box[axis + 2] <= 0 and box[axis] < 0) for axis in (0, 1))
        assert (result is None) == outside
        if result is None:
            continue
        for axis in (0, 1):
            near, far = result[axis], result[axis + 2]
            assert 0 <= near < far <= size[axis] and far - near >= min(MIN_EDGE, size[axis])
            if cut is chip_box:
                assert near <= max(box[axis], 0) and far >= min(box[axis + 2], size[axis])


def test_square_boxes():
    assert square_box((40, 40, 60, 50), (100, 100), 0.1) == (39, 34, 61, 56)  # side 22, around (50, 45)
    assert square_box((0, 40, 20, 50), (100, 100), 0.1) == (0, 34, 22, 56)  # shifted into the image
    assert square_box((90, 90, 110, 100), (100, 100), 0.1) == (78, 78, 100, 100)
    assert square_box((0, 0, 200, 10), (100, 50), 0.1) == (0, 0, 100, 50)  # larger than the image: clipped


# ---- DOTA ------------------------------------------------------------------------------------------------------------


def draw_dota(folder, lines):
    """A folder of DOTA with one image of 60 x 40. Returns the image's grey pixels."""
    write_dota(folder, {"P0001": ((60, 40), lines)})
    return grey_of(folder / "images" / "P0001.png")


def grey_of(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


def corners(left, top, right, bottom, name="ship", difficult=" 0"):
    return f"{left} {top} {right} {top} {right} {bottom} {left} {bottom} {name}{difficult}"


def test_dota_cuts_the_horizontal_box_with_its_margin(tmp_path):
    objects = [
        "20 10 30 15 25 25 20 20 ship 0",  # box 20..30 x 10..25: margin .5 on each side in x, .75 in y
        corners(50.0, 30.0, 75.0, 55.0, "plane", " 1"),  # sticks out to the right and below, and is difficult
        corners(5, 5, 6, 6, "harbor", ""),  # one pixel, without the word difficult
        corners(60, 0, 70, 10, "bridge"),  # wholly outside
        corners(0, 20, 0, 20, "roundabout"),  # no area, on the border
    ]
    grey = draw_dota(tmp_path / "train", objects)
    draw_dota(tmp_path / "val", [corners(0, 0, 10, 10)])
    prepare("dota", tmp_path / "train", tmp_path / "val", tmp_path / "d")
    chips = {}
    for path in (tmp_path / "d" / "images" / "train").rglob("*.png"):
        with Image.open(path) as image:
            assert image.mode == "L"
            chips[str(path.relative_to(tmp_path / "d" / "images" / "train"))] = np.asarray(image)
    np.testing.assert_array_equal(chips.pop("ship/P0001_0.png"), grey[9:26, 19:31])
    np.testing.assert_array_equal(chips.pop("plane/P0001_1.png"), grey[28:40, 48:60])
    np.testing.assert_array_equal(chips.pop("harbor/P0001_2.png"), grey[3:7, 3:7])  # widened
    assert chips.pop("roundabout/P0001_4.png").shape == (MIN_EDGE, MIN_EDGE)
    assert not chips
    info = read_info(tmp_path / "d")
    assert info.classes == sorted(DOTA["classes"]) and info.groups == DOTA["groups"] and info.name == "DOTA"
    assert counts_of(tmp_path / "d", "train")[info.classes.index("ship")] == 1
    assert counts_of(tmp_path / "d", "test")[info.classes.index("ship")] == 1


def test_dota_says_what_it_skipped_and_where_counts_deviate(tmp_path, capsys):
    draw_dota(tmp_path / "train", [corners(0, 0, 9, 9), corners(90, 0, 99, 9)])
    draw_dota(tmp_path / "val", [corners(0, 0, 10, 10)])
    prepare("dota", tmp_path / "train", tmp_path / "val", tmp_path / "d")
    printed = capsys.readouterr().out
    assert "lie wholly outside their image: 1, the first at" in printed and "P0001.txt:4" in printed
    assert "note: train: ship: found 1 images, published 28068" in printed
    assert "note: class 9 (ship) has one training image" in printed


@pytest.mark.parametrize("line, words", [
    (corners(0, 0, 9, 9, "container-crane"), r"P0001.txt:4: class 'container-crane' is none of the 15.*v1\.0"),
    ("1 2 3 4 5 6 7 ship 0", "P0001.txt:4: expected 'x1 y1"),
    ("1 2 3 4 5 6 7 nan ship 0", "P0001.txt:4: expected 'x1 y1"),
    ("one 2 3 4 5 6 7 8 ship 0", "P0001.txt:4: expected 'x1 y1"),
])
def test_dota_refuses_a_bad_line(tmp_path, line, words):
    draw_dota(tmp_path / "train", [corners(0, 0, 9, 9), line])
    with pytest.raises(UserError, match=words):
        prepare("dota", tmp_path / "train", tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_dota_needs_a_label_file_an_image_and_each_image_readable(tmp_path, capsys):
    draw_dota(tmp_path / "train", [corners(0, 0, 9, 9)] * 4)
    image, label = tmp_path / "train" / "images" / "P0001.png", tmp_path / "train" / "labelTxt" / "P0001.txt"
    draw_noise(image.with_name("P0002.png"))
    with pytest.raises(UserError, match="P0002.png: no label file P0002.txt"):
        prepare("dota", tmp_path / "train", tmp_path / "d")
    image.with_name("P0002.png").rename(image.with_name(".P0002.png"))
    label.with_name("P0003.txt").write_text("")
    with pytest.raises(UserError, match="P0003.txt: no image P0003.png"):
        prepare("dota", tmp_path / "train", tmp_path / "d")
    label.with_name("P0003.txt").unlink()
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])  # the header is whole: the damage shows only when chips are cut
    assert run_tool(prepare_dataset, "dota", tmp_path / "train", tmp_path / "d") == 2
    assert "P0001.png: not readable" in error_line(capsys)
    assert not (tmp_path / "d").exists()


def test_dota_accepts_the_official_nesting(tmp_path):
    draw_dota(tmp_path / "flat", [corners(0, 0, 9, 9)] * 10)
    for name, target in (("images", "part1/images"), ("labelTxt", "labelTxt-v1.0/labelTxt")):
        (tmp_path / "deep" / target).parent.mkdir(parents=True)
        (tmp_path / "flat" / name).rename(tmp_path / "deep" / target)
    prepare("dota", tmp_path / "deep", tmp_path / "d")
    assert [sum(counts_of(tmp_path / "d", split)) for split in ("train", "val", "test")] == [7, 1, 2]


def test_chips_are_cut_with_the_range_of_all_scenes(tmp_path):
    for split, number in (("train", 1), ("val", 2)):
        values = np.random.default_rng(number).integers(0, 2048, (40, 60), dtype=np.uint16)
        values[0, :2] = 0, 2047
        write_dota(tmp_path / split, {"P0001": (values, [corners(0, 0, 10, 10)])})
    prepare("dota", tmp_path / "train", tmp_path / "val", tmp_path / "d")
    with Image.open(tmp_path / "d" / "images" / "test" / "ship" / "P0001_0.png") as chip:
        assert (np.asarray(chip) == np.rint(values[:11, :11] / 2047 * 255)).all()
    assert read_info(tmp_path / "d").value_range == (0, 2047)


# ---- COCO ------------------------------------------------------------------------------------------------------------


def coco(boxes, categories=((7, "tug/boat"), (3, "plane")), **changes):
    """A COCO file's content with one 60 x 40 image; boxes: [(category id, bbox)]."""
    content = {
        "images": [{"id": 5, "file_name": "one.jpg", "width": 60, "height": 40}],
        "categories": [{"id": number, "name": name} for number, name in categories],
        "annotations": [{"id": 100 + i, "image_id": 5, "category_id": category, "bbox": bbox, "iscrowd": 0}
                        for i, (category, bbox) in enumerate(boxes)],
    }
    return {**content, **changes}


def write_coco(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_coco_crops_squares_in_category_order(tmp_path, capsys):
    boxes = [(7, [20, 10, 10, 5]), (3, [0, 0, 20, 20]), (3, [30, 30, 10, 10]), (3, [100, 0, 5, 5])]
    content = coco(boxes)
    content["annotations"].append({"image_id": 5, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1})
    train = write_coco(tmp_path / "c" / "annotations" / "instances_train.json", content)
    test = write_coco(tmp_path / "c" / "annotations" / "instances_val.json", coco(boxes[:3]))
    draw_noise(tmp_path / "c" / "train" / "one.jpg", seed=1)
    draw_noise(tmp_path / "c" / "val" / "one.jpg", seed=2)
    prepare("coco", train, test, tmp_path / "d", "--val-fraction", 0)
    info = read_info(tmp_path / "d")
    assert info.classes == ["plane", "tug/boat"]
    assert counts_of(tmp_path / "d", "train") == [2, 1] == counts_of(tmp_path / "d", "test")
    printed = capsys.readouterr().out
    assert "crowd annotations skipped: 1" in printed and "lie wholly outside their image: 1, the" in printed
    for split in ("train", "val"):
        grey = grey_of(tmp_path / "c" / split / "one.jpg")
        with Image.open(tmp_path / "d/images" / split.replace("val", "test") / "tug_boat" / "one_0.png") as chip:
            np.testing.assert_array_equal(np.asarray(chip), grey[7:18, 20:31])  # side 11 around (25, 12.5)


@pytest.mark.parametrize("content, words", [
    ([], "not a COCO annotation file"),
    (coco([], annotations=[3]), "not a COCO annotation file"),
    (coco([(4, [0, 0, 5, 5])]), "annotation 100: image_id 5 or category_id 4"),
    (coco([(3, [0, 0, -5, 5])]), r"annotation 100: bbox \[0, 0, -5, 5\] has a negative"),
    (coco([(3, [0, 0, 5])]), "annotation 100: bbox"),
    ({**coco([]), "annotations": [{"id": 7, "iscrowd": "1"}]}, "annotation 7: iscrowd '1'; expected 0 or 1"),
    (coco([(3, [0, 0, 5, 5])], [(3, "a"), (4, "a")]), "the same id or the same name"),
    (coco([(3, [0, 0, 5, 5])], [(3, "a\tb")]), r"category \(3, 'a.tb'\); expected .* a name of printable characters"),
    (coco([(3, [0, 0, 5, 5])], images=[{"id": 5, "file_name": "two.jpg"}]), "image two.jpg is not beside"),
    (coco([(3, [0, 0, 5, 5])], images=[{"id": 5, "file_name": "one.jpg", "width": 6, "height": 4}]), "says 6 x 4"),
    (coco([(3, [0, 0, 5, 5])], images=[{"id": 5}]), "image 5 has no file_name"),
    (coco([], images=[{"id": 5}, {"id": 5}]), "two images have the same id"),
    (coco([(3, [30 + i, 20, 40 + i, 30]) for i in range(5)]), "5 of 5 boxes reach outside their.* probably corners"),
    (coco([(3, [0.1, 0.2, 0.5, 0.5])] * 5), "5 of 5 boxes lie within the first pixel.* divided by the size"),
])
def test_coco_files_that_are_wrong_are_refused(tmp_path, content, words):
    draw_noise(tmp_path / "c" / "one.jpg")
    with pytest.raises(UserError, match=words):
        prepare("coco", write_coco(tmp_path / "c" / "a.json", content), tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_coco_takes_images_from_a_named_folder_and_refuses_other_categories(tmp_path):
    boxes = [(3, [i, 0, 9, 9]) for i in range(9)] + [(7, [i, 20, 9, 9]) for i in range(5)]
    train = write_coco(tmp_path / "c" / "train.json", coco(boxes))
    draw_noise(tmp_path / "far" / "away" / "one.jpg")
    prepare("coco", train, tmp_path / "d", "--images", tmp_path / "far" / "away")
    assert counts_of(tmp_path / "d", "test") == [2, 1]
    assert all(sample.path.startswith("test/") for sample in read_split(read_info(tmp_path / "d"), "test"))
    other = write_coco(tmp_path / "c" / "test.json", coco(boxes, [(3, "plane"), (7, "tug")]))
    with pytest.raises(UserError, match="categories differ"):
        prepare("coco", train, other, tmp_path / "d2", "--images", tmp_path / "far" / "away")


# ---- real aerial images ----------------------------------------------------------------------------------------------


@pytest.mark.real_data
def test_dota_examples_give_694_chips(tmp_path, capsys):
    prepare("dota", real("dota_examples"), tmp_path / "d")
    counts = dict(zip(DOTA["classes"], counts_of(tmp_path / "d", "train", "val", "test"), strict=True))
    assert {name: count for name, count in counts.items() if count} == {
        "ship": 531, "large-vehicle": 53, "plane": 49, "small-vehicle": 23, "swimming-pool": 10, "tennis-court": 10,
        "helicopter": 9, "harbor": 5, "baseball-diamond": 2, "roundabout": 1, "ground-track-field": 1}
    assert len(list((tmp_path / "d" / "images").rglob("*.png"))) == 694
    assert prepare("check", tmp_path / "d") == 1
    errors = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error: ")]
    absent = [name for name, count in counts.items() if not count]
    assert errors == [f"error: class {DOTA['classes'].index(name)} ({name}) has no training images" for name in absent]


@pytest.mark.real_data
def test_nwpu_follows_the_profile(tmp_path):
    folder = real("nwpu_vhr10")
    prepare("coco", folder / "instances_train2017.json", folder / "instances_val2017.json", tmp_path / "d",
            "--imbalance", 40, "--max-per-class", 400)
    counts = counts_of(tmp_path / "d", "train", "val")
    assert sorted(counts, reverse=True) == [round(400 * 40 ** (-i / 9)) for i in range(10)]
    available = [562, 230, 470, 325, 404, 137, 134, 205, 96, 426]
    assert np.argsort(counts).tolist() == np.argsort(available).tolist()
    assert counts_of(tmp_path / "d", "test") == [195, 68, 192, 66, 120, 22, 29, 34, 28, 178]
    info = read_info(tmp_path / "d")
    assert [len(info.groups[group]) for group in ("head", "middle", "tail")] == [3, 4, 3]
    assert prepare("check", tmp_path / "d") == 0
