"""Suppression, each way against a greedy loop over boxes, the full matrices of the paper, and torchvision."""

import math

import pytest
import torch
from torchvision import ops

from detection.geometry import suppression
from detection.geometry.suppression import (
    SUPPRESSIONS,
    cluster_nms,
    distance_penalised_iou,
    nms,
    score_voting_cluster_diou_nms,
    score_voting_nms,
)

EVERY_WAY = pytest.mark.parametrize("suppress", SUPPRESSIONS.values(), ids=SUPPRESSIONS.keys())
BY_IOU = pytest.mark.parametrize("suppress", [nms, cluster_nms])


def detections(seed, count, objects=6, classes=3, size=200.0):
    """`count` jittered boxes around `objects` places, with distinct scores."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(objects, 2, generator=generator) * size
    sides = 20 + torch.rand(objects, 2, generator=generator) * size / 4
    which = torch.randint(objects, (count,), generator=generator)
    centre = centres[which] + torch.randn(count, 2, generator=generator) * 4
    side = sides[which] * (1 + 0.15 * torch.randn(count, 2, generator=generator)).clamp(min=0.3)
    scores = (torch.randperm(count, generator=generator) + 1) / (count + 1)
    labels = torch.randint(classes, (count,), generator=generator)
    return torch.cat([centre - side / 2, centre + side / 2], dim=1), scores, labels


def similarity(a, b, penalised):
    """IoU of two boxes, lists of four numbers; `penalised` less (rho^2 / c^2)^0.8."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    if not penalised:
        return shared / union
    apart = ((a[0] + a[2] - b[0] - b[2]) / 2) ** 2 + ((a[1] + a[3] - b[1] - b[3]) / 2) ** 2
    diagonal = (max(a[2], b[2]) - min(a[0], b[0])) ** 2 + (max(a[3], b[3]) - min(a[1], b[1])) ** 2
    return shared / union - (apart / diagonal) ** 0.8


def greedy(boxes, scores, labels, threshold, penalised=False):
    """Indices that remain, by a loop over boxes."""
    boxes, scores, labels = boxes.tolist(), scores.tolist(), labels.tolist()
    kept = []
    for j in sorted(range(len(boxes)), key=lambda j: -scores[j]):
        same = [i for i in kept if labels[i] == labels[j]]
        if all(similarity(boxes[i], boxes[j], penalised) <= threshold for i in same):
            kept.append(j)
    return kept


def voted(boxes, scores, labels, kept):
    """The remaining boxes after the vote, box by box, with the boxes that are not similar at e^-40 of their scores."""
    boxes, scores, labels = boxes.tolist(), scores.tolist(), labels.tolist()
    order = sorted(range(len(boxes)), key=lambda j: -scores[j])
    found = []
    for i in kept:
        total, sums = 0.0, [0.0] * 4
        for j in order[order.index(i):]:
            if labels[j] != labels[i]:
                continue
            alike = similarity(boxes[i], boxes[j], penalised=True)
            weight = math.exp(-((1 - (alike if alike > 0.7 else 0)) ** 2) / 0.025) * scores[j]
            total += weight
            sums = [side + weight * other for side, other in zip(sums, boxes[j], strict=True)]
        found.append([side / total for side in sums])
    return torch.tensor(found)


def voted_of_paa(boxes, scores, labels, kept):
    """The remaining boxes after the vote of PAA, box by box."""
    found = []
    for i in kept:
        alike = [similarity(boxes[i].tolist(), box, penalised=False) for box in boxes.tolist()]
        weights = [(label == labels[i]) * (value > 0.01) * math.exp(-(1 - value)**2 / 0.025) * score
                   for value, label, score in zip(alike, labels, scores, strict=True)]
        found.append(sum(weight * box for weight, box in zip(weights, boxes, strict=True)) / sum(weights))
    return torch.stack(found)


def full_matrix(measure, boxes, scores, labels, threshold):
    """Cluster-NMS as the paper has it, on the one matrix of all boxes: indices that remain."""
    order = scores.argsort(descending=True, stable=True)
    boxes, labels = boxes[order], labels[order]
    matrix = measure(boxes[:, None], boxes[None]) * (labels[:, None] == labels)
    upper = matrix.triu(1)
    current = upper
    for _ in range(len(boxes) + 1):
        keep = current.max(dim=0).values <= threshold
        following = torch.diag(keep.float()) @ upper
        if torch.equal(following, current):
            return order[keep]
        current = following
    raise AssertionError("no fixed point after as many steps as boxes")


