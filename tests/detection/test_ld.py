"""Localization Distillation and feature imitation, each loss against a loop over images and anchors."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from detection.assigners.atss import assign_by_atss
from detection.assigners.targets import Targets, ground_truth
from detection.distillers import ld, regions
from detection.distillers.imitation import IMITATIONS, imitation_loss, imitation_region
from detection.distillers.regions import finegrained, general_instances, inside_boxes, valuable_region
from detection.geometry.anchors import make_anchors
from detection.geometry.boxes import boxes_at, expected_distances
from detection.losses.gfl import gfl_losses
from detection.methods.ld import LDSettings, weights
from detection.network.gfl_head import Outputs

SIZES = ((8, 8), (4, 4), (2, 2), (1, 1), (1, 1))
A = 86  # anchors of these levels
C, R, CHANNELS = 3, 4, 6
OBJECTS = [torch.tensor([[4.0, 6, 52, 60], [20, 2, 63, 50], [1, 1, 30, 40]]), torch.zeros(0, 4),
           torch.tensor([[8.0, 2, 60, 31]])]
IMAGE_SIZES = [(64, 64), (64, 64), (32, 64)]  # on the third half of the anchors are not valid
ALL = {"lambda_kd_vlr": 10.0}


@pytest.fixture(scope="module")
def anchors():
    return make_anchors(SIZES)


def labels_of(boxes):
    return torch.arange(len(boxes)) % C


def targets_of(anchors, objects=OBJECTS, image_sizes=IMAGE_SIZES):
    labels, counts = torch.cat([labels_of(boxes) for boxes in objects]), [len(boxes) for boxes in objects]
    return assign_by_atss(anchors, ground_truth(torch.cat(objects), labels, counts, image_sizes, C))


def random_outputs(seed, images=3, quality=False):
    """Outputs of a detector, leaves that ask for a gradient."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, A, C, generator=generator)
    edges = 3 * torch.randn(images, A, 4, R + 1, generator=generator)
    features = [torch.randn(images, CHANNELS, *size, generator=generator) for size in SIZES]
    score = torch.rand(images, A, 1, generator=generator).requires_grad_() if quality else None
    return Outputs(logits.requires_grad_(), edges.requires_grad_(), [f.requires_grad_() for f in features], score)


def leaves(outputs):
    return [outputs.logits, outputs.edges, *outputs.features, *([] if outputs.quality is None else [outputs.quality])]


def of_images(outputs, order):
    """Outputs of some images of the batch."""
    return Outputs(outputs.logits[order], outputs.edges[order], [f[order] for f in outputs.features], None)


def targets_of_images(anchors, order):
    return targets_of(anchors, [OBJECTS[i] for i in order], [IMAGE_SIZES[i] for i in order])


def regions_of(targets, anchors):
    return valuable_region(anchors.boxes, targets.gt_boxes, targets.image_of, targets.thresholds, targets.valid)


def objects_of(targets, image):
    """Boxes and thresholds of the objects of one image, and that they are all of image 0."""
    own = targets.image_of == image
    return targets.gt_boxes[own], targets.image_of[own] * 0, targets.thresholds[own]


@pytest.fixture
def batch(anchors):
    """Student, teacher, targets, anchors."""
    return random_outputs(1), random_outputs(2), targets_of(anchors), anchors


# ---- slow references -------------------------------------------------------------------------------------------------


def slow_kl(student, teacher, temperature):
    """The divergence of two lists of logits, in double precision."""
    q, p = ([math.exp(z / temperature) for z in row.tolist()] for row in (student, teacher))
    terms = [t / sum(p) * math.log((t / sum(p)) / (s / sum(q))) for s, t in zip(q, p, strict=True)]
    return temperature**2 * sum(terms) / len(terms)


