"""The losses of GFL: numbers known by heart, and loops over anchors."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from detection.assigners.atss import assign_by_atss
from detection.assigners.targets import ground_truth
from detection.geometry.anchors import make_anchors
from detection.geometry.boxes import ciou, giou, iou
from detection.losses import gfl
from detection.losses.gfl import (
    confidence,
    distribution_focal_loss,
    quality_focal_loss,
    quality_focal_loss_of_probabilities,
)
from detection.methods.gfl import WEIGHTS
from detection.network.gfl_head import Outputs

SIZES = ((8, 8), (4, 4), (2, 2), (1, 1), (1, 1))  # of 64 x 64
A, C = 86, 3
OBJECTS = torch.tensor([[4.0, 6, 52, 60], [20, 2, 63, 50], [1, 1, 30, 40], [8, 2, 60, 31]])
LABELS = torch.tensor([0, 1, 2, 1])
IMAGE_SIZES = [(64, 64), (32, 64)]  # half of the second is padding


def gfl_losses(outputs, targets, anchors, box_loss="giou"):
    """The weighted losses of GFL."""
    return {name: WEIGHTS[name] * loss
            for name, loss in gfl.gfl_losses(outputs, targets, anchors, box_loss).items()}


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def cross_entropy(z, target):
    """Binary, of a logit."""
    return -target * math.log(sigmoid(z)) - (1 - target) * math.log(1 - sigmoid(z))


def shares(logits):
    exponentials = [math.exp(z) for z in logits]
    return [value / sum(exponentials) for value in exponentials]


# ---- quality focal loss ----------------------------------------------------------------------------------------------


def test_the_golden_quality_focal_losses():
    zero, one, quality = torch.zeros(1, 1), torch.tensor([1]), torch.tensor([0.8])
    assert quality_focal_loss(zero, one, quality * 0).item() == pytest.approx(0.173287, abs=1e-6)  # background
    assert quality_focal_loss(zero, torch.tensor([0]), quality).item() == pytest.approx(0.062383, abs=1e-6)


def test_a_score_that_equals_the_quality_loses_nothing():
    logits = torch.tensor([[-2.0], [0.3], [4.0]], requires_grad=True)
    loss = quality_focal_loss(logits, torch.zeros(3, dtype=torch.int64), logits.detach().sigmoid().squeeze(1))
    assert loss.tolist() == [0, 0, 0]
    assert torch.autograd.grad(loss.sum(), logits)[0].abs().max() == 0


def test_a_quality_of_1_is_the_focal_loss_without_alpha():
    logits = 3 * torch.randn(20, 1, generator=torch.Generator().manual_seed(0))
    found = quality_focal_loss(logits, torch.zeros(20, dtype=torch.int64), torch.ones(20))
    expected = (1 - logits.sigmoid()) ** 2 * F.binary_cross_entropy_with_logits(logits, torch.ones(20, 1),
                                                                                reduction="none")
    assert torch.allclose(found, expected.squeeze(1), atol=1e-6)


@pytest.fixture
def scored():
    """Logits (30, 4), labels with background among them, qualities."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 5, (30,), generator=generator)
    assert 0 < (labels == 4).sum() < 30
    return 2 * torch.randn(30, 4, generator=generator), labels, torch.rand(30, generator=generator)


def slow_quality_focal(logits, label, quality):
    total = 0.0
    for c, z in enumerate(logits):
        target = quality if c == label else 0.0
        total += abs(target - sigmoid(z)) ** 2 * cross_entropy(z, target)
    return total


def test_quality_focal_loss_against_a_loop(scored):
    expected = [slow_quality_focal(*each) for each in zip(*(part.tolist() for part in scored), strict=True)]
    assert quality_focal_loss(*scored).tolist() == pytest.approx(expected, rel=1e-5)


def test_quality_focal_loss_of_probabilities_is_that_of_their_logits(scored):
    logits, labels, quality = scored
    logits.requires_grad_()
    ours, theirs = quality_focal_loss_of_probabilities(logits.sigmoid(), labels, quality), quality_focal_loss(*scored)
    assert torch.allclose(ours, theirs, atol=1e-5)
    gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, theirs)]
    assert torch.allclose(*gradients, atol=1e-5)


def test_scores_of_exactly_0_and_1_are_finite():
    scores = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
    loss = quality_focal_loss_of_probabilities(scores, torch.tensor([0, 2]), torch.tensor([0.9, 0.0]))
    assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), scores)[0].isfinite().all()
    sure = torch.tensor([[-200.0, 200.0]], requires_grad=True)
    loss = quality_focal_loss(sure, torch.tensor([0]), torch.tensor([0.9]))
    assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), sure)[0].isfinite().all()