def assert_same(found, expected, atol=0.0):
    for left, right in zip(found, expected, strict=True):
        assert left.shape == right.shape and left.dtype == right.dtype
        assert torch.allclose(left, right, rtol=0, atol=atol)


@BY_IOU
def test_what_remains_is_that_of_torchvision_and_of_the_greedy_loop(suppress):
    for seed in range(200):
        boxes, scores, labels = detections(seed, count=1 + seed % 60)
        threshold = 0.3 + seed % 5 / 10
        kept = ops.batched_nms(boxes, scores, labels, threshold)
        assert kept.tolist() == greedy(boxes, scores, labels, threshold)
        assert_same(suppress(boxes, scores, labels, threshold), (boxes[kept], scores[kept], labels[kept]))


def test_what_remains_by_the_penalised_iou_is_that_of_the_greedy_loop_and_its_boxes_are_voted():
    moved = 0
    for seed in range(60):
        boxes, scores, labels = detections(seed, count=1 + seed, objects=3, classes=1)
        kept = greedy(boxes, scores, labels, 0.6, penalised=True)
        expected = voted(boxes, scores, labels, kept)
        found = score_voting_cluster_diou_nms(boxes, scores, labels)
        assert_same(found, (expected, scores[kept], labels[kept]), atol=1e-4)
        moved += (expected - boxes[kept]).abs().max().item() > 0.5
    assert moved > 30


@pytest.mark.parametrize("block", [1, 7, 64, 300])
def test_blocks_give_what_the_one_full_matrix_of_the_paper_gives(block, monkeypatch):
    boxes, scores, labels = detections(5, count=300, objects=20)
    scores = (scores * 30).ceil() / 30  # ties
    whole = score_voting_cluster_diou_nms(boxes, scores, labels, limit=300)
    monkeypatch.setattr(suppression, "BLOCK", block)
    kept = full_matrix(suppression.iou, boxes, scores, labels, 0.6)
    assert_same(cluster_nms(boxes, scores, labels, limit=300), (boxes[kept], scores[kept], labels[kept]))
    kept = full_matrix(distance_penalised_iou, boxes, scores, labels, 0.6)
    found = score_voting_cluster_diou_nms(boxes, scores, labels, limit=300)
    assert_same(found[1:], (scores[kept], labels[kept]))
    assert_same(found, whole)


@pytest.mark.parametrize("limit", [0, 1, 5, 12, 1000])
@EVERY_WAY
def test_the_limit_keeps_the_first_by_score(suppress, limit, monkeypatch):
    monkeypatch.setattr(suppression, "BLOCK", 10)
    inputs = detections(6, count=120)
    whole = suppress(*inputs, limit=120)
    assert 12 < len(whole[0]) < 120
    assert_same(suppress(*inputs, limit=limit), [part[:limit] for part in whole])


@EVERY_WAY
def test_scores_come_unchanged_and_in_descending_order(suppress):
    inputs = detections(7, count=90)
    _, scores, labels = suppress(*inputs)
    assert (scores[1:] < scores[:-1]).all() and set(scores.tolist()) <= set(inputs[1].tolist())
    assert labels.tolist() == [inputs[2][inputs[1] == score].item() for score in scores]


@BY_IOU
def test_a_second_time_changes_nothing(suppress):
    once = suppress(*detections(8, count=90))
    assert_same(suppress(*once), once)


@EVERY_WAY
def test_the_order_of_the_boxes_plays_no_part_where_scores_differ(suppress):
    boxes, scores, labels = detections(9, count=90)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    assert_same(suppress(boxes[order], scores[order], labels[order]), suppress(boxes, scores, labels))


@EVERY_WAY
def test_a_suppressed_box_suppresses_no_other(suppress):
    chain = torch.tensor([[0.0, 0, 10, 10], [2, 0, 12, 10], [4, 0, 14, 10]])  # IoU 2/3, 2/3, 3/7
    _, scores, _ = suppress(chain, torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3, dtype=torch.int64), threshold=0.5)
    assert scores.tolist() == pytest.approx([0.9, 0.7])


def test_a_long_chain_ends_after_as_many_steps_as_boxes(monkeypatch):
    count, steps, equal = 41, [], torch.equal
    monkeypatch.setattr(suppression.torch, "equal", lambda *pair: steps.append(1) or equal(*pair))
    left = 2.0 * torch.arange(count)
    chain = torch.stack([left, torch.zeros(count), left + 10, torch.full((count,), 10.0)], dim=1)
    scores = torch.linspace(0.9, 0.1, count)
    _, found, _ = cluster_nms(chain, scores, torch.zeros(count, dtype=torch.int64), threshold=0.5)
    assert torch.equal(found, scores[::2])
    assert len(steps) <= count + 1


