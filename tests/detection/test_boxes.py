"""Geometry of boxes, against torchvision and against loops over numbers."""

import math

import pytest
import torch
from torchvision import ops

from detection.geometry.boxes import (
    areas,
    boxes_at,
    centre_distance,
    centres,
    ciou,
    diou,
    distances,
    expected_distances,
    giou,
    intersection,
    iof,
    iou,
    pairs,
)

A, B = torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 1, 3, 3])
METRICS = {"iou": iou, "giou": giou, "diou": diou, "ciou": ciou}


def parity_diou(a, b):
    """What the released code of LD compares in place of the DIoU."""
    return iof(a, b) - centre_distance(a, b)


def random_boxes(count, seed, size=100.0):
    generator = torch.Generator().manual_seed(seed)
    corners = size * torch.rand(count, 2, generator=generator)
    return torch.cat([corners, corners + 1 + 0.6 * size * torch.rand(count, 2, generator=generator)], dim=1)


def slow(a, b):
    """The numbers of two boxes, one comparison after the other: {name of METRICS: number}."""
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    (wa, ha), (wb, hb) = ((box[2] - box[0], box[3] - box[1]) for box in (a, b))
    union = wa * ha + wb * hb - width * height
    overlap = width * height / union
    across, down = max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1])
    rho2 = ((a[0] + a[2]) / 2 - (b[0] + b[2]) / 2) ** 2 + ((a[1] + a[3]) / 2 - (b[1] + b[3]) / 2) ** 2
    distance = rho2 / (across**2 + down**2)
    v = 4 / math.pi**2 * (math.atan(wb / hb) - math.atan(wa / ha)) ** 2
    return {"iou": overlap, "giou": overlap - (across * down - union) / (across * down), "diou": overlap - distance,
            "ciou": overlap - distance - (v * v / (1 - overlap + v) if v else 0)}


# ---- overlaps --------------------------------------------------------------------------------------------------------


def test_the_golden_pair():
    assert areas(A).item() == 4 and centres(B).tolist() == [2, 2] and intersection(A, B).item() == 1
    assert iou(A, B).item() == pytest.approx(1 / 7, abs=1e-6)
    assert giou(A, B).item() == pytest.approx(-0.079365, abs=1e-6)
    assert centre_distance(A, B).item() == pytest.approx(1 / 9, abs=1e-6)
    assert diou(A, B).item() == pytest.approx(0.031746, abs=1e-6)
    assert ciou(A, B).item() == pytest.approx(0.031746, abs=1e-6)  # the aspect ratios are the same
    assert iof(A, B).item() == pytest.approx(0.25, abs=1e-6)
    assert parity_diou(A, B).item() == pytest.approx(0.138889, abs=1e-6)
    assert (iou(A, B) - centre_distance(A, B) ** 0.8).item() == pytest.approx(-0.029570, abs=1e-6)


@pytest.mark.parametrize("name", METRICS)
def test_each_pair_against_numbers(name):
    a, b = random_boxes(13, 0), random_boxes(9, 1)
    found = METRICS[name](*pairs(a, b))
    expected = torch.tensor([[slow(one, other)[name] for other in b.tolist()] for one in a.tolist()])
    assert found.shape == (13, 9) and torch.allclose(found, expected, atol=1e-5)
    aligned = METRICS[name](a[:9], b)
    assert aligned.shape == (9,) and torch.allclose(aligned, expected.diagonal(), atol=1e-5)


@pytest.mark.parametrize("found, torchvisions", [(iou, ops.box_iou), (giou, ops.generalized_box_iou),
                                                 (diou, ops.distance_box_iou), (ciou, ops.complete_box_iou)])
def test_each_pair_against_torchvision(found, torchvisions):
    a, b = random_boxes(40, 2), random_boxes(30, 3)
    assert torch.allclose(found(*pairs(a, b)), torchvisions(a, b), atol=1e-5)


@pytest.mark.parametrize("found, torchvisions", [
    (giou, ops.generalized_box_iou_loss), (diou, ops.distance_box_iou_loss), (ciou, ops.complete_box_iou_loss)])
def test_losses_and_gradients_against_torchvision(found, torchvisions):
    a, b = random_boxes(40, 4).requires_grad_(), random_boxes(40, 5)
    ours, theirs = 1 - found(a, b), torchvisions(a, b)
    assert torch.allclose(ours, theirs, atol=1e-5)
    if found is not ciou:  # torchvision holds its factor alpha constant
        (gradient,), (expected,) = (torch.autograd.grad(loss.sum(), a) for loss in (ours, theirs))
        assert gradient.abs().max() > 1e-3 and torch.allclose(gradient, expected, atol=1e-5)


def test_the_gradient_of_ciou_is_that_of_the_formula():
    a, b = random_boxes(6, 6).double().requires_grad_(), random_boxes(6, 7).double()
    assert torch.autograd.gradcheck(lambda boxes: ciou(boxes, b), a)


def test_identical_boxes_have_1():
    boxes = random_boxes(20, 8)
    for metric in (*METRICS.values(), iof, parity_diou):
        assert torch.allclose(metric(boxes, boxes), torch.ones(20), atol=1e-6)


def test_boxes_apart_share_nothing_and_know_how_far_apart_they_are():
    apart = torch.tensor([[3.0, 0, 5, 2], [30, 0, 32, 2]])
    assert iou(A, apart).tolist() == [0, 0] and iof(A, apart).tolist() == [0, 0]
    for metric in (giou, diou, ciou):
        near, far = metric(A, apart).tolist()
        assert -1 <= far < near < 0
    assert iou(A, torch.tensor([2.0, 0, 4, 2])).item() == 0  # touching