# ---- distribution focal loss -----------------------------------------------------------------------------------------


def test_the_golden_distribution_focal_losses():
    targets = torch.tensor([0, 0.4, 3.25, 8, 15.9])
    assert distribution_focal_loss(torch.zeros(5, 17), targets).tolist() == pytest.approx([math.log(17)] * 5, abs=1e-6)
    edges = torch.zeros(1, 17)
    edges[0, 3] = math.log(3)
    assert distribution_focal_loss(edges, torch.tensor([3.25])).item() == pytest.approx(2.120480, abs=1e-6)


def test_a_whole_number_is_the_cross_entropy_of_its_bin():
    edges = torch.randn(9, 10, generator=torch.Generator().manual_seed(2))
    found = distribution_focal_loss(edges, torch.arange(9.0))
    assert torch.allclose(found, F.cross_entropy(edges, torch.arange(9), reduction="none"), atol=1e-6)


def test_distribution_focal_loss_against_a_loop():
    generator = torch.Generator().manual_seed(3)
    edges, targets = 3 * torch.randn(40, 6, generator=generator), 4.9 * torch.rand(40, generator=generator)
    for found, logits, y in zip(distribution_focal_loss(edges, targets).tolist(), edges.tolist(), targets.tolist(),
                                strict=True):
        i, q = math.floor(y), shares(logits)
        assert found == pytest.approx(-(i + 1 - y) * math.log(q[i]) - (y - i) * math.log(q[i + 1]), rel=1e-4)


def test_the_best_distribution_has_its_mean_at_the_target():
    edges = torch.full((1, 6), -30.0)
    edges[0, 2], edges[0, 3] = math.log(0.7), math.log(0.3)  # mean 2.3
    edges.requires_grad_()
    (gradient,) = torch.autograd.grad(distribution_focal_loss(edges, torch.tensor([2.3])).sum(), edges)
    assert gradient.abs().max() < 1e-6


# ---- the losses of a batch -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def anchors():
    return make_anchors(SIZES)


@pytest.fixture(scope="module")
def targets(anchors):
    return assign_by_atss(anchors, ground_truth(OBJECTS, LABELS, [3, 1], IMAGE_SIZES, C))


def random_outputs(seed=0, reg_max=16, quality=False, images=2):
    """Outputs of a detector, leaves that ask for a gradient."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, A, C, generator=generator) - 1
    edges = 2 * torch.randn(images, A, 4, reg_max + 1, generator=generator)
    features = [torch.zeros(images, 1, *size) for size in SIZES]
    sure = torch.rand(images, A, 1, generator=generator).requires_grad_() if quality else None
    return Outputs(logits.requires_grad_(), edges.requires_grad_(), features, sure)


def slow_losses(outputs, targets, metric):
    """One anchor after the other, in Python's numbers."""
    last = outputs.edges.shape[-1] - 1
    matched, valid = targets.matched.tolist(), targets.valid.tolist()
    qfl = box = dfl = positives = total_weight = 0.0
    for i in range(len(matched)):
        number = 0
        places = [(level, row, column) for level, (rows, columns) in enumerate(SIZES)
                  for row in range(rows) for column in range(columns)]
        for a, (level, row, column) in enumerate(places):
            stride, scores = 8 * 2**level, [sigmoid(z) for z in outputs.logits[i, a].tolist()]
            if outputs.quality is not None:
                scores = [score * outputs.quality[i, a, 0].item() for score in scores]
            logits, label, quality = [math.log(s / (1 - s)) for s in scores], C, 0.0
            if matched[i][a] >= 0:
                label, number = LABELS[matched[i][a]].item(), number + 1
                rows_of_logits = outputs.edges[i, a].tolist()
                left, top, right, bottom = (sum(k * share for k, share in enumerate(shares(logits_of_side)))
                                            for logits_of_side in rows_of_logits)
                decoded = torch.tensor([column - left, row - top, column + right, row + bottom], dtype=torch.float64)
                wanted = OBJECTS[matched[i][a]].double() / stride
                quality, weight = iou(decoded, wanted).item(), max(scores)
                total_weight += weight
                box += weight * (1 - metric(decoded, wanted).item())
                x1, y1, x2, y2 = wanted.tolist()
                for side, y in zip(rows_of_logits, (column - x1, row - y1, x2 - column, y2 - row), strict=True):
                    y, q = min(max(y, 0), last - 0.1), shares(side)
                    b = math.floor(y)
                    dfl -= weight / 4 * ((b + 1 - y) * math.log(q[b]) + (y - b) * math.log(q[b + 1]))
            if valid[i][a]:
                qfl += slow_quality_focal(logits, label, quality)
        positives += max(number, 1)
    return {"qfl": qfl / positives, "box": 2 * box / total_weight, "dfl": 0.25 * dfl / total_weight}


