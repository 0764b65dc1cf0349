"""The regions that are distilled, each against a loop over anchors and objects."""

import pytest
import torch
from torchvision.ops import nms

from detection.assigners.atss import atss
from detection.distillers import regions
from detection.distillers.regions import first_after_nms, general_instances
from detection.geometry import boxes as geometry
from detection.geometry.anchors import make_anchors

GOLDEN_ANCHORS = torch.tensor([[15.0, 15, 25, 25], [-5, 15, 5, 25], [0, 0, 40, 40], [10, 10, 50, 50],
                               [-20, -20, 60, 60]])
GOLDEN_BOX = torch.tensor([[0.0, 0, 40, 40]])


def valuable_region(anchors, boxes, thresholds, valid, *more, **options):
    """The region of a batch of one image."""
    image_of = torch.zeros(len(boxes), dtype=torch.int64)
    return regions.valuable_region(anchors, boxes, image_of, thresholds, valid[None], *more, **options)[0]


def inside_boxes(centres, boxes):
    valid = torch.ones(1, len(centres), dtype=torch.bool)
    return regions.inside_boxes(centres, boxes, torch.zeros(len(boxes), dtype=torch.int64), valid)[0]


def finegrained(anchors, boxes, valid):
    return regions.finegrained(anchors, boxes, torch.zeros(len(boxes), dtype=torch.int64), valid[None])[0]


# ---- slow references, on lists of numbers ----------------------------------------------------------------------------


def overlap_and_closeness(a, g, metric="diou"):
    """IoU of two boxes, and what the valuable region compares with the thresholds."""
    width = max(0, min(a[2], g[2]) - max(a[0], g[0]))
    height = max(0, min(a[3], g[3]) - max(a[1], g[1]))
    shared, area, other = width * height, (a[2] - a[0]) * (a[3] - a[1]), (g[2] - g[0]) * (g[3] - g[1])
    overlap = shared / (area + other - shared)
    rho2 = ((a[0] + a[2] - g[0] - g[2]) / 2) ** 2 + ((a[1] + a[3] - g[1] - g[3]) / 2) ** 2
    c2 = (max(a[2], g[2]) - min(a[0], g[0])) ** 2 + (max(a[3], g[3]) - min(a[1], g[1])) ** 2
    return overlap, (overlap if metric == "diou" else shared / area) - rho2 / c2


def slow_valuable_region(anchors, boxes, thresholds, valid, gamma, metric):
    weights = []
    for a, there in zip(anchors.tolist(), valid.tolist(), strict=True):
        best = 0.0
        for g, threshold in zip(boxes.tolist(), thresholds.tolist(), strict=True):
            overlap, closeness = overlap_and_closeness(a, g, metric)
            if there and gamma * threshold <= closeness < threshold:
                best = max(best, overlap)
        weights.append(best)
    return torch.tensor(weights)


def random_boxes(count, generator, low=4.0, high=40.0):
    corners = torch.rand(count, 2, generator=generator) * 60
    return torch.cat([corners, corners + low + torch.rand(count, 2, generator=generator) * (high - low)], dim=1)


@pytest.fixture
def scene():
    """Anchors, boxes, their thresholds, and which anchors are valid."""
    generator = torch.Generator().manual_seed(0)
    anchors, boxes = random_boxes(200, generator), random_boxes(11, generator)
    return anchors, boxes, 0.2 + 0.5 * torch.rand(11, generator=generator), torch.rand(200, generator=generator) > 0.2


# ---- the valuable localization region --------------------------------------------------------------------------------


def test_the_golden_region():
    overlaps = [overlap_and_closeness(a, GOLDEN_BOX[0].tolist())[0] for a in GOLDEN_ANCHORS.tolist()]
    assert overlaps == pytest.approx([0.0625, 0.030303, 1, 0.391304, 0.25], abs=1e-6)
    threshold = torch.tensor(overlaps).mean() + torch.tensor(overlaps).std()
    assert threshold.item() == pytest.approx(0.740210, abs=1e-6)
    valid = torch.ones(5, dtype=torch.bool)
    for metric, expected in (("diou", [0, 0, 0, 0.391304, 0.25]), ("iof_parity", [0, 0.030303, 0, 0.391304, 0.25])):
        found = valuable_region(GOLDEN_ANCHORS, GOLDEN_BOX, threshold[None], valid, 0.25, metric)
        assert found.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("metric", regions.VLR_METRICS)
@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.6])
def test_the_valuable_region_against_a_loop(scene, metric, gamma):
    found, expected = valuable_region(*scene, gamma, metric), slow_valuable_region(*scene, gamma, metric)
    assert torch.equal(found > 0, expected > 0) and torch.allclose(found, expected, atol=1e-6)
    assert 0 < (found > 0).sum() < 200 and found.max() <= 1


