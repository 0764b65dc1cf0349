"""The distillation of LAD: its losses against loops over anchors, and what its methods do with a teacher."""

import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Bernoulli, kl_divergence
from torchvision.ops import box_iou, generalized_box_iou

from common.runtime import UserError
from detection.assigners.paa import assign_by_paa
from detection.assigners.targets import ground_truth
from detection.checkpoint import describe_model
from detection.distillers.lad import focal_kl, focal_kl_of_probabilities, soft_label_losses
from detection.geometry.anchors import make_anchors
from detection.geometry.deltas import encode
from detection.losses.paa import paa_losses
from detection.methods import colad, lad
from detection.methods.colad import COLAD, CoLADSettings
from detection.methods.lad import LAD, LADSettings
from detection.methods.ltd import CalibratedOutputs
from detection.methods.method import Step
from detection.methods.paa import PAA, PAASettings
from detection.network.detector import Architecture, Detector
from detection.network.paa_head import DELTA_STDS, Outputs

SIZES = ((8, 8), (4, 4), (2, 2), (1, 1), (1, 1))  # of 64 x 64
ANCHORS = make_anchors(SIZES)
A, C = 86, 3
TRUTH = ground_truth(torch.tensor([[4.0, 6, 52, 60], [20, 2, 63, 50], [8, 2, 60, 31]]), torch.tensor([0, 1, 2]),
                     [2, 0, 1], [(64, 64), (64, 64), (32, 64)], C)
NOTHING = ground_truth(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), [0, 0, 0], TRUTH.image_sizes, C)


def outputs(seed, iou=True, probabilities=False, requires_grad=False):
    """Random scores, and boxes around the objects of the first image."""
    generator = torch.Generator().manual_seed(seed)
    logits, ious = torch.randn(3, A, C, generator=generator) - 2, torch.randn(3, A, generator=generator)
    wanted = TRUTH.boxes[torch.randint(3, (3, A), generator=generator)]
    deltas = encode(ANCHORS.boxes, wanted, stds=DELTA_STDS) + torch.randn(3, A, 4, generator=generator)
    logits, deltas, ious = (part.requires_grad_(requires_grad) for part in (logits, deltas, ious))
    return Outputs(logits, deltas, [], ious if iou else None, 0.9 * logits.sigmoid() if probabilities else None)


# ---- the divergence --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gamma", "expected"), [(0.5, .065406), (2, .008176)])
def test_focal_kl_of_a_logit_of_0(gamma, expected):
    student, teacher = torch.zeros(1), torch.tensor([math.log(3)])  # t = .75
    assert focal_kl(student, teacher, gamma).item() == pytest.approx(expected, abs=1e-5)
    assert focal_kl_of_probabilities(student.sigmoid(), teacher.sigmoid(), gamma).item() == pytest.approx(
        expected, abs=1e-5)


def test_focal_kl_is_the_divergence_of_bernoullis_times_the_focal_factor():
    student, teacher = (3 * torch.randn(2, 50, generator=torch.Generator().manual_seed(0))).requires_grad_()
    p, t = student.sigmoid(), teacher.sigmoid()
    expected = ((t - p)**2 + 1e-6)**0.25 * kl_divergence(Bernoulli(logits=teacher), Bernoulli(logits=student))
    assert torch.allclose(focal_kl(student, teacher), expected, atol=1e-6)
    assert torch.allclose(focal_kl_of_probabilities(p, t), expected, rtol=1e-3, atol=1e-5)
    (slope,) = torch.autograd.grad(expected.sum(), student, retain_graph=True)
    (found,) = torch.autograd.grad(focal_kl(student, teacher).sum(), student, retain_graph=True)
    assert torch.allclose(found, slope, atol=1e-5)
    assert torch.autograd.grad(focal_kl(student, teacher).sum(), teacher, allow_unused=True) == (None,)


def test_focal_kl_of_equals_and_of_extremes():
    logits = torch.tensor([-90.0, -3, 0, 3, 90])
    assert torch.allclose(focal_kl(logits, logits), torch.zeros(5), atol=1e-6)
    assert focal_kl(logits, -logits).isfinite().all()
    p = torch.tensor([0.0, 1, 0.5], requires_grad=True)
    loss = focal_kl_of_probabilities(p, torch.tensor([1.0, 0, 0.5]))
    loss.sum().backward()
    assert loss.isfinite().all() and p.grad.isfinite().all()


