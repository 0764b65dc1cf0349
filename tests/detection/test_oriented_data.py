"""Oriented ground truth out of DOTA's and COCO's files, what check_data finds in it, and the transforms of images with
oriented boxes."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import shapely
import torch
from PIL import Image

from common.dota import read_label_file
from common.runtime import UserError
from detection import check_data, pictures
from detection.data.annotations import fingerprint, for_training, read_annotations
from detection.data.batches import DetectionDataset, Draw, read_image
from detection.data.coco_files import convex_hull
from detection.data.dota_files import sides_cross
from detection.data.records import Findings
from detection.data.transforms import MEAN, flip, resize, rotate
from detection.geometry.oriented import corners, regularise, rotated_iou
from tests.support import real, write_dota

QUARTER = math.pi / 2
UPRIGHT = "10 20 40 20 40 30 10 30"
TURNED = "30 10 50 30 40 40 20 20"  # 20 root 2 by 10 root 2 at 45 degrees


def coco(root, *entries):
    """A COCO file with one image of 60 x 50."""
    root.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 50)).save(root / "a.png")
    annotations = [{"id": k, "image_id": 1, "category_id": 1, "bbox": [10, 10, 30, 20], **entry}
                   for k, entry in enumerate(entries)]
    (root / "a.json").write_text(json.dumps({
        "images": [{"id": 1, "file_name": "a.png", "width": 60, "height": 50}],
        "categories": [{"id": 1, "name": "ship"}], "annotations": annotations}))
    return root / "a.json"


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [True, False])
def test_a_folder_of_dota_gives_rectangles(tmp_path, header):
    write_dota(tmp_path, {"P2": ((60, 50), [f"{UPRIGHT} ship 1", f"{TURNED} plane"]), "P1": ((40, 33), [])}, header)
    empty, record = read_annotations(tmp_path, oriented=True).records
    assert read_annotations(tmp_path).classes == ["plane", "ship"]
    assert (record.path.name, record.width, record.height, record.image_id) == ("P2.png", 60, 50, "P2")
    assert record.labels.tolist() == [1, 0] and record.difficult.tolist() == [True, False]
    np.testing.assert_allclose(record.areas, [300, 400])
    np.testing.assert_allclose(record.boxes[0], [25, 25, 10, 30, QUARTER], rtol=1e-6)
    np.testing.assert_allclose(record.boxes[1], [35, 25, 20 * 2**0.5, 10 * 2**0.5, QUARTER / 2], rtol=1e-6)
    assert record.boxes.dtype == np.float32 and empty.boxes.shape == (0, 5)


def test_the_same_folder_gives_horizontal_boxes(tmp_path):
    write_dota(tmp_path, {"P": ((60, 50), [f"{UPRIGHT} ship 0", f"{TURNED} plane 0", "-9 5 20 5 20 9 -9 9 ship 0"])})
    (record,) = read_annotations(tmp_path).records
    assert record.boxes.tolist() == [[10, 20, 40, 30], [20, 10, 50, 40], [0, 5, 20, 9]]


def test_parts_of_dota_are_joined_by_the_names_of_their_classes(tmp_path):
    write_dota(tmp_path / "train", {"P1": ((60, 50), [f"{UPRIGHT} ship 0"])})
    write_dota(tmp_path / "val", {"P2": ((60, 50), [f"{UPRIGHT} plane 0"])})
    joined = read_annotations(f"{tmp_path / 'train'},{tmp_path / 'val'}", oriented=True)
    assert joined.classes == ["plane", "ship"] and [record.labels.tolist() for record in joined.records] == [[1], [0]]
    with pytest.raises(UserError, match="unknown category 'plane'"):
        read_annotations(tmp_path / "val", classes=["ship"])
    assert fingerprint(read_annotations(tmp_path / "val")) != fingerprint(read_annotations(tmp_path / "val",
                                                                                            oriented=True))


@pytest.mark.parametrize("line, words", [
    ("1 1 5 1 9 1 20 1 ship 0", "have no area"),
    ("70 1 90 1 90 9 70 9 ship 0", "lies outside its image"),
    ("1 2 3 4 5 6 7 ship 0", "expected 'x1 y1 x2 y2 x3 y3 x4 y4 class difficult'"),
    ("1 2 3 4 5 6 7 nan ship 0", "expected 'x1 y1"),
    ("1 2 3 4 5 6 7 1e300 ship 0", "expected 'x1 y1"),
    (f"{UPRIGHT} sh\x07ip 0", "expected 'x1 y1"),
    (f"{UPRIGHT} ship no", "expected 'x1 y1"),
    (f"{UPRIGHT} ship 0 0", "expected 'x1 y1"),
])
def test_a_bad_line_is_named(tmp_path, line, words):
    write_dota(tmp_path, {"P": ((60, 50), [f"{UPRIGHT} ship 0", line])})
    with pytest.raises(UserError, match=words) as error:
        read_annotations(tmp_path, oriented=True)
    assert "labelTxt/P.txt:4: " in str(error.value) and "\n" not in str(error.value)


def test_folders_and_sources_of_another_kind_are_refused(tmp_path):
    write_dota(tmp_path / "dota", {"P": ((60, 50), [f"{UPRIGHT} ship 0"])})
    with pytest.raises(UserError, match="give no folder"):
        read_annotations(tmp_path / "dota", tmp_path)
    (tmp_path / "dota" / "labelTxt" / "P.txt").rename(tmp_path / "dota" / "labelTxt" / "Q.txt")
    with pytest.raises(UserError, match="no label file P.txt"):
        read_annotations(tmp_path / "dota")
    (tmp_path / "set.txt").write_text("P\n")
    with pytest.raises(UserError, match="boxes of Pascal VOC are horizontal"):
        read_annotations(tmp_path / "set.txt", oriented=True)


def test_label_files_of_garbage_are_one_line(tmp_path):
    generator = random.Random(0)
    good = f"{TURNED} ship 0"
    (tmp_path / "P.txt").write_text(good)
    assert len(read_label_file(tmp_path / "P.txt")) == 1
    outcomes = set()
    for _ in range(300):
        content = bytearray(good.encode() + b"\n" + good.encode())
        for _ in range(generator.randint(1, 4)):
            content[generator.randrange(len(content))] = generator.choice(b"0123456789 .-\n\t\0\xffe:x")
        (tmp_path / "P.txt").write_bytes(content)
        try:
            outcomes.add(len(read_label_file(tmp_path / "P.txt")))
        except UserError as error:
            assert str(tmp_path / "P.txt") in str(error) and "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes >= {2, "refused"}


def test_polygons_of_coco_give_rectangles(tmp_path):
    turned = [float(value) for value in TURNED.split()]
    path = coco(tmp_path, {"segmentation": [turned[:2] + turned[:2] + turned[2:]], "area": 390},
                {"segmentation": [[10, 20, 20, 20, 20, 30], [30, 20, 40, 30, 30, 30]]},
                {"segmentation": {"size": [50, 60], "counts": [0]}, "iscrowd": 1})
    (record,) = read_annotations(path, oriented=True).records
    np.testing.assert_allclose(record.boxes[0], [35, 25, 20 * 2**0.5, 10 * 2**0.5, QUARTER / 2], rtol=1e-6)
    np.testing.assert_allclose(record.boxes[1], [25, 25, 10, 30, QUARTER], rtol=1e-6)
    np.testing.assert_allclose(record.boxes[2], [25, 20, 20, 30, QUARTER], rtol=1e-6)
    np.testing.assert_allclose(record.areas, [390, 300, 600], rtol=1e-6)
    assert record.difficult.tolist() == [False, False, True]


@pytest.mark.parametrize("segmentation, words", [
    (None, "expected polygons"), ([], "expected polygons"), ([[1, 2, 3, 4]], "expected polygons"),
    ([[1, 2, 3, 4, 5, "6"]], "expected polygons"), ([[1, 2, 3, 4, 5, 6, 7]], "expected polygons"),
    ({"counts": []}, "expected polygons"), ([[1, 1, 5, 5, 9, 9]], "has no area")])
def test_a_coco_object_without_a_polygon_is_named(tmp_path, segmentation, words):
    path = coco(tmp_path, {"segmentation": [[10, 20, 20, 20, 20, 30]]}, {"segmentation": segmentation})
    assert len(read_annotations(path).records[0].boxes) == 2  # as horizontal boxes they are fine
    with pytest.raises(UserError, match=f"annotation 1: segmentation .*{words}"):
        read_annotations(path, oriented=True)


def test_hulls_are_those_of_shapely():
    generator = np.random.default_rng(0)
    for count in (1, 2, 3, 4, 40, 200):
        points = [tuple(point) for point in generator.integers(0, 30, (count, 2)).tolist()]
        hull = convex_hull(points + points)
        expected = shapely.convex_hull(shapely.multipoints(points))
        if len(hull) < 3:
            assert expected.area == 0
        else:
            assert shapely.polygons(hull).equals(expected) and len(hull) == len(expected.exterior.coords) - 1
    assert convex_hull([(0, 0), (1, 1), (2, 2)]) == [(0, 0), (2, 2)]


def test_training_leaves_out_oriented_boxes_below_two_pixels(tmp_path):
    write_dota(tmp_path, {"P": ((60, 50), ["10 20 40 20 40 21.9 10 21.9 ship 0", f"{UPRIGHT} ship 0",
                                           "10 20 40 20 40 22 10 22 ship 0", f"{TURNED} ship 1"])})
    (record,) = for_training(read_annotations(tmp_path, oriented=True)).records
    assert record.boxes[:, 2].tolist() == [10, 2]


# ---- check_data ------------------------------------------------------------------------------------------------------


def test_sides_that_cross_are_found():
    points = [(0, 0), (10, 2), (9, 8), (1, 6)]
    assert not sides_cross(points) and not sides_cross(points[::-1])
    assert sides_cross([points[k] for k in (0, 2, 1, 3)]) and sides_cross([points[k] for k in (0, 1, 3, 2)])
    assert not sides_cross([(0, 0), (10, 0), (2, 2), (0, 10)])  # not convex
    assert not sides_cross([(0, 0), (4, 0), (4, 0), (0, 0)])


def test_check_data_names_every_bad_object_of_dota(tmp_path, capsys):
    write_dota(tmp_path, {"P": ((60, 50), [f"{UPRIGHT} ship 0", "10 20 40 30 40 20 10 30 ship 0",
                                           "1 1 5 1 9 1 20 1 ship 0", "70 1 90 1 90 9 70 9 ship 0",
                                           "-9 5 20 5 20 9 -9 9 ship 0"])})
    assert check_data.main([str(tmp_path), "--oriented", "--processes", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert [line.split(".txt:")[1].split(": ")[0] for line in errors] == ["4", "5", "6"]
    assert "sides" in errors[0] and "no area" in errors[1] and "outside its image" in errors[2]
    assert any("boxes that reach outside their image: 1, the first:" in line and "P.txt:7" in line for line in lines)
    assert len(read_annotations(tmp_path, findings=Findings([], []), oriented=True).records[0].labels) == 3


# ---- transforms ------------------------------------------------------------------------------------------------------


def scene(seed=0):
    """An image of 96 x 64 with one turned bright rectangle, and its box."""
    generator = np.random.default_rng(seed)
    box = torch.tensor([[generator.uniform(40, 56), generator.uniform(28, 36), generator.uniform(30, 38),
                         generator.uniform(16, 20), generator.uniform(0.01, QUARTER)]], dtype=torch.float32)
    inside = inside_of(box[0], 64, 96)
    return (inside * 200).to(torch.uint8).expand(3, 64, 96).contiguous(), box


def inside_of(box, height, width):
    """Which pixels have their centre in a box, (height, width) bool."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    c, s = box[4].cos(), box[4].sin()
    along, across = c * (x - box[0]) + s * (y - box[1]), c * (y - box[1]) - s * (x - box[0])
    return (along.abs() <= box[2] / 2) & (across.abs() <= box[3] / 2)