@BY_IOU
def test_a_box_exactly_at_the_threshold_remains(suppress):
    boxes = torch.tensor([[0.0, 0, 5, 1], [0, 0, 3, 1], [0, 0, 2.99, 1]])  # IoU 3/5 with the first; the last with both
    labels = torch.zeros(3, dtype=torch.int64)
    _, scores, _ = suppress(boxes, torch.tensor([0.9, 0.8, 0.7]), labels, threshold=0.6)
    assert scores.tolist() == pytest.approx([0.9, 0.8])


@BY_IOU
def test_boxes_on_whole_pixels_where_overlaps_often_meet_the_threshold(suppress):
    generator = torch.Generator().manual_seed(3)
    for threshold in (0.5, 0.6, 0.7):
        corner = torch.randint(0, 6, (150, 2), generator=generator)
        boxes = torch.cat([corner, corner + torch.randint(1, 7, (150, 2), generator=generator)], dim=1).float()
        scores, labels = torch.rand(150, generator=generator), torch.zeros(150, dtype=torch.int64)
        kept = greedy(boxes, scores, labels, threshold)
        assert_same(suppress(boxes, scores, labels, threshold, 150), (boxes[kept], scores[kept], labels[kept]))


@EVERY_WAY
def test_of_equal_scores_the_first_remains(suppress):
    boxes = detections(10, count=300)[0]
    scores, labels = torch.full((300,), 0.5), torch.arange(300) % 2
    kept = greedy(boxes, scores, labels, 0.6, penalised=suppress is score_voting_cluster_diou_nms)
    found = suppress(boxes, scores, labels, limit=300)
    assert found[2].tolist() == labels[kept].tolist() and 2 < len(kept) < 300
    if suppress is score_voting_cluster_diou_nms:
        assert torch.allclose(found[0], voted(boxes, scores, labels, kept), rtol=0, atol=1e-3)
    elif suppress is score_voting_nms:
        assert torch.allclose(found[0], voted_of_paa(boxes, scores, labels, kept), rtol=0, atol=1e-3)
    else:
        assert torch.equal(found[0], boxes[kept])


@pytest.mark.parametrize("shift", [-500.0, 0.0, 4000.0, 1e5])
@EVERY_WAY
def test_classes_never_touch_each_other_wherever_the_boxes_lie(suppress, shift):
    """Labels 0 to 14 on the same 15 places, also 4000 apart: were classes shifted by 4000, they would meet."""
    places = shift + 4000.0 * torch.arange(15)
    boxes = torch.stack([places, torch.full((15,), shift), places + 60, torch.full((15,), shift + 60)], dim=1)
    boxes = boxes.repeat(15, 1)  # (225, 4)
    labels = torch.arange(15).repeat_interleave(15)
    scores = torch.linspace(0.9, 0.1, 225)
    assert_same(suppress(boxes, scores, labels, limit=225), (boxes, scores, labels))
    # In one class the same boxes are 15 copies of 15.
    found = suppress(boxes, scores, torch.zeros_like(labels), limit=225)
    assert_same(found, (boxes[:15], scores[:15], labels[:15]))


@EVERY_WAY
def test_each_class_comes_out_as_if_it_were_alone(suppress):
    boxes, scores, labels = detections(11, count=200, objects=3, size=6000)
    found = suppress(boxes, scores, labels, limit=200)
    for label in range(3):
        own = labels == label
        alone = suppress(boxes[own], scores[own], labels[own], limit=200)
        assert_same([part[found[2] == label] for part in found], alone)


@EVERY_WAY
def test_no_box_gives_no_box(suppress):
    found = suppress(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert_same(found, (torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)))


@EVERY_WAY
def test_one_box_remains_as_it_is(suppress):
    one = torch.tensor([[3.3, -4.7, 50.1, 61.9]]), torch.tensor([0.051]), torch.tensor([14])
    assert_same(suppress(*one), one)


@EVERY_WAY
def test_boxes_without_area_remain_as_they_are(suppress):
    boxes = torch.tensor([[5.0, 5, 5, 5], [0, 0, 10, 10], [5, 5, 5, 5], [2, 3, 9, 3]])
    inputs = boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.zeros(4, dtype=torch.int64)
    assert_same(suppress(*inputs), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EVERY_WAY
def test_half_precision_is_worked_on_in_fp32(suppress, dtype):
    boxes, scores, labels = detections(12, count=90)
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    assert_same(suppress(boxes, scores, labels), suppress(boxes.float(), scores.float(), labels))


@EVERY_WAY
def test_the_inputs_are_left_alone(suppress):
    inputs = detections(13, count=40)
    before = [part.clone() for part in inputs]
    suppress(*inputs)
    assert_same(inputs, before)


# ---- voting ----------------------------------------------------------------------------------------------------------


def test_penalised_iou_golden():
    a, b = torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 1, 3, 3])
    assert distance_penalised_iou(a, b).item() == pytest.approx(-0.029570, abs=1e-6)
    assert distance_penalised_iou(a, a).item() == 1