def slow_ld(student, teacher, targets, anchors, metric="diou"):
    """The four sums of the paper, anchor by anchor, and W."""
    total, ld_main, ld_vlr = 0.0, 0.0, 0.0
    kd_main, kd_vlr = [[] for _ in SIZES], [[] for _ in SIZES]
    for i in range(len(targets.labels)):
        valuable = valuable_region(anchors.boxes, *objects_of(targets, i), targets.valid[i:i + 1], metric=metric)[0]
        for a in range(A):
            if targets.labels[i, a] == C and valuable[a] == 0:
                continue
            edges = sum(slow_kl(student.edges[i, a, e], teacher.edges[i, a, e], 10) for e in range(4))
            classes = slow_kl(student.logits[i, a], teacher.logits[i, a], 2)
            if targets.labels[i, a] < C:
                weight = student.logits[i, a].sigmoid().max().item()
                if student.quality is not None:
                    weight *= student.quality[i, a].item()
                total += weight
                ld_main += 0.25 * weight * edges / 4
                kd_main[anchors.levels[a]].append(classes)
            if valuable[a] > 0:
                ld_vlr += 0.25 * valuable[a].item() * edges / 16
                kd_vlr[anchors.levels[a]].append(classes)
    kd_main, kd_vlr = (10 * sum(sum(level) / len(level) for level in levels if level) for levels in (kd_main, kd_vlr))
    return {"ld_main": ld_main, "ld_vlr": ld_vlr, "kd_main": kd_main, "kd_vlr": kd_vlr}, total


def ld_losses(student, teacher, targets, anchors, **changes):
    """The weighted losses of LD with the published settings but for `changes`."""
    settings = LDSettings(**{"lambda_kd_main": 10.0, **changes})
    terms = ld.ld_losses(student, teacher, targets, anchors, settings)
    return {name: weights(settings, C)[name] * loss for name, loss in terms.items()}


def imitation_losses(method, student, teacher, targets, anchors, weight=2.0):
    return {"imitation": weight * imitation_loss(method, student, teacher, targets, anchors)}


def values(losses):
    return {name: loss.item() for name, loss in losses.items()}


def gradients(losses, outputs):
    """The gradients of the sum of all losses, zeros where a tensor has no part in it."""
    return torch.autograd.grad(sum(losses.values()), leaves(outputs), allow_unused=True, materialize_grads=True)


# ---- LD --------------------------------------------------------------------------------------------------------------


def test_the_scene_holds_what_the_tests_are_about(batch):
    _, _, targets, anchors = batch
    valuable = regions_of(targets, anchors)
    assert targets.positive[0].any() and targets.positive[2].any() and not targets.positive[1].any()
    assert (targets.positive & (valuable > 0)).any() and ((valuable > 0) & ~targets.positive).any()
    assert not targets.valid[2].all() and not valuable[1].any()


@pytest.mark.parametrize("metric", regions.VLR_METRICS)
def test_every_loss_against_a_loop(batch, metric):
    found = values(ld_losses(*batch, **ALL, vlr_metric=metric))
    assert found == pytest.approx(slow_ld(*batch, metric)[0], rel=1e-5)
    assert min(found.values()) > 0


def test_one_anchor_by_hand():
    """An anchor that is its object: M = {a}, V is empty."""
    anchors = make_anchors(((1, 1), (0, 0), (0, 0), (0, 0), (0, 0)))
    box, first = anchors.boxes.clone(), torch.tensor([0])
    targets = Targets(torch.tensor([[1]]), box[None], torch.tensor([[0]]), torch.tensor([[True]]), (first, first), box,
                      first, torch.tensor([0.7]))
    teacher_edges = torch.zeros(1, 1, 4, 2)
    teacher_edges[0, 0, 2, 0] = 10 * math.log(3)
    student = Outputs(torch.tensor([[[0.0, math.log(3)]]]), torch.zeros(1, 1, 4, 2), [])
    teacher = Outputs(torch.tensor([[[2 * math.log(3), math.log(3)]]]), teacher_edges, [])
    found = values(ld_losses(student, teacher, targets, anchors, **ALL))
    own = 1 / (1 + 3**0.5)  # at T = 2 the student's softmax is (1, sqrt 3) and the teacher's (3, sqrt 3), normalised
    p = 3 / (3 + 3**0.5)
    kl_classes = 2**2 / 2 * (p * math.log(p / own) + (1 - p) * math.log((1 - p) / (1 - own)))
    assert found == pytest.approx({"ld_main": 0.25 * 0.75 * 6.540602 / 4, "ld_vlr": 0, "kd_main": 10 * kl_classes,
                                   "kd_vlr": 0}, rel=1e-6)