# ---- soft labels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("least_iou", "probabilities"), [(0.1, False), (0.5, True)])
def test_soft_labels_are_loops_over_anchors(least_iou, probabilities):
    student, teacher = outputs(0, probabilities=probabilities), outputs(1, probabilities=probabilities)
    found = soft_label_losses(student, teacher, TRUTH, ANCHORS, least_iou)
    theirs, ours = teacher.boxes(ANCHORS), student.boxes(ANCHORS)
    valid = assign_by_paa(teacher, ANCHORS, TRUTH).valid
    total, classes, ious, boxes, count = 0, 0, 0, 0, 0
    for image in range(3):
        own = TRUTH.boxes[TRUTH.image_of == image]
        for anchor in range(A):
            if not valid[image, anchor]:
                continue
            p, t = student.class_scores[image, anchor], teacher.class_scores[image, anchor]
            classes += focal_kl_of_probabilities(p, t).sum().item()
            u = box_iou(theirs[image, anchor][None], own).max().item() if len(own) else 0
            if u > least_iou:
                total, count = total + u, count + 1
                ious += focal_kl(student.iou_logits[image, anchor], teacher.iou_logits[image, anchor]).item()
                boxes += u * (1 - generalized_box_iou(ours[image, anchor][None], theirs[image, anchor][None]).item())
    expected = {"kd_cls": classes / total, "kd_iou": ious / total, "kd_box": boxes / total}
    assert {name: loss.item() for name, loss in found.items()} == pytest.approx(expected, rel=1e-3) and count > 10


def test_a_student_like_its_teacher_has_nothing_to_imitate():
    teacher = outputs(0)
    for loss in soft_label_losses(teacher, teacher, TRUTH, ANCHORS, 0.1).values():
        assert abs(loss.item()) < 1e-5


def test_a_batch_without_objects_is_no_loss_and_no_gradient():
    student = outputs(0, requires_grad=True)
    losses = soft_label_losses(student, outputs(1), NOTHING, ANCHORS, 0.1)
    assert set(losses) == {"kd_cls", "kd_iou", "kd_box"} and not any(losses.values())
    sum(losses.values()).backward()
    assert not any(part.grad.any() for part in (student.logits, student.deltas, student.iou_logits))


# ---- the methods -----------------------------------------------------------------------------------------------------


def step_of(settings, student, teacher=None, truth=TRUTH):
    return Step(torch.zeros(3, 3, 64, 64), truth, ANCHORS, settings, teacher, student)


def terms_of(method, step):
    if method is LAD:  # which can have a calibration network beside it
        step.outputs = CalibratedOutputs(step.outputs, None)
    step.targets = method.assign(step)
    return method.losses(step, step.settings)


@pytest.mark.parametrize("distill", lad.DISTILLATIONS)
def test_every_distillation_has_the_published_terms_and_weights(distill):
    settings = LADSettings(distill=distill)
    found, weights = terms_of(LAD, step_of(settings, outputs(0), outputs(1))), LAD.weights(settings, C)
    annotated, soft = {"cls": 1, "box": 1.3, "iou": 0.5}, {"kd_iou": 10, "kd_box": 1.3}
    expected = {"lad": annotated, "soft-label": {**soft, "kd_cls": 10},
                "solad": {**annotated, **soft, "kd_cls": 2}}[distill]
    assert {name: weights[name] for name in found} == pytest.approx(expected)
    least = {"soft-label": 0.1, "solad": 0.5}.get(distill)
    if least:
        assert found["kd_box"] == soft_label_losses(outputs(0), outputs(1), TRUTH, ANCHORS, least)["kd_box"]


def test_the_teacher_assigns_and_boxes_are_not_weighted():
    student, teacher = outputs(0), outputs(1)
    found = terms_of(LAD, step_of(LADSettings(), student, teacher))
    targets = assign_by_paa(teacher, ANCHORS, TRUTH)
    assert not torch.equal(targets.matched, assign_by_paa(student, ANCHORS, TRUTH).matched)
    assert found == paa_losses(student, targets, ANCHORS, weighted=False)


def test_a_teacher_like_the_student_assigns_as_paa():
    student = outputs(0)
    paa = terms_of(PAA, step_of(PAASettings(), student))
    for found in (terms_of(LAD, step_of(LADSettings(), student, student)),
                  {name.removesuffix("_student"): loss for name, loss in terms_of(COLAD, step_of(
                      CoLADSettings(), {"student": student, "peer": student})).items()}):
        assert found["cls"] == paa["cls"] and found["iou"] == paa["iou"] and found["box"] != paa["box"]


