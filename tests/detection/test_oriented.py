"""Oriented boxes: conversions, overlaps against shapely, suppression against a greedy loop and torchvision."""

import math

import pytest
import shapely
import torch
from torchvision import ops

from detection.geometry import oriented
from detection.geometry.oriented import (
    circumscribed,
    corners,
    from_horizontal,
    minimum_area_rectangle,
    polygon_iof,
    polygon_iou,
    regularise,
    rotated_iou,
    rotated_nms,
)
from detection.geometry.suppression import nms

QUARTER = math.pi / 2


def random_boxes(seed, count, size=100.0):
    """(count, 5) float64, sides of 2 to some 200 pixels, any angle."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(count, 2, generator=generator, dtype=torch.float64) * size
    sides = 20 * torch.randn(count, 2, generator=generator, dtype=torch.float64).clamp(-2.3, 2.3).exp()
    theta = (torch.rand(count, 1, generator=generator, dtype=torch.float64) - 0.5) * 10
    return torch.cat([centres, sides, theta], dim=1)


def moved(boxes, along, across):
    """Boxes moved by multiples of their own sides, along w and along h."""
    points = corners(boxes)
    shift = along * (points[:, 1] - points[:, 0]) + across * (points[:, 3] - points[:, 0])
    return torch.cat([boxes[:, :2] + shift, boxes[:, 2:]], dim=1)


def awkward_pairs():
    """Two times (2000, 5): random, nearly equal, touching at an edge, with a shared edge, contained, thin."""
    a, b = random_boxes(0, 2000), random_boxes(1, 2000)
    b[400:700] = a[400:700] + 1e-7 * b[400:700]
    b[700:900] = moved(a[700:900], 1, 0)
    b[900:1000] = moved(a[900:1000], 1, 0.5)
    b[1000:1200] = a[1000:1200] * torch.tensor([1, 1, 0.5, 1, 1])
    b[1000:1200] = moved(b[1000:1200], 0.5, 0)  # one half of the other: three shared edges
    b[1200:1400] = a[1200:1400] * torch.tensor([1, 1, 0.3, 0.4, 1])
    a[1400:1700, 3] = a[1400:1700, 2] / 100
    b[1500:1700] = a[1500:1700] + torch.tensor([0.1, 0, 0, 0, 0.01])
    b[1700:1800] = regularise(a[1700:1800])
    a[1800:, 4] = b[1800:, 4] = 0
    return a, b


def shapely_iou(a, b):
    """IoU of polygons (P, K, 2), each with its own."""
    a, b = shapely.polygons(a.numpy()), shapely.polygons(b.numpy())
    shared = shapely.area(shapely.intersection(a, b))
    return torch.from_numpy(shared / (shapely.area(a) + shapely.area(b) - shared))


# ---- conversions -----------------------------------------------------------------------------------------------------


def test_corners_are_those_of_the_convention():
    """Clockwise in image coordinates: y points down, so a small positive angle lowers the right end."""
    points = corners(torch.tensor([10.0, 20, 4, 2, QUARTER / 3]))
    c, s = math.cos(QUARTER / 3), math.sin(QUARTER / 3)
    expected = [[10 - 2 * c + s, 20 - 2 * s - c], [10 + 2 * c + s, 20 + 2 * s - c],
                [10 + 2 * c - s, 20 + 2 * s + c], [10 - 2 * c - s, 20 - 2 * s + c]]
    torch.testing.assert_close(points, torch.tensor(expected))
    assert points[1, 1] > points[0, 1]


def test_a_horizontal_box_has_a_right_angle_and_its_height_first():
    box = from_horizontal(torch.tensor([10.0, 20, 40, 30]))
    torch.testing.assert_close(box, torch.tensor([25, 25, 10, 30, QUARTER]))
    torch.testing.assert_close(circumscribed(box), torch.tensor([10.0, 20, 40, 30]))
    assert from_horizontal(torch.zeros(0, 4)).shape == circumscribed(torch.zeros(0, 5)).shape[:1] + (5,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_regularised_boxes_are_the_same_rectangles(dtype):
    right_angles = torch.arange(-9, 10, dtype=torch.float64) * QUARTER
    angles = torch.cat([right_angles, right_angles + 1e-9, right_angles - 1e-9, torch.tensor([1e-30, -1e-30])])
    boxes = random_boxes(2, 300)
    boxes[:len(angles), 4] = angles
    found = regularise(boxes.to(dtype))
    assert (found[:, 4] > 0).all() and (found[:, 4] <= torch.tensor(QUARTER, dtype=dtype)).all()
    same = shapely_iou(corners(found.double()), corners(boxes))
    assert same.min() > (1 - 1e-12 if dtype == torch.float64 else 1 - 1e-4)


def test_boxes_survive_the_way_over_polygons():
    boxes = regularise(random_boxes(3, 200))
    points = corners(boxes)[:, torch.tensor([2, 0, 3, 1])]  # the order of the points does not matter
    torch.testing.assert_close(minimum_area_rectangle(points), boxes, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(minimum_area_rectangle(points.float() + 5000)[:, :4], (boxes + 5000)[:, :4].float()
                               - torch.tensor([0, 0, 5000, 5000]), rtol=1e-3, atol=1e-2)
    flat = torch.tensor([[[10.0, 20], [40, 20], [40, 30], [10, 30]]])
    torch.testing.assert_close(minimum_area_rectangle(flat), torch.tensor([[25, 25, 10, 30, QUARTER]]))


@pytest.mark.parametrize("count", [3, 4, 9])
def test_minimum_area_rectangles_are_those_of_shapely(count):
    points = torch.rand(100, count, 2, generator=torch.Generator().manual_seed(count), dtype=torch.float64) * 100
    found = minimum_area_rectangle(points)
    areas = shapely.area(shapely.minimum_rotated_rectangle(shapely.multipoints(points.numpy())))
    torch.testing.assert_close(found[:, 2] * found[:, 3], torch.from_numpy(areas), rtol=1e-9, atol=1e-9)
    around = shapely.polygons(corners(found).numpy())
    assert (shapely.distance(around[:, None], shapely.points(points.numpy())) < 1e-9).all()


def test_repeated_points_do_not_give_a_direction():
    triangle = torch.tensor([[[0.0, 0], [0, 0], [3, 4], [3, 4]], [[0, 0], [2, 2], [2, 2], [1, 1]]])
    found = minimum_area_rectangle(triangle)
    assert found.isfinite().all()
    torch.testing.assert_close(found[:, 2] * found[:, 3], torch.zeros(2), atol=1e-5, rtol=0)


# ---- overlaps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_iou_is_that_of_shapely(dtype, tolerance):
    a, b = (boxes.to(dtype) for boxes in awkward_pairs())
    found, expected = rotated_iou(a, b), shapely_iou(corners(a.double()), corners(b.double()))
    assert found.dtype == dtype and (expected > 0).sum() > 1000
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(rotated_iou(b, a), found, atol=tolerance, rtol=0)


def test_iou_of_known_boxes():
    def iou(a, b):
        return rotated_iou(torch.tensor([a]), torch.tensor([b])).item()

    assert iou([0.0, 0, 1, 1, 0], [0, 0, 1, 1, QUARTER / 2]) == pytest.approx(math.sqrt(0.5), abs=1e-6)
    assert iou([0.0, 0, 4, 2, 0], [0, 0, 4, 2, QUARTER]) == pytest.approx(1 / 3, abs=1e-6)
    assert iou([0.0, 0, 4, 2, 0], [0, 0, 4, 2, QUARTER / 3]) == pytest.approx(0.623310, abs=1e-6)
    assert iou([5.0, 5, 4, 2, 0.3], [5, 5, 2, 1, 0.3]) == pytest.approx(1 / 4, abs=1e-6)
    assert iou([0.0, 0, 2, 2, 0], [2, 0, 2, 2, 0]) == 0  # touching
    assert iou([0.0, 0, 2, 2, 0], [9, 0, 2, 2, 0]) == 0
    assert iou([0.0, 0, 0, 2, 0.1], [0, 0, 0, 2, 0.1]) == 0  # of no area


def test_iou_does_not_depend_on_the_description_nor_on_the_frame():
    a, b = random_boxes(4, 300), random_boxes(5, 300)
    expected = rotated_iou(a, b)

    def turned(boxes, by):
        c, s = math.cos(by), math.sin(by)
        centres = boxes[:, :2] @ torch.tensor([[c, s], [-s, c]], dtype=torch.float64)
        return torch.cat([centres, boxes[:, 2:4], boxes[:, 4:] + by], dim=1)

    angle = torch.tensor([0, 0, 0, 0, 1.0], dtype=torch.float64)
    swapped = a[:, [0, 1, 3, 2, 4]] + QUARTER * angle
    frame = torch.tensor([1e3, -1e3, 0, 0, 0])
    for other in (rotated_iou(a + math.pi * angle, b), rotated_iou(swapped, b),
                  rotated_iou(turned(a, 0.7), turned(b, 0.7)), rotated_iou(a + frame, b + frame),
                  rotated_iou(a * torch.tensor([9, 9, 9, 9, 1]), b * torch.tensor([9, 9, 9, 9, 1]))):
        torch.testing.assert_close(other, expected, atol=1e-9, rtol=0)


def test_iou_in_fp32_far_from_the_origin():
    a, b = random_boxes(4, 300).float(), random_boxes(5, 300).float()
    a[:, :2], b[:, :2] = a[:, :2].round(), b[:, :2].round()  # so that the shift itself is exact
    shift = torch.tensor([20000.0, 20000, 0, 0, 0])
    torch.testing.assert_close(rotated_iou(a + shift, b + shift), rotated_iou(a, b), atol=1e-6, rtol=0)


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_iou_of_each_with_each_in_portions(at_once, monkeypatch):
    a, b = random_boxes(6, 23), random_boxes(7, 9)
    expected = torch.stack([rotated_iou(box.expand_as(b), b) for box in a])
    monkeypatch.setattr(oriented, "PAIRS", at_once)
    torch.testing.assert_close(rotated_iou(a[:, None], b), expected)
    assert rotated_iou(a[:0, None], b).shape == (0, 9) and rotated_iou(a[:, None], b[:0]).shape == (23, 0)


def test_half_precision_is_compared_in_fp32():
    a, b = random_boxes(8, 50).bfloat16(), random_boxes(9, 50).bfloat16()
    found = rotated_iou(a, b)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, rotated_iou(a.float(), b.float()))


def test_iou_of_any_quadrilaterals_is_that_of_shapely():
    generator = torch.Generator().manual_seed(0)
    turns = torch.rand(2, 500, 4, generator=generator, dtype=torch.float64).sort(dim=-1).values * 2 * math.pi
    radii = 10 + torch.rand(2, 500, 4, generator=generator, dtype=torch.float64) * 20
    stars = torch.stack([turns.cos(), turns.sin()], dim=-1) * radii[..., None]  # simple, some not convex
    a, b = stars[0], stars[1].flip(1)  # one drawn clockwise, one not
    simple = torch.from_numpy(shapely.is_valid(shapely.polygons(stars.numpy()))).all(dim=0)
    assert simple.sum() > 400
    torch.testing.assert_close(polygon_iou(a, b)[simple], shapely_iou(a[simple], b[simple]), atol=1e-9, rtol=0)
    assert polygon_iou(a[:, None], b[:3]).shape == (500, 3)


def test_intersection_over_foreground():
    square = torch.tensor([[[0.0, 0], [4, 0], [4, 4], [0, 4]]])
    other = square + torch.tensor([3.0, 1])
    torch.testing.assert_close(polygon_iof(square, other), torch.tensor([3 / 16]))
    torch.testing.assert_close(polygon_iof(square / 4 + 4, other), torch.tensor([1.0]))
    assert polygon_iof(square[:, :1].expand(1, 4, 2), square).item() == 0  # of no area


# ---- suppression -----------------------------------------------------------------------------------------------------


def detections(seed, count, classes=3):
    """`count` boxes scattered around a few places, with distinct scores."""
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes(seed, 12, size=200).float()[torch.randint(12, (count,), generator=generator)]
    boxes = boxes + torch.randn(count, 5, generator=generator) * torch.tensor([4, 4, 1, 1, 0.2])
    boxes[:, 2:4].clamp_(min=2)
    scores = (torch.randperm(count, generator=generator) + 1) / (count + 1)
    return boxes, scores, torch.randint(classes, (count,), generator=generator)


def greedy_reference(boxes, scores, labels, threshold, limit):
    """The numbers of the boxes that remain, one after the other."""
    polygons, kept = shapely.polygons(corners(boxes.double()).numpy()), []
    for i in scores.argsort(descending=True).tolist():
        def too_close(j, i=i):
            shared = polygons[i].intersection(polygons[j]).area
            return labels[i] == labels[j] and shared > threshold * (polygons[i].area + polygons[j].area - shared)

        if not any(too_close(j) for j in kept):
            kept.append(i)
    return kept[:limit]


@pytest.mark.parametrize("seed", range(6))
def test_nms_is_greedy(seed):
    boxes, scores, labels = detections(seed, 120)
    threshold, limit = [(0.1, 2000), (0.5, 20)][seed % 2]
    kept = greedy_reference(boxes, scores, labels, threshold, limit)
    found = rotated_nms(boxes, scores, labels, threshold, limit)
    for value, whole in zip(found, (boxes, scores, labels), strict=True):
        assert torch.equal(value, whole[kept])
    again = rotated_nms(*found, threshold, limit)
    assert torch.equal(again[0], found[0])


@pytest.mark.parametrize("seed", range(10))
def test_nms_of_horizontal_boxes_is_that_of_torchvision(seed):
    boxes, scores, labels = detections(seed, 400)
    boxes[:, 4] = 0
    upright = torch.cat([boxes[:, :2] - boxes[:, 2:4] / 2, boxes[:, :2] + boxes[:, 2:4] / 2], dim=1)
    kept = ops.batched_nms(upright, scores, labels, 0.4)
    assert torch.equal(rotated_nms(boxes, scores, labels, 0.4)[1], scores[kept])
    assert torch.equal(rotated_nms(from_horizontal(upright), scores, labels, 0.4)[1], nms(upright, scores, labels, 0.4,
                                                                                          2000)[1])


def test_nms_of_nothing():
    boxes, scores, labels = rotated_nms(torch.zeros(0, 5), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert boxes.shape == (0, 5) and len(scores) == len(labels) == 0