def test_the_defaults_are_the_published_ones_and_a_lambda_of_0_is_neither_computed_nor_returned(batch):
    student, teacher, targets, anchors = batch
    assert set(ld_losses(*batch)) == {"ld_main", "ld_vlr", "kd_main"}
    none = {"lambda_ld_main": 0, "lambda_ld_vlr": 0, "lambda_kd_main": 0}
    assert ld_losses(*batch, **none) == {}
    every = ld_losses(*batch, **ALL)
    for name in ("ld_main", "ld_vlr", "kd_main", "kd_vlr"):
        default = {"ld_main": 0.25, "ld_vlr": 0.25, "kd_main": 10.0, "kd_vlr": 10.0}[name]
        found = ld_losses(*batch, **{**none, f"lambda_{name}": 2 * default})
        assert set(found) == {name} and found[name].item() == pytest.approx(2 * every[name].item())
    without_edges = replace(student, edges=None)  # KD alone asks for no distances
    assert set(ld_losses(without_edges, teacher, targets, anchors, lambda_ld_main=0, lambda_ld_vlr=0)) == {"kd_main"}


def test_the_temperatures_are_those_of_their_loss(batch):
    base, edges = values(ld_losses(*batch)), values(ld_losses(*batch, ld_temperature=3.0))
    classes = values(ld_losses(*batch, kd_temperature=3.0))
    assert {name for name in base if edges[name] != base[name]} == {"ld_main", "ld_vlr"}
    assert {name for name in base if classes[name] != base[name]} == {"kd_main"}


def test_a_student_that_is_its_teacher_learns_nothing_from_it(batch):
    student, _, targets, anchors = batch
    teacher = copy.deepcopy(student)
    losses = ld_losses(student, teacher, targets, anchors, **ALL)
    assert len(losses) == 4 and all(abs(loss.item()) < 1e-6 for loss in losses.values())
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients(losses, student))
    assert min(values(gfl_losses(student, targets, anchors)).values()) > 0  # which goes on learning from the objects


def test_no_gradient_reaches_the_teacher_and_the_students_weights_are_constants(batch):
    student, teacher, targets, anchors = batch
    losses = ld_losses(*batch, **ALL)
    sum(losses.values()).backward()
    assert all(leaf.grad is None for leaf in leaves(teacher))
    assert student.edges.grad.abs().max() > 0 and student.logits.grad.abs().max() > 0
    valuable = regions_of(targets, anchors) > 0
    outside = ~(targets.positive | valuable)
    assert student.edges.grad[outside].abs().max() == 0 and student.logits.grad[outside].abs().max() == 0
    (only,) = gradients(ld_losses(*batch, lambda_kd_main=0), student)[:1]
    assert only.abs().max() == 0  # w_a comes from the logits, and would lower the loss by lowering the scores


def test_the_gradient_of_the_main_loss(batch):
    """0.25 * w_a / 4 * T / n * (q - p) at each edge of a positive."""
    student, teacher, targets, anchors = batch
    found = gradients(ld_losses(*batch, lambda_ld_vlr=0, lambda_kd_main=0), student)[1]
    weights = student.logits.sigmoid().amax(dim=2) * targets.positive
    difference = (student.edges / 10).softmax(dim=-1) - (teacher.edges / 10).softmax(dim=-1)
    assert torch.allclose(found, 0.25 * weights[..., None, None] / 4 * 10 / (R + 1) * difference, atol=1e-7)


def test_twice_the_batch_is_twice_the_sums_and_the_same_means(batch):
    student, teacher, targets, anchors = batch
    order = [0, 1, 2, 0, 1, 2]
    doubled = [*(of_images(part, order) for part in (student, teacher)), targets_of_images(anchors, order)]
    once, twice = values(ld_losses(*batch, **ALL)), values(ld_losses(*doubled, anchors, **ALL))
    for name in ("ld_main", "ld_vlr"):
        assert twice[name] == pytest.approx(2 * once[name], rel=1e-5)
    for name in ("kd_main", "kd_vlr"):
        assert twice[name] == pytest.approx(once[name], rel=1e-5)
    once, twice = (values(ld_losses(*parts, anchors, ld_norm="avg_factor")) for parts in (batch[:3], doubled))
    assert twice == pytest.approx(once, rel=1e-5)