def agreement(image, box):
    """IoU of the bright pixels of an image with those of a box."""
    bright, inside = image[0] > 130, inside_of(box, *image.shape[-2:])  # what a rotation brings in has 124
    return ((bright & inside).sum() / (bright | inside).sum()).item()


@pytest.mark.parametrize("direction", ["horizontal", "vertical", "diagonal"])
def test_flips_keep_box_and_image_together(direction):
    for seed in range(10):
        image, boxes = scene(seed)
        mirrored, found = flip(image, boxes, direction)
        assert agreement(mirrored, found[0]) > 0.97
        assert (found[:, 4] > 0).all() and (found[:, 4] <= torch.tensor(QUARTER)).all()
        back, again = flip(mirrored, found, direction)
        assert torch.equal(back, image)
        torch.testing.assert_close(again, boxes, atol=1e-4, rtol=0)
    axes = {"horizontal": (0,), "vertical": (1,), "diagonal": (0, 1)}[direction]
    points = corners(boxes)[0]
    for axis in axes:
        points[:, axis] = (96, 64)[axis] - points[:, axis]
    expected = {tuple(point) for point in points.round(decimals=2).tolist()}
    assert {tuple(point) for point in corners(found)[0].round(decimals=2).tolist()} == expected
    assert flip(image, boxes[:0], direction)[1].shape == (0, 5)