def test_the_two_metrics_are_not_the_same(scene):
    assert not torch.equal(valuable_region(*scene, metric="diou") > 0, valuable_region(*scene, metric="iof_parity") > 0)
    with pytest.raises(ValueError, match="giou"):
        valuable_region(*scene, metric="giou")


def test_gamma_1_leaves_nothing(scene):
    assert valuable_region(*scene, gamma=1.0).max() == 0


def test_no_object_no_region(scene):
    anchors, boxes, thresholds, valid = scene
    found = valuable_region(anchors, boxes[:0], thresholds[:0], valid)
    assert found.shape == (200,) and found.max() == 0


def test_one_anchor_and_one_object():
    one, valid = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([True])
    box = torch.tensor([[0.0, 0, 10, 20]])
    closeness = 0.5 - 25 / 500
    assert valuable_region(one, box, torch.tensor([closeness + 1e-3]), valid).tolist() == [0.5]
    assert valuable_region(one, box, torch.tensor([closeness - 1e-3]), valid).tolist() == [0]
    assert valuable_region(one, box, torch.tensor([4 * closeness - 1e-3]), valid).tolist() == [0.5]
    assert valuable_region(one, box, torch.tensor([4 * closeness + 1e-3]), valid).tolist() == [0]


def test_the_order_of_the_objects_does_not_matter(scene):
    anchors, boxes, thresholds, valid = scene
    order = torch.randperm(11, generator=torch.Generator().manual_seed(3))
    assert torch.equal(valuable_region(anchors, boxes[order], thresholds[order], valid), valuable_region(*scene))


def test_many_objects_are_taken_in_chunks(scene, monkeypatch):
    anchors, boxes, thresholds, valid = scene
    whole = valuable_region(*scene), inside_boxes(anchors[:, :2], boxes), finegrained(anchors, boxes, valid)
    for chunk in (1, 4, 11):
        monkeypatch.setattr(geometry, "PAIRS", chunk * len(anchors))
        again = valuable_region(*scene), inside_boxes(anchors[:, :2], boxes), finegrained(anchors, boxes, valid)
        assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))


def test_the_region_reaches_beyond_the_candidates_of_the_assignment():
    """The thresholds are those of ATSS, but any valid anchor may be in it, its centre inside an object or not."""
    anchors = make_anchors(((16, 16), (8, 8), (4, 4), (2, 2), (1, 1)))
    boxes = torch.tensor([[20.0, 16, 90, 80], [60, 40, 124, 110]])
    valid = torch.ones(len(anchors.boxes), dtype=torch.bool)
    matched, thresholds = atss(anchors, boxes, torch.tensor([0, 0]), valid[None])
    matched = matched[0]
    found = valuable_region(anchors.boxes, boxes, thresholds, valid)
    assert torch.allclose(found, slow_valuable_region(anchors.boxes, boxes, thresholds, valid, 0.25, "diou"), atol=1e-6)
    assert (found[anchors.levels == 0] > 0).sum() > 2 * 9
    assert ((found > 0) & (matched >= 0)).any()  # positive for one object, in the region of another
    assert ((found > 0) & ~inside_boxes(anchors.centres, boxes)).any()


# ---- regions of feature imitation ------------------------------------------------------------------------------------


def test_inside_an_object_counted_by_hand():
    """4 x 4 centres, 8 pixels apart: strictly inside, so that a centre on the border does not count."""
    centres = make_anchors(((4, 4), (0, 0), (0, 0), (0, 0), (0, 0))).centres
    region = inside_boxes(centres, torch.tensor([[7.0, 7, 17, 9], [0, 16, 8.5, 30], [15, 15, 24, 24]])).view(4, 4)
    assert region.int().tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 1, 0, 0]]
    assert not inside_boxes(centres, torch.zeros(0, 4)).any()


def test_finegrained_against_a_loop(scene):
    anchors, boxes, _, valid = scene
    expected = torch.zeros(200, dtype=torch.bool)
    for g in boxes.tolist():
        overlaps = [overlap_and_closeness(anchors[a].tolist(), g)[0] if valid[a] else 0.0 for a in range(200)]
        expected |= torch.tensor([overlap > 0.5 * max(overlaps) for overlap in overlaps])
    found = finegrained(anchors, boxes, valid)
    assert torch.equal(found, expected) and 0 < found.sum() < 200 and not (found & ~valid).any()


def test_finegrained_without_an_object_or_far_from_it_selects_nothing(scene):
    anchors, _, _, valid = scene
    assert not finegrained(anchors, torch.zeros(0, 4), valid).any()
    assert not finegrained(anchors, torch.tensor([[500.0, 500, 510, 510]]), valid).any()
    assert not finegrained(anchors, anchors[:3], torch.zeros_like(valid)).any()