def test_the_norm_avg_factor_divides_by_the_sum_of_the_weights(batch, monkeypatch):
    expected, total = slow_ld(*batch)
    assert total > 1
    found = values(ld_losses(*batch, **ALL, ld_norm="avg_factor"))
    divided = {name: loss / total if name in ("ld_main", "ld_vlr") else loss for name, loss in expected.items()}
    assert found == pytest.approx(divided, rel=1e-5)
    # Two processes, of which the other has a total of 3 W: the mean is 2 W.
    monkeypatch.setattr(ld, "mean_over_processes", lambda value: (value + 3 * value) / 2)
    assert ld_losses(*batch, ld_norm="avg_factor")["ld_main"].item() == pytest.approx(found["ld_main"] / 2, rel=1e-5)
    with pytest.raises(ValueError, match="mean"):
        ld_losses(*batch, ld_norm="mean")


def test_avg_factor_without_positives_does_not_blow_up_the_valuable_region(batch):
    student, teacher, targets, anchors = batch
    background = torch.full_like(targets.labels, C)
    unmatched = replace(targets, matched=torch.full_like(targets.matched, -1), labels=background)
    summed, divided = (ld_losses(student, teacher, unmatched, anchors, ld_norm=norm) for norm in ("none", "avg_factor"))
    assert summed["ld_vlr"].item() > 0
    assert divided["ld_vlr"].item() == pytest.approx(summed["ld_vlr"].item()) and divided["ld_main"].item() == 0


def test_the_weights_of_gfocal_v2_are_its_joint_scores(anchors):
    batch = random_outputs(1, quality=True), random_outputs(2, quality=True), targets_of(anchors), anchors
    losses = ld_losses(*batch, **ALL)
    assert values(losses) == pytest.approx(slow_ld(*batch)[0], rel=1e-5)
    assert gradients(losses, batch[0])[-1].abs().max() == 0


