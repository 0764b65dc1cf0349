"""ATSS, against a loop over objects, levels and anchors in double precision."""

import math
import statistics

import pytest
import torch

from detection.assigners import atss as atss_module
from detection.assigners.atss import TOPK, assign_by_atss, atss
from detection.assigners.targets import ground_truth
from detection.geometry.anchors import Anchors, make_anchors, valid_anchors

SIZES = ((16, 16), (8, 8), (4, 4), (2, 2), (1, 1))  # of 128 x 128
A, C = 341, 5
IMAGE_SIZES = [(128, 128), (128, 128), (64, 100), (128, 30)]


@pytest.fixture(scope="module")
def anchors():
    return make_anchors(SIZES)


def by_hand(boxes, *sizes):
    """Anchors of levels with `sizes` [(H, W)], whatever their strides."""
    boxes = torch.tensor(boxes, dtype=torch.float32)
    levels = torch.arange(len(sizes)).repeat_interleave(torch.tensor([rows * columns for rows, columns in sizes]))
    return Anchors(sizes, boxes, (boxes[:, :2] + boxes[:, 2:]) / 2, torch.full((len(boxes),), 8.0), levels)


def objects(count, seed, height=128, width=128, least=12, largest=110):
    """(count, 4) boxes in an image, the logarithms of their sides uniform."""
    generator = torch.Generator().manual_seed(seed)
    sides = least * (largest / least) ** torch.rand(count, 2, generator=generator)
    sides = torch.minimum(sides, torch.tensor([width - 1.0, height - 1.0]))
    corners = torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - sides)
    return torch.cat([corners, corners + sides], dim=1)


def scene(seed, counts=(6, 0, 3, 1)):
    """Boxes and labels of a batch of images of IMAGE_SIZES, and how many each has."""
    boxes = torch.cat([objects(count, 10 * seed + i, *IMAGE_SIZES[i]) for i, count in enumerate(counts)])
    return boxes, torch.arange(len(boxes)) % C, list(counts)


def one_image(anchors, boxes, valid=None):
    """`atss` of a single image: (A,) and (G,)."""
    valid = torch.ones(len(anchors.boxes), dtype=torch.bool) if valid is None else valid
    matched, thresholds = atss(anchors, boxes, torch.zeros(len(boxes), dtype=torch.int64), valid[None])
    return matched[0], thresholds


# ---- the slow reference ----------------------------------------------------------------------------------------------


def overlap(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def slow_atss(anchors, boxes, valid):
    """Matched objects, thresholds and candidates of one image, as lists."""
    places, points = anchors.boxes.tolist(), anchors.centres.tolist()
    best, thresholds, all_candidates = [(0.0, -1)] * len(places), [], []
    for g, box in enumerate(boxes.tolist()):
        middle, candidates = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), []
        for level in range(len(anchors.sizes)):
            own = [a for a in range(len(places)) if valid[a] and anchors.levels[a] == level]
            candidates += sorted(own, key=lambda a: math.dist(points[a], middle))[:9]  # noqa: B023
        overlaps = [overlap(places[a], box) for a in candidates]
        threshold = statistics.mean(overlaps) + (statistics.stdev(overlaps) if len(overlaps) > 1 else 0)
        thresholds.append(threshold)
        all_candidates.append(candidates)
        for a, value in zip(candidates, overlaps, strict=True):
            x, y = points[a]
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if inside and value >= threshold and value > best[a][0]:
                best[a] = (value, g)
    return [g for _, g in best], thresholds, all_candidates


# ---- ATSS ------------------------------------------------------------------------------------------------------------

GOLDEN = [[0, 0, 10, 10], [5, 0, 15, 10], [10, 0, 20, 10], [-4, -4, 16, 16], [20, 20, 30, 30]]


