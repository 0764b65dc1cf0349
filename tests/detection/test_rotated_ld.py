"""Rotated-LD: its losses against a loop over images and anchors."""

import copy
import math

import pytest
import torch

from detection.assigners.targets import ground_truth
from detection.distillers.imitation import imitation_loss
from detection.distillers.rotated_ld import rotated_ld_losses
from detection.geometry.anchors import RETINA, make_anchors
from detection.geometry.oriented import circumscribed
from detection.methods import rotated, rotated_ld
from detection.methods.method import Step
from detection.methods.rotated_ld import ROTATED_LD, RotatedLDSettings
from detection.network.rotated_head import RotatedOutputs

SIZES = ((8, 8), (4, 4), (2, 2), (1, 1), (1, 1))
L, A, C, R, CHANNELS = 86, 86 * 9, 3, 4, 6
OBJECTS = [torch.tensor([[30.0, 32, 50, 20, 0.7], [45, 20, 14, 30, math.pi / 2]]), torch.zeros(0, 5),
           torch.tensor([[16.0, 34, 12, 26, 0.3]])]
IMAGE_SIZES = [(64, 64), (64, 64), (64, 32)]  # on the third half of the anchors are not valid


@pytest.fixture(scope="module")
def anchors():
    return make_anchors(SIZES, None, RETINA)


def targets_of(anchors, objects=OBJECTS, image_sizes=IMAGE_SIZES):
    labels = torch.cat([torch.arange(len(boxes)) % C for boxes in objects])
    truth = ground_truth(torch.cat(objects), labels, [len(boxes) for boxes in objects], image_sizes, C)
    return rotated.assign(Step(None, truth, anchors))


def random_outputs(seed):
    generator = torch.Generator().manual_seed(seed)
    logits, bins = (torch.randn(3, A, *shape, generator=generator) for shape in ((C,), (5, R + 1)))
    features = [torch.randn(3, CHANNELS, *size, generator=generator).requires_grad_() for size in SIZES]
    return RotatedOutputs(logits.requires_grad_(), (3 * bins).requires_grad_(), features)


@pytest.fixture
def batch(anchors):
    """Student, teacher, targets, anchors."""
    return random_outputs(1), random_outputs(2), targets_of(anchors), anchors


# ---- slow references -------------------------------------------------------------------------------------------------


def slow_kl(student, teacher, temperature):
    q, p = ([math.exp(z / temperature) for z in row.tolist()] for row in (student, teacher))
    terms = [t / sum(p) * math.log((t / sum(p)) / (s / sum(q))) for s, t in zip(q, p, strict=True)]
    return temperature**2 * sum(terms) / len(terms)


def slow_iou(a, b):
    width, height = (min(a[2 + i], b[2 + i]) - max(a[i], b[i]) for i in (0, 1))
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def slow_region(targets, anchors, around):
    """r_a of every image: of each level the 9 anchors nearest to an object are its candidates."""
    boxes, region = anchors.boxes.tolist(), torch.zeros(3, A)
    for g, image in enumerate(targets.image_of.tolist()):
        x1, y1, x2, y2 = around[g]
        overlaps = {a: slow_iou(boxes[a], around[g]) for a in range(A) if targets.valid[image, a]}
        candidates = []
        for level in range(5):
            own = [a for a in overlaps if anchors.levels[a] == level]
            x, y = anchors.centres[own].double().unbind(1)
            order = ((x - (x1 + x2) / 2) ** 2 + (y - (y1 + y2) / 2) ** 2).argsort(stable=True)[:9]
            candidates += [overlaps[own[place]] for place in order.tolist()]
        mean = sum(candidates) / len(candidates)
        threshold = mean + math.sqrt(sum((o - mean) ** 2 for o in candidates) / (len(candidates) - 1))
        for a, overlap in overlaps.items():
            if overlap >= 0.25 * threshold:
                region[image, a] = max(region[image, a], overlap)
    return region


def slow_losses(student, teacher, targets, anchors, around):
    region = slow_region(targets, anchors, around)
    ld, kd = 0.0, 0.0
    for level in range(5):
        members = [(i, a) for i in range(3) for a in range(A) if anchors.levels[a] == level and region[i, a] > 0]
        for i, a in members:
            share = region[i, a].item() / len(members)
            ld += share * sum(slow_kl(student.bins[i, a, b], teacher.bins[i, a, b], 5) for b in range(5))
            kd += share * slow_kl(student.logits[i, a], teacher.logits[i, a], 5)
    return {"ld": ld, "kd": kd}


def values(losses):
    return {name: loss.item() for name, loss in losses.items()}


# ---- the losses ------------------------------------------------------------------------------------------------------