@pytest.mark.parametrize("options", [{}, {"reg_max": 4}, {"quality": True}, {"seed": 1, "quality": True}])
@pytest.mark.parametrize("name, metric", [("giou", giou), ("ciou", ciou)])
def test_the_losses_of_a_batch_against_a_loop(anchors, targets, options, name, metric):
    outputs = random_outputs(**options)
    found, expected = gfl_losses(outputs, targets, anchors, name), slow_losses(outputs, targets, metric)
    assert {key: value.item() for key, value in found.items()} == pytest.approx(expected, rel=1e-4)
    assert list(found) == ["qfl", "box", "dfl"] and all(value.ndim == 0 for value in found.values())


def test_the_scene_has_positives_on_both_images_and_padding(targets):
    assert targets.positive.sum(dim=1).min() > 0 and 0 < (~targets.valid).sum() < A


def test_giou_is_the_default_and_another_loss_of_boxes_changes_nothing_else(anchors, targets):
    outputs = random_outputs()
    default, other = gfl_losses(outputs, targets, anchors), gfl_losses(outputs, targets, anchors, "ciou")
    assert default["box"] == gfl_losses(outputs, targets, anchors, "giou")["box"] != other["box"]
    assert default["qfl"] == other["qfl"] and default["dfl"] == other["dfl"]
    with pytest.raises(KeyError):
        gfl_losses(outputs, targets, anchors, "diou")


def test_the_weights_and_qualities_are_constants(anchors, targets):
    """Neither does the classification learn from the loss of boxes, nor the boxes from that of the classes."""
    outputs = random_outputs(quality=True)
    found = gfl_losses(outputs, targets, anchors)
    for name, learns, does_not in (("qfl", (outputs.logits, outputs.quality), (outputs.edges,)),
                                   ("box", (outputs.edges,), (outputs.logits, outputs.quality)),
                                   ("dfl", (outputs.edges,), (outputs.logits, outputs.quality))):
        gradients = torch.autograd.grad(found[name], (*learns, *does_not), retain_graph=True, allow_unused=True)
        assert all(gradient.abs().max() > 0 for gradient in gradients[:len(learns)])
        assert all(gradient is None or gradient.abs().max() == 0 for gradient in gradients[len(learns):])


def test_edges_learn_at_positives_and_classes_wherever_the_image_is(anchors, targets):
    outputs = random_outputs()
    sum(gfl_losses(outputs, targets, anchors).values()).backward()
    assert torch.equal(outputs.edges.grad.abs().amax(dim=(2, 3)) > 0, targets.positive)
    assert torch.equal(outputs.logits.grad.abs().amax(dim=2) > 0, targets.valid)


def test_what_lies_in_the_padding_does_not_count(anchors, targets):
    outputs = random_outputs()
    expected = gfl_losses(outputs, targets, anchors)
    logits, edges = outputs.logits.detach().clone(), outputs.edges.detach().clone()
    logits[~targets.valid], edges[~targets.valid] = 9, 5
    assert gfl_losses(replace(outputs, logits=logits, edges=edges), targets, anchors) == expected


def test_the_normalisers(anchors, targets, monkeypatch):
    """`qfl` is divided by the positives, the others by the sum of their weights; each a mean over the processes."""
    outputs = random_outputs()
    alone = gfl_losses(outputs, targets, anchors)
    seen = []
    monkeypatch.setattr(gfl, "mean_over_processes", lambda value: seen.append(value.item()) or 4 * value)
    together = gfl_losses(outputs, targets, anchors)
    weights = outputs.logits.sigmoid().amax(dim=2)[targets.positive].sum()
    assert sorted(seen) == pytest.approx(sorted([targets.positive.sum().item(), weights.item()]))
    for name in ("qfl", "box", "dfl"):
        assert together[name].item() == pytest.approx(alone[name].item() / 4, rel=1e-5)