def test_the_flip_of_an_axis_aligned_box_keeps_its_angle():
    boxes = torch.tensor([[20.0, 30, 6, 10, QUARTER]])
    torch.testing.assert_close(flip(torch.zeros(3, 64, 96), boxes)[1], torch.tensor([[76.0, 30, 6, 10, QUARTER]]))
    torch.testing.assert_close(flip(torch.zeros(3, 64, 96), boxes, "diagonal")[1],
                               torch.tensor([[76.0, 34, 6, 10, QUARTER]]))


def test_flips_of_horizontal_boxes_in_the_other_directions():
    boxes, image = torch.tensor([[1.0, 2, 10, 20]]), torch.zeros(3, 64, 96)
    assert flip(image, boxes, "vertical")[1].tolist() == [[1, 44, 10, 62]]
    assert flip(image, boxes, "diagonal")[1].tolist() == [[86, 44, 95, 62]]


@pytest.mark.parametrize("angle", [0.3, -1.2, QUARTER, math.pi])
def test_rotation_keeps_box_and_image_together(angle):
    image, boxes = scene(3)
    turned, found, kept = rotate(image, boxes, angle)
    assert turned.shape == image.shape and turned.dtype == torch.uint8 and kept.all()
    assert agreement(turned, found[0]) > 0.92
    torch.testing.assert_close(rotate(turned, found, -angle)[1], boxes, atol=1e-3, rtol=0)