def test_both_losses_against_a_loop(batch):
    found = values(rotated_ld_losses(*batch, RotatedLDSettings()))
    around = circumscribed(batch[2].gt_boxes).tolist()
    assert found == pytest.approx(slow_losses(*batch, around), rel=1e-4) and min(found.values()) > 0


def test_the_released_region_has_the_objects_turned_upright(batch):
    """The second object, 14 along y and 30 along x, is 14 x 30 for it."""
    found = values(rotated_ld_losses(*batch, RotatedLDSettings(region_boxes="upright")))
    around = [[x - w / 2, y - h / 2, x + w / 2, y + h / 2] for x, y, w, h, _ in batch[2].gt_boxes.tolist()]
    assert found == pytest.approx(slow_losses(*batch, around), rel=1e-4)
    assert found != pytest.approx(values(rotated_ld_losses(*batch, RotatedLDSettings())), rel=1e-2)


def test_a_student_that_is_its_teacher_learns_nothing_from_it_and_a_teacher_never_learns(batch):
    student, teacher, targets, anchors = batch
    same = rotated_ld_losses(student, copy.deepcopy(student), targets, anchors, RotatedLDSettings())
    assert all(abs(loss.item()) < 1e-6 for loss in same.values())
    sum(rotated_ld_losses(*batch, RotatedLDSettings()).values()).backward()
    assert teacher.bins.grad is None and teacher.logits.grad is None
    assert student.bins.grad[:, :, 4].abs().max() > 0 and student.logits.grad.abs().max() > 0
    assert student.bins.grad[~targets.valid].abs().max() == 0


def test_a_weight_of_0_is_not_computed_and_the_published_ones_are_the_defaults(batch):
    assert set(rotated_ld_losses(*batch, RotatedLDSettings(lambda_kd=0))) == {"ld"}
    assert rotated_ld_losses(*batch, RotatedLDSettings(lambda_ld=0, lambda_kd=0)) == {}
    assert ROTATED_LD.weights(RotatedLDSettings(), 15) == {"cls": 1, "box": 5, "ld": 10, "kd": 20, "imitation": 2}
    assert ROTATED_LD.weights(RotatedLDSettings(box_loss="kld"), 3)["kd"] == 4


def test_a_batch_without_objects_costs_nothing(batch, anchors):
    student, teacher, _, _ = batch
    targets = targets_of(anchors, [torch.zeros(0, 5)] * 3)
    losses = rotated_ld_losses(student, teacher, targets, anchors, RotatedLDSettings())
    sum(losses.values()).backward()
    assert values(losses) == {"ld": 0, "kd": 0} and student.bins.grad.abs().max() == 0


def test_the_gradient_of_ld(batch):
    """r_a / n_l * T / n * (q - p) at each of the five distributions."""
    student, teacher, targets, anchors = batch
    (found,) = torch.autograd.grad(rotated_ld_losses(*batch, RotatedLDSettings())["ld"], student.bins)
    region = slow_region(targets, anchors, circumscribed(targets.gt_boxes).tolist())
    counts = torch.stack([(region[:, anchors.levels == level] > 0).sum() for level in range(5)]).clamp(min=1)
    shares = region / counts[anchors.levels]
    difference = (student.bins / 5).softmax(dim=-1) - (teacher.bins / 5).softmax(dim=-1)
    torch.testing.assert_close(found, shares[..., None, None] * 5 / (R + 1) * difference, atol=1e-6, rtol=1e-3)


def test_features_are_imitated_where_any_anchor_of_a_location_is_near_an_object(batch):
    student, teacher, targets, anchors = batch
    settings = RotatedLDSettings(imitation="finegrained", lambda_ld=0, lambda_kd=0)
    step = Step(None, None, anchors, teacher=teacher, outputs=student, targets=targets)
    found = rotated_ld.losses(step, settings)["imitation"]
    around, boxes, expected, start = circumscribed(targets.gt_boxes).tolist(), anchors.boxes.tolist(), 0.0, 0
    region = torch.zeros(3, L, dtype=torch.bool)
    for g, image in enumerate(targets.image_of.tolist()):
        overlaps = [slow_iou(box, around[g]) if targets.valid[image, a] else 0 for a, box in enumerate(boxes)]
        for a, overlap in enumerate(overlaps):
            region[image, a // 9] |= overlap > 0.5 * max(overlaps)
    for level, (height, width) in enumerate(SIZES):
        rows = region[:, start:start + height * width]
        own = [(student.features[level][i, :, p // width, p % width] - teacher.features[level][i, :, p // width,
                p % width]).square().mean().item() for i in range(3) for p in range(height * width) if rows[i, p]]
        if own and targets.positive[:, anchors.levels == level].any():
            expected += sum(own) / len(own)
        start += height * width
    assert found.item() == pytest.approx(expected, rel=1e-5) and expected > 0
    assert imitation_loss("fitnet_full", student, copy.deepcopy(student), targets, anchors).item() == 0