def test_the_golden_assignment():
    matched, thresholds = one_image(by_hand(GOLDEN, (1, 5)), torch.tensor([[0.0, 0, 10, 10]]))
    assert thresholds.tolist() == pytest.approx([0.316667 + 0.409946], abs=1e-6)  # the deviation of a sample
    population = statistics.pstdev([1, 1 / 3, 0, 0.25, 0])
    assert abs(thresholds.item() - (0.316667 + population)) > 0.04
    assert matched.tolist() == [0, -1, -1, -1, -1]


def test_the_deviation_is_that_of_a_sample():
    """An anchor whose IoU is between the two thresholds that one could mean."""
    values = [0.35, 1 / 3, 0, 0.25, 0]
    assert statistics.mean(values) + statistics.pstdev(values) < 0.345 < 0.355 < (
        threshold := statistics.mean(values) + statistics.stdev(values))
    matched, thresholds = one_image(by_hand([[0, 0, 10, 3.5], *GOLDEN[1:]], (1, 5)), torch.tensor([[0.0, 0, 10, 10]]))
    assert thresholds.tolist() == pytest.approx([threshold], abs=1e-6) and matched.eq(-1).all()


@pytest.mark.parametrize("seed", range(5))
def test_every_anchor_against_the_loop(anchors, seed):
    boxes, _, counts = scene(seed)
    valid = valid_anchors(anchors, IMAGE_SIZES)
    valid[0] &= torch.rand(A, generator=torch.Generator().manual_seed(seed)) > 0.3  # holes, as no image has them
    image_of = torch.arange(4).repeat_interleave(torch.tensor(counts))
    matched, thresholds = atss(anchors, boxes, image_of, valid)
    assert matched.shape == (4, A) and matched.dtype == torch.int64 and thresholds.shape == (sum(counts),)
    start = 0
    for i, count in enumerate(counts):
        expected, expected_thresholds, _ = slow_atss(anchors, boxes[start:start + count], valid[i])
        assert matched[i].tolist() == [g + start if g >= 0 else -1 for g in expected]
        assert thresholds[start:start + count].tolist() == pytest.approx(expected_thresholds, abs=1e-5)
        assert count == 0 or (matched[i] >= 0).any()
        start += count


def test_positives_are_candidates_whose_centre_is_inside(anchors):
    boxes = objects(12, 100)
    matched, _ = one_image(anchors, boxes)
    _, _, candidates = slow_atss(anchors, boxes, torch.ones(A, dtype=torch.bool))
    for g, box in enumerate(boxes):
        own = (matched == g).nonzero().squeeze(1)
        assert set(own.tolist()) <= set(candidates[g]) and len(own) <= TOPK * 5
        points = anchors.centres[own]
        assert (points > box[:2]).all() and (points < box[2:]).all()
    assert (matched >= 0).sum() > 12


def test_a_centre_on_the_side_of_the_object_is_outside():
    anchors = by_hand([[0, 0, 10, 10]], (1, 1))
    for side, expected in ((5.0, -1), (4.995, -1), (4.98, 0)):  # inside begins 0.01 pixels from the side
        assert one_image(anchors, torch.tensor([[side, 0.0, 12, 10]]))[0].tolist() == [expected]
        assert one_image(anchors, torch.tensor([[0.0, 0, 10, 10 - side]]))[0].tolist() == [expected]


def test_the_larger_iou_decides_between_objects():
    anchors = by_hand([[0, 0, 10, 10]], (1, 1))
    worse, better = [0.0, 0, 10, 14], [0.0, 0, 10, 12]
    assert one_image(anchors, torch.tensor([worse, better]))[0].tolist() == [1]
    assert one_image(anchors, torch.tensor([better, worse]))[0].tolist() == [0]
    assert one_image(anchors, torch.tensor([worse, better, better]))[0].tolist() == [1]  # of equal ones the first


def test_the_order_of_the_objects_does_not_matter(anchors):
    boxes = objects(12, 101)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    matched, thresholds = one_image(anchors, boxes)
    again, thresholds_again = one_image(anchors, boxes[order])
    assert torch.equal(thresholds[order], thresholds_again)
    assert torch.equal(matched, torch.where(again >= 0, order[again], -1))