def test_a_batch_without_objects(anchors):
    outputs = random_outputs()
    nothing = assign_by_atss(anchors, ground_truth(OBJECTS[:0], LABELS[:0], [0, 0], IMAGE_SIZES, C))
    found = gfl_losses(outputs, nothing, anchors)
    assert found["box"] == found["dfl"] == 0 and found["qfl"] > 0
    in_words = sum(slow_quality_focal(outputs.logits[i, a].tolist(), C, 0)
                   for i in range(2) for a in range(A) if nothing.valid[i, a])
    assert found["qfl"].item() == pytest.approx(in_words / 2, rel=1e-4)  # each image counts at least 1
    sum(found.values()).backward()
    assert outputs.edges.grad.abs().max() == 0 and outputs.logits.grad.isfinite().all()
    assert outputs.logits.grad[nothing.valid].min() > 0  # every score is to fall


def test_an_image_without_objects_counts_as_one_positive(anchors):
    outputs = random_outputs()
    targets = assign_by_atss(anchors, ground_truth(OBJECTS, LABELS, [4, 0], [(64, 64)] * 2, C))
    found = gfl_losses(outputs, targets, anchors)
    first = Outputs(outputs.logits[:1], outputs.edges[:1], [feature[:1] for feature in outputs.features])
    own = assign_by_atss(anchors, ground_truth(OBJECTS, LABELS, [4], [(64, 64)], C))
    alone, positives = gfl_losses(first, own, anchors), own.positive.sum()
    assert found["box"].item() == pytest.approx(alone["box"].item(), rel=1e-5)
    background = quality_focal_loss(outputs.logits[1], torch.full((A,), C), torch.zeros(A)).sum()
    assert found["qfl"].item() == pytest.approx(((alone["qfl"] * positives + background) / (positives + 1)).item(),
                                                rel=1e-5)


def test_boxes_that_are_right_lose_nothing(anchors):
    """Distributions that are sure of whole numbers, and scores that know it."""
    boxes = torch.tensor([[8.0, 8, 48, 56]])  # multiples of the stride of P3
    own = assign_by_atss(anchors, ground_truth(boxes, torch.tensor([1]), [1], [(64, 64)], C))
    on_p3 = own.positive[0] & (anchors.levels == 0)
    assert on_p3.any()
    outputs = random_outputs(images=1)
    edges, logits = torch.zeros(1, A, 4, 17), torch.full((1, A, C), -30.0)
    for a in own.positive[0].nonzero().squeeze(1).tolist():
        x, y = (anchors.centres[a] / anchors.strides[a]).tolist()
        x1, y1, x2, y2 = (boxes[0] / anchors.strides[a]).tolist()
        logits[0, a, 1] = 30
        for side, distance in enumerate((x - x1, y - y1, x2 - x, y2 - y)):
            below = math.floor(distance)
            share = distance - below
            edges[0, a, side] = -60
            edges[0, a, side, below] = math.log(1 - share)
            if share:
                edges[0, a, side, below + 1] = math.log(share)
    found = gfl_losses(replace(outputs, logits=logits, edges=edges), own, anchors)
    assert found["qfl"].item() < 1e-5 and found["box"].item() < 1e-4


def test_the_losses_are_fp32_under_bf16(anchors, targets):
    outputs = random_outputs()
    found = gfl_losses(outputs, targets, anchors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = gfl_losses(outputs, targets, anchors)
    for name, value in found.items():
        assert again[name].dtype == torch.float32 and again[name].item() == pytest.approx(value.item(), rel=0.02)


# ---- scores and boxes ------------------------------------------------------------------------------------------------


def test_scores_and_their_confidence():
    plain, joint = random_outputs(), random_outputs(quality=True)
    assert torch.equal(plain.scores, plain.logits.sigmoid())
    assert torch.allclose(joint.scores, joint.logits.sigmoid() * joint.quality)
    found = confidence(joint.scores)
    assert found.shape == (2, A) and not found.requires_grad
    assert found[1, 7].item() == pytest.approx(max(joint.scores[1, 7].tolist()))


def test_decoded_boxes_against_a_loop(anchors):
    outputs = random_outputs(2, reg_max=6)
    found = outputs.boxes(anchors)
    assert found.shape == (2, A, 4)
    for i, a in ((0, 0), (1, 13), (0, 70), (1, 82), (1, 85)):
        stride, (x, y) = anchors.strides[a].item(), anchors.centres[a].tolist()
        left, top, right, bottom = (stride * sum(k * share for k, share in enumerate(shares(side)))
                                    for side in outputs.edges[i, a].tolist())
        assert found[i, a].tolist() == pytest.approx([x - left, y - top, x + right, y + bottom], rel=1e-4, abs=1e-3)