@pytest.mark.parametrize("norm", ld.LD_NORMS)
def test_a_batch_without_objects_costs_nothing_and_has_gradients_of_zero(anchors, norm):
    nothing = [torch.zeros(0, 4)] * 2
    batch = random_outputs(1, 2), random_outputs(2, 2), targets_of(anchors, nothing, IMAGE_SIZES[:2]), anchors
    losses = {**ld_losses(*batch, **ALL, ld_norm=norm), **imitation_losses("fitnet", *batch)}
    assert len(losses) == 5 and all(loss.item() == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(leaf.grad is not None and leaf.grad.abs().max() == 0 for leaf in leaves(batch[0]))


def test_images_without_objects_change_nothing(batch):
    student, teacher, targets, anchors = batch
    found = values(ld_losses(*(of_images(part, [0, 2]) for part in (student, teacher)),
                             targets_of_images(anchors, [0, 2]), anchors, **ALL))
    assert found == pytest.approx(values(ld_losses(*batch, **ALL)), rel=1e-6)


def test_what_lies_in_the_padding_of_the_batch_does_not_count(batch):
    student, teacher, targets, anchors = batch
    before = {**values(ld_losses(*batch, **ALL)), **{m: values(imitation_losses(m, *batch)) for m in IMITATIONS}}
    outside = ~targets.valid[..., None]
    spoilt = Outputs(student.logits + 5 * outside, student.edges.masked_fill(outside[..., None], 9.0), [
        feature + 5 * part.unflatten(1, size)[:, None].squeeze(-1) for feature, part, size in zip(
            student.features, outside.split(anchors.counts, dim=1), SIZES, strict=True)])
    after = [spoilt, *batch[1:]]
    imitated = {method: values(imitation_losses(method, *after)) for method in IMITATIONS}
    assert {**values(ld_losses(*after, **ALL)), **imitated} == before


def test_the_order_of_the_objects_does_not_matter(batch):
    student, teacher, _, anchors = batch
    order = torch.tensor([2, 0, 1])
    objects = [OBJECTS[0][order], *OBJECTS[1:]]
    again = (student, teacher, targets_of(anchors, objects), anchors)
    assert values(ld_losses(*again, **ALL)) == pytest.approx(values(ld_losses(*batch, **ALL)), rel=1e-6)
    for method in IMITATIONS:
        assert values(imitation_losses(method, *again)) == values(imitation_losses(method, *batch))


# ---- feature imitation -----------------------------------------------------------------------------------------------


def slow_masks(method, student, teacher, targets, anchors):
    """[(mask (N, A), weight)] of the parts of a method."""
    count = len(targets.labels)
    if method == "fitnet_full":
        return [(targets.valid, 1)]
    if method == "finegrained":
        near = [finegrained(anchors.boxes, *objects_of(targets, i)[:2], targets.valid[i:i + 1]) for i in range(count)]
        return [(torch.cat(near), 1)]
    if method == "gibox":
        found = []
        for i in range(count):
            parts = [part[i:i + 1] for outputs in (student, teacher) for part in (
                outputs.logits.sigmoid(),
                boxes_at(anchors.centres, expected_distances(outputs.edges) * anchors.strides[:, None]))]
            found.append(general_instances(*parts, targets.valid[i:i + 1], anchors.counts)[0])
        return [(torch.stack(found), 1)]
    inside = torch.cat([inside_boxes(anchors.centres, *objects_of(targets, i)[:2], targets.valid[i:i + 1])
                        for i in range(count)])
    return [(inside, 1)] if method == "fitnet" else [(inside, 1), (~inside & targets.valid, 2)]


def slow_imitation(method, student, teacher, targets, anchors):
    loss = 0.0
    for mask, weight in slow_masks(method, student, teacher, targets, anchors):
        for level, (height, width) in enumerate(SIZES):
            on_level = anchors.levels == level
            if not (targets.labels[:, on_level] < C).any():
                continue
            chosen, squares = mask[:, on_level].view(-1, height, width), []
            for i in range(len(chosen)):
                for y in range(height):
                    for x in range(width):
                        if chosen[i, y, x]:
                            difference = student.features[level][i, :, y, x] - teacher.features[level][i, :, y, x]
                            squares.append(difference.square().mean().item())
            loss += weight * sum(squares) / max(len(squares), 1)
    return 2.0 * loss


@pytest.mark.parametrize("method", IMITATIONS)
def test_imitation_against_a_loop(batch, method):
    expected = slow_imitation(method, *batch)
    assert expected > 0
    assert values(imitation_losses(method, *batch)) == pytest.approx({"imitation": expected}, rel=1e-5)
    assert values(imitation_losses(method, *batch, weight=1.0)) == pytest.approx({"imitation": expected / 2}, rel=1e-5)


def test_the_methods_choose_different_places(batch):
    found = {round(imitation_loss(method, *batch).item(), 5) for method in IMITATIONS}
    assert len(found) == len(IMITATIONS)
    with pytest.raises(ValueError, match="fitnets"):
        imitation_losses("fitnets", *batch)


def test_levels_without_a_positive_are_not_imitated(batch):
    """Whatever the method selects there."""
    student, teacher, targets, anchors = batch
    on_level = [(targets.positive & (anchors.levels == level)).any().item() for level in range(5)]
    assert True in on_level and False in on_level
    found = gradients(imitation_losses("fitnet_full", *batch), student)[2:7]
    assert [gradient.abs().max().item() > 0 for gradient in found] == on_level


@pytest.mark.parametrize("method", IMITATIONS)
def test_equal_features_have_no_loss_and_no_gradient_reaches_the_teacher(batch, method):
    student, teacher, targets, anchors = batch
    imitation_losses(method, *batch)["imitation"].backward()
    assert all(leaf.grad is None for leaf in leaves(teacher))
    assert any(feature.grad.abs().max() > 0 for feature in student.features)
    assert student.logits.grad is None and student.edges.grad is None
    same = imitation_losses(method, student, copy.deepcopy(student), targets, anchors)
    assert same["imitation"].item() == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients(same, student))


def test_imitation_is_fp32_under_bf16(batch):
    student, teacher, targets, anchors = batch
    rounded = [replace(outputs, features=[feature.bfloat16() for feature in outputs.features])
               for outputs in (student, teacher)]
    found = imitation_losses("fitnet", *rounded, targets, anchors)["imitation"]
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(imitation_losses("fitnet", *batch)["imitation"].item(), rel=0.02)


def test_general_instances_of_gfocal_v2_compare_scores_with_scores(anchors):
    """Equal outputs differ nowhere, so that no place is ahead of another: the quality is part of both scores."""
    student, targets = random_outputs(1, quality=True), targets_of(anchors)
    worse = replace(student, quality=student.quality.detach().clone())
    places = [40, 70, 81]
    worse.quality[0, places] *= 0.5  # the only places where the two disagree, one on a level
    found = imitation_region("gibox", worse, student, targets, anchors)
    assert found[0, places].all()