def test_images_do_not_know_of_each_other(anchors):
    boxes, _, counts = scene(7)
    valid = valid_anchors(anchors, IMAGE_SIZES)
    image_of = torch.arange(4).repeat_interleave(torch.tensor(counts))
    matched, thresholds = atss(anchors, boxes, image_of, valid)
    for i in range(4):
        own = (image_of == i).nonzero().squeeze(1)
        alone, thresholds_alone = one_image(anchors, boxes[own], valid[i])
        assert torch.equal(matched[i], torch.cat([own, own.new_tensor([-1])])[alone])
        assert torch.equal(thresholds[own], thresholds_alone)


@pytest.mark.parametrize("chunk", [1, 4, 10])
def test_many_objects_are_taken_in_chunks(anchors, monkeypatch, chunk):
    boxes, _, counts = scene(8)
    arguments = (boxes, torch.arange(4).repeat_interleave(torch.tensor(counts)), valid_anchors(anchors, IMAGE_SIZES))
    whole = atss(anchors, *arguments)
    monkeypatch.setattr(atss_module, "PAIRS", chunk * A)
    assert all(torch.equal(one, other) for one, other in zip(whole, atss(anchors, *arguments), strict=True))


def test_no_object_is_all_background(anchors):
    matched, thresholds = one_image(anchors, torch.zeros(0, 4))
    assert matched.tolist() == [-1] * A and thresholds.shape == (0,)


def test_an_object_larger_than_everything(anchors):
    huge = torch.tensor([[-3000.0, -3100, 3300, 3200]])
    matched, thresholds = one_image(anchors, huge)
    expected, expected_thresholds, _ = slow_atss(anchors, huge, torch.ones(A, dtype=torch.bool))
    assert matched.tolist() == expected and thresholds.tolist() == pytest.approx(expected_thresholds, abs=1e-6)
    assert matched[-1] == 0  # the largest anchor fits best


def test_an_object_smaller_than_a_stride(anchors):
    tiny = torch.tensor([[30.5, 30.5, 34.5, 34.5]])  # around the centre of (32, 32) of P3
    matched, _ = one_image(anchors, tiny)
    assert matched.tolist() == slow_atss(anchors, tiny, torch.ones(A, dtype=torch.bool))[0]
    assert anchors.centres[matched >= 0].tolist() == [[32, 32]]
    assert (one_image(anchors, tiny + 1.6)[0] == -1).all()  # between the centres there is nobody to find it


def test_levels_with_fewer_anchors_than_candidates():
    """The last two levels have 4 and 1 anchors; on a small image fewer of them are valid."""
    anchors = make_anchors(((4, 4), (2, 2), (1, 1), (1, 1), (1, 1)))
    for image in ((32, 32), (20, 9)):
        valid = valid_anchors(anchors, [image])[0]
        boxes = objects(4, 102, 32, 32, least=8, largest=30)
        matched, thresholds = one_image(anchors, boxes, valid)
        expected, expected_thresholds, candidates = slow_atss(anchors, boxes, valid)
        assert all(9 < len(own) <= 16 for own in candidates)
        assert matched.tolist() == expected and thresholds.tolist() == pytest.approx(expected_thresholds, abs=1e-6)


def test_one_anchor_in_all():
    anchors = by_hand([[0, 0, 10, 10]], (1, 1))
    matched, thresholds = one_image(anchors, torch.tensor([[1.0, 1, 9, 9]]))
    assert matched.tolist() == [0] and thresholds.tolist() == pytest.approx([0.64])  # its own IoU: no deviation
    matched, thresholds = one_image(anchors, torch.tensor([[6.0, 1, 9, 9]]))
    assert matched.tolist() == [-1] and thresholds.tolist() == pytest.approx([0.24])
    matched, thresholds = one_image(anchors, torch.tensor([[1.0, 1, 9, 9]]), torch.tensor([False]))
    assert matched.tolist() == [-1] and thresholds.isfinite().all()