def test_an_isolated_box_does_not_move():
    boxes = torch.tensor([[0.0, 0, 10, 10], [30, 0, 47.3, 11], [3000, 5000, 3010.7, 5020.1]])
    scores, labels = torch.tensor([0.9, 0.5, 0.06]), torch.zeros(3, dtype=torch.int64)
    found, _, _ = score_voting_cluster_diou_nms(boxes, scores, labels)
    assert torch.allclose(found, boxes, rtol=0, atol=1e-4)


def test_two_identical_boxes_become_the_same_box():
    boxes = torch.tensor([[3.25, 4, 10, 17]]).repeat(2, 1)
    found = score_voting_cluster_diou_nms(boxes, torch.tensor([0.4, 0.8]), torch.zeros(2, dtype=torch.int64))
    assert_same(found, (boxes[:1], torch.tensor([0.8]), torch.tensor([0])), atol=1e-5)


def test_a_vote_by_hand():
    boxes = torch.tensor([[0.0, 0, 100, 100], [0, 0, 100, 90], [0, 0, 100, 50]])  # the last is too far away to vote
    found, scores, _ = score_voting_cluster_diou_nms(
        boxes, torch.tensor([0.8, 0.4, 0.2]), torch.zeros(3, dtype=torch.int64))
    alike = 0.9 - (5**2 / (100**2 + 100**2)) ** 0.8
    weight = 0.4 * math.exp(-((1 - alike) ** 2) / 0.025)
    assert found[0].tolist() == pytest.approx([0, 0, 100, (0.8 * 100 + weight * 90) / (0.8 + weight)], abs=1e-4)
    assert found[1].tolist() == [0, 0, 100, 50] and scores.tolist() == pytest.approx([0.8, 0.2])


def test_a_box_with_a_higher_score_has_no_vote():
    # S = 0.75 - 0.009 between the two: below a threshold of 0.8, so both remain, and similar enough for a vote.
    boxes = torch.tensor([[0.0, 0, 100, 100], [0, 0, 100, 75]])
    found, _, _ = score_voting_cluster_diou_nms(
        boxes, torch.tensor([0.8, 0.7]), torch.zeros(2, dtype=torch.int64), threshold=0.8)
    assert 75 < found[0, 3] < 99.9
    assert found[1].tolist() == [0, 0, 100, 75]


def test_a_voted_box_lies_within_the_hull_of_its_voters():
    boxes, scores, labels = detections(14, count=150)
    found, found_scores, found_labels = score_voting_cluster_diou_nms(boxes, scores, labels)
    for box, score, label in zip(found, found_scores, found_labels, strict=True):
        own = boxes[scores == score]
        voters = boxes[(distance_penalised_iou(own, boxes) > 0.7) & (labels == label) & (scores <= score)]
        assert (box >= voters.min(dim=0).values - 1e-4).all() and (box <= voters.max(dim=0).values + 1e-4).all()


def test_a_vote_far_from_the_origin_is_that_at_the_origin():
    boxes, scores, labels = detections(15, count=80)
    boxes = (boxes * 4).round() / 4  # representable after the shift as well
    near = score_voting_cluster_diou_nms(boxes, scores, labels)
    far = score_voting_cluster_diou_nms(boxes + 1e5, scores, labels)
    assert_same((far[0] - 1e5, *far[1:]), near, atol=0.05)


def test_in_paa_boxes_of_any_score_vote():
    """The second box is suppressed by the first; the third, of IoU 0.54 with the first, remains and both vote."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [3, 0, 13, 10], [0, 0, 10, 10]])
    scores, labels = torch.tensor([0.9, 0.8, 0.6, 0.5]), torch.tensor([0, 0, 0, 1])
    found = score_voting_nms(boxes, scores, labels)
    assert found[1].tolist() == pytest.approx([0.9, 0.6, 0.5]) and found[2].tolist() == [0, 0, 1]
    assert torch.allclose(found[0], voted_of_paa(boxes, scores, labels, [0, 2, 3]), atol=1e-4)
    assert found[0][1, 0] < 3 - 1e-4 and found[0][0, 3] < 9.99 and torch.equal(found[0][2], boxes[3])