@pytest.fixture
def disagreement():
    """Scores and boxes of student and teacher, which anchors are valid, and the anchors of each level: 3 images."""
    generator = torch.Generator().manual_seed(5)
    counts = [64, 16, 4, 1, 1]
    scores = torch.rand(2, 3, 86, 4, generator=generator)
    boxes = random_boxes(2 * 3 * 86, generator).view(2, 3, 86, 4)
    return scores[0], boxes[0], scores[1], boxes[1], torch.rand(3, 86, generator=generator) > 0.2, counts


def test_general_instances_against_the_nms_of_torchvision(disagreement):
    student_scores, student_boxes, teacher_scores, teacher_boxes, valid, counts = disagreement
    found = general_instances(*disagreement)
    for i in range(3):
        start = 0
        for count in counts:
            places, scores, boxes = [], [], []
            for a in range(start, start + count):
                differences = [(t - s).item() for s, t in zip(student_scores[i, a], teacher_scores[i, a], strict=True)]
                largest = max(differences, key=abs)
                if valid[i, a]:
                    places.append(a)
                    scores.append(abs(largest))
                    boxes.append(teacher_boxes[i, a] if largest >= 0 else student_boxes[i, a])
            kept = nms(torch.stack(boxes), torch.tensor(scores), 0.3)[:10].tolist() if places else []
            expected = {places[k] for k in kept}
            chosen = {a for a in range(start, start + count) if found[i, a]}
            assert chosen == expected and len(chosen) <= 10
            start += count
    assert (found[:, :64].sum(dim=1) == 10).any()


def test_the_greatest_disagreement_of_each_level_is_always_an_instance(disagreement):
    student_scores, _, teacher_scores, _, valid, counts = disagreement
    found = general_instances(*disagreement)
    scores = (teacher_scores - student_scores).abs().amax(dim=2) * valid
    for part, chosen in zip(scores.split(counts, dim=1), found.split(counts, dim=1), strict=True):
        there = part.amax(dim=1) > 0
        assert chosen[torch.arange(3), part.argmax(dim=1)][there].all()


def test_images_do_not_suppress_one_another(disagreement):
    together = general_instances(*disagreement)
    for i in range(3):
        alone = general_instances(*(tensor[i:i + 1] for tensor in disagreement[:5]), disagreement[5])
        assert torch.equal(alone[0], together[i])
    # The same image twice: one would suppress the other, did they compete.
    twice = general_instances(*(tensor[[0, 0]] for tensor in disagreement[:5]), disagreement[5])
    assert torch.equal(twice[0], together[0]) and torch.equal(twice[1], together[0])


def test_the_first_boxes_after_nms_are_few_different_and_take_part():
    boxes = torch.zeros(1, 5, 4)  # without area: they overlap nothing, not even themselves
    assert first_after_nms(boxes, torch.tensor([[0.5, 0.9, -1.0, 0.0, 0.7]]), 3, 0.3).tolist() == \
        [[True, True, False, False, True]]
    assert first_after_nms(boxes, torch.tensor([[0.5, 0.9, -1.0, 0.0, 0.7]]), 10, 0.3).sum() == 4
    assert not first_after_nms(boxes, torch.full((1, 5), -1.0), 3, 0.3).any()
    chain = torch.tensor([[[0.0, 0, 10, 10], [5, 0, 15, 10], [10, 0, 20, 10]]])
    assert first_after_nms(chain, torch.tensor([[0.9, 0.8, 0.7]]), 3, 0.3).tolist() == [[True, False, True]]
    assert first_after_nms(chain, torch.tensor([[0.9, 0.8, 0.7]]), 3, 0.34).tolist() == [[True, True, True]]


def test_the_images_of_a_batch_do_not_mix(scene):
    """Objects of several images at once, in any order, give each image the regions that it has alone."""
    anchors, boxes, thresholds, valid = scene
    other = torch.rand(len(anchors), generator=torch.Generator().manual_seed(0)) < 0.7
    image_of = torch.arange(len(boxes)) % 3
    both = torch.stack([valid, other, valid & other])
    for found, alone in (
            (regions.valuable_region(anchors, boxes, image_of, thresholds, both),
             lambda own, mask: valuable_region(anchors, boxes[own], thresholds[own], mask)),
            (regions.finegrained(anchors, boxes, image_of, both),
             lambda own, mask: finegrained(anchors, boxes[own], mask)),
            (regions.inside_boxes(anchors[:, :2], boxes, image_of, both),
             lambda own, mask: inside_boxes(anchors[:, :2], boxes[own]) & mask)):
        expected = torch.stack([alone(image_of == image, both[image]) for image in range(3)])
        assert torch.equal(found, expected) and (found > 0).any(dim=1).all()