def test_an_object_without_area_has_no_positive_and_harms_nobody(anchors):
    boxes = objects(3, 103)
    flat = torch.cat([boxes, torch.tensor([[40.0, 40, 40, 90]])])
    matched, thresholds = one_image(anchors, flat)
    assert torch.equal(matched, one_image(anchors, boxes)[0]) and thresholds.isfinite().all()


# ---- the targets of a batch ------------------------------------------------------------------------------------------


def test_targets_say_of_each_anchor_what_its_object_is(anchors):
    boxes, labels, counts = scene(9)
    targets = assign_by_atss(anchors, ground_truth(boxes, labels, counts, IMAGE_SIZES, C))
    assert targets.labels.shape == targets.matched.shape == targets.valid.shape == (4, A)
    assert targets.boxes.shape == (4, A, 4) and targets.labels.dtype == torch.int64
    assert targets.image_of.tolist() == [0] * 6 + [2] * 3 + [3]
    assert torch.equal(targets.gt_boxes, boxes) and targets.thresholds.shape == (10,)
    matched, thresholds = atss(anchors, boxes, targets.image_of, targets.valid)
    assert torch.equal(targets.matched, matched) and torch.equal(targets.thresholds, thresholds)
    for i in range(4):
        for a in range(A):
            g = matched[i, a].item()
            assert targets.labels[i, a] == (labels[g] if g >= 0 else C)
            assert targets.boxes[i, a].tolist() == (boxes[g].tolist() if g >= 0 else [0, 0, 0, 0])
            assert g < 0 or targets.image_of[g] == i
    image, anchor = targets.positives
    assert torch.equal(targets.positive, targets.matched >= 0) and 10 < len(image) == targets.positive.sum()
    assert targets.positive[image, anchor].all()


def test_anchors_in_the_padding_of_the_batch_are_never_positive(anchors):
    """Not even where an object's box says that it lies there."""
    boxes = torch.cat([objects(9, seed) for seed in range(4)])
    targets = assign_by_atss(anchors, ground_truth(boxes, torch.zeros(36, dtype=torch.int64), [9] * 4, IMAGE_SIZES, C))
    assert torch.equal(targets.valid, valid_anchors(anchors, IMAGE_SIZES))
    assert not (targets.positive & ~targets.valid).any() and not targets.valid.all()
    for i in range(4):
        expected, _, _ = slow_atss(anchors, boxes[9 * i:9 * i + 9], targets.valid[i])
        assert targets.matched[i].tolist() == [g + 9 * i if g >= 0 else -1 for g in expected]


def test_an_image_in_a_larger_batch_keeps_its_assignment():
    """What lies beyond a padded image does not change its own anchors' targets."""
    boxes, small = objects(4, 104, 64, 64, largest=60), ((8, 8), (4, 4), (2, 2), (1, 1), (1, 1))
    truth = ground_truth(boxes, torch.arange(4), [4], [(64, 64)], C)
    alone, padded = assign_by_atss(make_anchors(small), truth), assign_by_atss(make_anchors(SIZES), truth)
    assert padded.valid.sum() == 86 and alone.valid.all()
    assert torch.equal(padded.matched[padded.valid], alone.matched[0]) and (alone.matched >= 0).any()
    assert torch.equal(padded.thresholds, alone.thresholds)


def test_a_batch_without_an_object(anchors):
    nothing = ground_truth(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), [0, 0], IMAGE_SIZES[:2], C)
    targets = assign_by_atss(anchors, nothing)
    assert targets.labels.eq(C).all() and targets.boxes.eq(0).all() and targets.matched.eq(-1).all()
    assert not targets.positive.any() and [len(part) for part in targets.positives] == [0, 0]
    assert targets.thresholds.shape == targets.image_of.shape == (0,)