def test_rotation_fills_with_the_mean_and_drops_what_leaves():
    boxes = torch.tensor([[92.0, 32, 4, 4, 1], [48, 32, 4, 4, 1]])
    turned, found, kept = rotate(torch.zeros(3, 64, 96, dtype=torch.uint8), boxes, QUARTER)
    assert kept.tolist() == [False, True] and turned[:, 0, 0].tolist() == [round(mean) for mean in MEAN]
    torch.testing.assert_close(found[0, :2], torch.tensor([48.0, 76]))  # clockwise: the right end goes down


def test_resize_scales_centres_by_axis_and_sides_by_the_root_of_the_product():
    image, boxes = scene()
    resized, found = resize(image, boxes, (32, 96))
    side = 0.5**0.5
    torch.testing.assert_close(found, boxes * torch.tensor([1, 0.5, side, side, 1]))
    assert resized.shape == (3, 32, 96) and resize(image, boxes[:0], (9, 9))[1].shape == (0, 5)
    even, found = resize(image, boxes, (128, 192))
    assert agreement(even, found[0]) > 0.95


@pytest.mark.parametrize("flipped", [False, True])
def test_a_sample_has_its_oriented_box_around_the_object(tmp_path, flipped):
    image, boxes = scene(5)
    points = " ".join(f"{value:.3f}" for value in corners(boxes).flatten().tolist())
    write_dota(tmp_path, {"P": (image.permute(1, 2, 0).numpy(), [f"{points} ship 0"])})
    sample = DetectionDataset(read_annotations(tmp_path, oriented=True))[Draw(0, 128, 192, flipped)]
    assert sample.boxes.shape == (1, 5) and agreement(sample.image, sample.boxes[0]) > 0.95


# ---- pictures, real data ---------------------------------------------------------------------------------------------


def test_pictures_have_oriented_outlines(tmp_path):
    write_dota(tmp_path, {"P": (np.zeros((64, 96, 3), np.uint8), ["30 10 60 30 50 45 20 25 ship 0"])})
    annotations = read_annotations(tmp_path, oriented=True)
    (record,) = annotations.records
    picture = np.asarray(pictures.draw_boxes(read_image(record), record.boxes, record.labels, np.ones(1), ["ship"]))
    ring = replace(record, boxes=regularise(torch.tensor(record.boxes))).boxes[0]
    outer, inner = (inside_of(ring + torch.tensor([0, 0, grow, grow, 0]), 64, 96).numpy() for grow in (6, -6))
    painted = picture.any(axis=2)
    assert painted[outer & ~inner].sum() > 100 and not painted[inner].any()
    found = {"boxes": record.boxes, "labels": record.labels, "scores": np.ones(1)}
    pictures.draw_sheet([(read_image(record), record, found)], ["ship"], tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").width > 400


@pytest.mark.real_data
def test_real_oriented_data(capsys):
    dota = read_annotations(real("dota_examples"), oriented=True)
    assert sum(len(record.labels) for record in dota.records) == 694 and len(dota.classes) == 11
    assert check_data.main([str(real("dota_examples")), "--oriented", "--processes", "1"]) == 0
    assert "0 errors" in capsys.readouterr().out
    nwpu = read_annotations(real("nwpu_vhr10") / "instances_val2017.json", oriented=True)
    boxes = torch.from_numpy(np.concatenate([record.boxes for record in nwpu.records]))
    assert boxes.shape == (932, 5) and (boxes[:, 2:4] > 2).all() and (rotated_iou(boxes, boxes) > 0.999).all()