def test_both_networks_of_colad_learn_and_empty_images_train_on():
    networks = {"student": outputs(0, requires_grad=True), "peer": outputs(1, requires_grad=True)}
    for truth in (TRUTH, NOTHING):
        terms = terms_of(COLAD, step_of(CoLADSettings(), networks, truth=truth))
        weights = COLAD.weights(CoLADSettings(), C)
        sum(weights[name] * loss for name, loss in terms.items()).backward()
        for network in networks.values():
            assert network.logits.grad.any() and network.deltas.grad.isfinite().all()
            assert network.deltas.grad.any() == (truth is TRUTH) == network.iou_logits.grad.any()
            network.logits.grad = network.deltas.grad = network.iou_logits.grad = None


# ---- what fits -------------------------------------------------------------------------------------------------------


def checkpoint(path, architecture, classes=3):
    network = Detector(classes, architecture)
    torch.save({"model": network.state_dict(), "description": {
        "stage": "paa", "classes": list("abcdef")[:classes], "model": describe_model(architecture), "epoch": 1,
        "preprocessing": {"short": 64, "long": 64, "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}}},
        path)
    return str(path)


STUDENT = Architecture(18, 64, 1, head="paa")


@pytest.mark.parametrize(("architecture", "classes", "settings", "words"), [
    (Architecture(18, 64, 1), 3, {}, "head: 'gfl' in the teacher"),
    (STUDENT, 2, {}, "the number of classes"),
    (replace(STUDENT, auxiliary="cop"), 3, {"distill": "soft-label"}, "has nothing to learn by soft-label"),
])
def test_a_teacher_that_does_not_fit_is_named(tmp_path, architecture, classes, settings, words):
    path = checkpoint(tmp_path / "teacher.pt", architecture, classes)
    student = {"classes": list("abc"), "model": describe_model(STUDENT)}
    with pytest.raises(UserError, match=words):
        LAD.load_teacher(LADSettings(teacher=path, **settings), student, torch.device("cpu"), "fp32")


def test_a_teacher_of_another_size_and_kind_fits(tmp_path):
    path = checkpoint(tmp_path / "teacher.pt", Architecture(18, 96, 0, head="paa", auxiliary="cop"))
    student = {"classes": list("abc"), "model": describe_model(STUDENT)}
    teacher = LAD.load_teacher(LADSettings(teacher=path), student, torch.device("cpu"), "fp32")
    with torch.no_grad():
        answered = teacher(torch.rand(3, 3, 64, 64))
    for distill in ("lad", "solad"):
        found = terms_of(LAD, step_of(LADSettings(distill=distill), outputs(0), answered))
        assert all(loss.isfinite() for loss in found.values()) and "kd_iou" not in found


@pytest.mark.parametrize(("architecture", "classes"), [(Architecture(18, 64, 1), 3), (STUDENT, 2)])
def test_a_peer_that_does_not_fit_is_named(tmp_path, architecture, classes):
    path = checkpoint(tmp_path / "peer.pt", architecture, classes)
    words = "peer.pt: a (gfl|paa) detector of [23] classes with anchors of size 1; expected paa, 3 and 1"
    with pytest.raises(UserError, match=words):
        colad.companions(3, CoLADSettings(init_peer=path))


def test_a_peer_starts_from_its_checkpoint(tmp_path, capsys):
    path = checkpoint(tmp_path / "peer.pt", replace(STUDENT, auxiliary="iop"))
    peer = colad.companions(3, CoLADSettings(init_peer=path))["peer"]
    assert peer.architecture.auxiliary == "iop" and "initialised: the peer, ResNet-18" in capsys.readouterr().out
    saved = torch.load(path, weights_only=True)["model"]
    assert all(torch.equal(value, saved[name]) for name, value in peer.state_dict().items())
    assert not peer.backbone.conv1.weight.requires_grad  # trained weights are fine-tuned the published way


def test_settings_without_effect_are_said():
    assert not list(LAD.notes(LADSettings(distill="solad", lambda_kd_iou=1.0), C, 2))
    (note,) = LAD.notes(LADSettings(lambda_kd_iou=1.0), C, 2)
    assert note == "--lambda-kd-iou has no effect with --distill lad"