def test_who_comes_first_does_not_matter_but_for_what_is_foreground():
    a, b = random_boxes(50, 9), random_boxes(50, 10)
    for metric in METRICS.values():
        assert torch.allclose(metric(a, b), metric(b, a), atol=1e-6)
    wide = torch.tensor([0.0, 0, 8, 8])
    assert parity_diou(A, wide).item() == pytest.approx(1 - 18 / 128)  # all of A lies in it
    assert parity_diou(wide, A).item() == pytest.approx(4 / 64 - 18 / 128)


@pytest.mark.parametrize("change", [lambda boxes: boxes + torch.tensor([7.0, -40, 7, -40]), lambda boxes: 3 * boxes])
def test_moving_or_scaling_both_changes_nothing(change):
    a, b = random_boxes(50, 11), random_boxes(50, 12)
    for metric in (*METRICS.values(), iof, centre_distance):
        assert torch.allclose(metric(change(a), change(b)), metric(a, b), atol=1e-5)


def test_boxes_without_area_have_finite_numbers_and_gradients():
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 9, 5], [5, 5, 5, 9], [0, 0, 10, 10]], requires_grad=True)
    for metric in (*METRICS.values(), iof, centre_distance):
        found = metric(*pairs(boxes, boxes))
        assert found.isfinite().all() and found.min() >= -1 - 1e-6 and found.max() <= 1 + 1e-6
        assert torch.autograd.grad(found.sum(), boxes)[0].isfinite().all()
    assert iou(boxes[0], boxes[0]).item() == 0


def test_no_boxes():
    for metric in (*METRICS.values(), iof, centre_distance):
        assert metric(*pairs(torch.zeros(0, 4), random_boxes(3, 0))).shape == (0, 3)
        assert metric(*pairs(random_boxes(3, 0), torch.zeros(0, 4))).shape == (3, 0)


# ---- distances from a point ------------------------------------------------------------------------------------------


def test_the_golden_distances():
    point, box = torch.tensor([4.0, 4]), torch.tensor([1.0, 2, 6, 9])
    assert distances(point, box).tolist() == [3, 2, 2, 5]
    assert distances(point, box, 4 - 0.1).tolist() == pytest.approx([3, 2, 2, 3.9])
    assert distances(torch.tensor([0.0, 4]), box).tolist() == [-1, 2, 6, 5]  # not in the box
    assert distances(torch.tensor([0.0, 4]), box, 15.9).tolist() == [0, 2, 6, 5]


def test_the_box_at_the_distances_of_a_box_is_the_box():
    boxes = random_boxes(30, 13)
    share = torch.rand(30, 2, generator=torch.Generator().manual_seed(0))
    points = boxes[:, :2] + share * (boxes[:, 2:] - boxes[:, :2])
    assert torch.allclose(boxes_at(points, distances(points, boxes)), boxes, atol=1e-4)
    assert torch.allclose(boxes_at(points, distances(points, boxes, 1000)), boxes, atol=1e-4)
    cut = boxes_at(points, distances(points, boxes, 5))
    assert (cut[:, :2] >= boxes[:, :2] - 1e-4).all() and (cut[:, 2:] <= boxes[:, 2:] + 1e-4).all()
    assert (cut[:, 2:] - cut[:, :2]).max() <= 10 + 1e-4


def test_points_and_boxes_of_a_batch():
    points, sides = torch.rand(6, 2), torch.rand(3, 6, 4)
    found = boxes_at(points, sides)
    assert found.shape == (3, 6, 4)
    assert found[2, 1].tolist() == pytest.approx([*(points[1] - sides[2, 1, :2]).tolist(),
                                                  *(points[1] + sides[2, 1, 2:]).tolist()])


def test_the_integral_of_flat_and_of_sure_distributions():
    assert torch.allclose(expected_distances(torch.zeros(3, 4, 17)), torch.full((3, 4), 8.0), atol=1e-6)
    for k in range(17):
        edges = torch.zeros(1, 4, 17)
        edges[..., k] = 50
        assert torch.allclose(expected_distances(edges), torch.full((1, 4), float(k)), atol=1e-5)


def test_the_integral_against_a_loop():
    edges = 3 * torch.randn(5, 4, 9, generator=torch.Generator().manual_seed(1))
    for found, logits in zip(expected_distances(edges).flatten().tolist(), edges.flatten(0, 1).tolist(), strict=True):
        shares = [math.exp(value) for value in logits]
        assert found == pytest.approx(sum(k * share for k, share in enumerate(shares)) / sum(shares), rel=1e-5)


def test_the_gradient_of_the_integral_sums_to_zero():
    edges = torch.randn(6, 4, 17, generator=torch.Generator().manual_seed(2)).requires_grad_()
    expected_distances(edges).sum().backward()
    assert edges.grad.abs().max() > 0.1 and edges.grad.sum(dim=-1).abs().max() < 1e-5


def test_the_integral_is_fp32_under_bf16():
    edges = torch.randn(6, 4, 17, generator=torch.Generator().manual_seed(3)).bfloat16()
    found = expected_distances(edges)
    assert found.dtype == torch.float32 and torch.allclose(found, expected_distances(edges.float()))
