"""Rotated RetinaNet: deltas, head, assignment and losses, each against a slow reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import MultivariateNormal, kl_divergence

from detection.assigners.max_iou import IGNORED
from detection.assigners.targets import ground_truth
from detection.geometry.anchors import RETINA, make_anchors
from detection.geometry.boxes import iou, pairs
from detection.geometry.oriented import (
    circumscribed,
    corners,
    decode,
    encode,
    expected_deltas,
    regularise,
    rotated_iou,
    upright,
)
from detection.inference import detections, in_original
from detection.losses import rotated as losses
from detection.losses.rotated import BETA, gwd_loss, kld_loss, rotated_losses
from detection.methods.method import Step
from detection.methods.rotated import ROTATED, RotatedSettings, assign
from detection.network.detector import HEADS, Architecture, Detector
from detection.network.pyramid import FeaturePyramid
from detection.network.rotated_head import RotatedOutputs, RotatedRetinaHead

SIZES = ((8, 8), (4, 4), (2, 2), (1, 1), (1, 1))
A, C, R = 86 * 9, 3, 8
QUARTER = math.pi / 2
# Of images of 64 x 64, 64 x 64 and 64 x 32: on the third half of the anchors are not valid.
OBJECTS = [torch.tensor([[30.0, 32, 50, 20, 0.7], [45, 20, 14, 30, 1.5]]), torch.zeros(0, 5),
           torch.tensor([[16.0, 34, 12, 26, 0.3]])]
IMAGE_SIZES = [(64, 64), (64, 64), (64, 32)]


@pytest.fixture(scope="module")
def anchors():
    return make_anchors(SIZES, None, RETINA)


@pytest.fixture(scope="module")
def batch(anchors):
    """Outputs, leaves that ask for a gradient, and Targets."""
    return random_outputs(1), targets_of(anchors)


def targets_of(anchors, objects=OBJECTS, image_sizes=IMAGE_SIZES):
    labels = torch.cat([torch.arange(len(boxes)) % C for boxes in objects])
    truth = ground_truth(torch.cat(objects), labels, [len(boxes) for boxes in objects], image_sizes, C)
    return assign(Step(None, truth, anchors))


def random_outputs(seed, images=3, bins=R + 1):
    generator = torch.Generator().manual_seed(seed)
    logits, values = (torch.randn(images, A, *shape, generator=generator) for shape in ((C,), (5, bins)))
    features = [torch.zeros(1, 1, *size) for size in SIZES]
    return RotatedOutputs(logits.requires_grad_(), values.requires_grad_(), features)


def random_boxes(seed, count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(count, 5, generator=generator, dtype=dtype)
    return draws * torch.tensor([60.0, 60, 40, 40, 6]).to(dtype) + torch.tensor([0.0, 0, 3, 3, -3]).to(dtype)


# ---- deltas ----------------------------------------------------------------------------------------------------------


def test_the_expectation_over_the_bins():
    assert expected_deltas(torch.zeros(5, 9)).tolist() == pytest.approx([0, 0, 0, 0, -1.5], abs=1e-6)
    sure = torch.zeros(9, 5, 9) + 50 * torch.eye(9)[:, None]
    assert expected_deltas(sure)[:, 0].tolist() == pytest.approx([-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2], abs=1e-5)
    assert expected_deltas(sure)[:, 4].tolist() == pytest.approx([-5 + 0.875 * k for k in range(9)], abs=1e-5)
    logits = torch.randn(7, 5, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected_deltas(logits).sum().backward()
    assert logits.grad.sum(dim=-1).abs().max() < 1e-6 and logits.grad.abs().max() > 0.1
    deltas = torch.randn(7, 5, 1)
    assert torch.equal(expected_deltas(deltas), deltas[..., 0])


def test_deltas_of_a_box_by_hand():
    anchor = torch.tensor([10.0, 20, 30, 60])  # 20 x 40 around (20, 40)
    box = decode(anchor, torch.tensor([0.5, -0.25, math.log(2), -math.log(4), 0.3]))
    assert box.tolist() == pytest.approx([30, 30, 40, 10, 0.3], rel=1e-6)
    assert decode(anchor, torch.zeros(5)).tolist() == [20, 40, 20, 40, 0]
    far = decode(anchor, torch.tensor([0.0, 0, 9, -9, -7]))  # sides by 62.5 at most
    assert far.tolist() == pytest.approx([20, 40, 1250, 0.64, -7], rel=1e-4)


def test_decoding_is_the_inverse_of_encoding(anchors):
    near = anchors.boxes[:750].double()  # those of P7 are more than 62.5 times as large as some of the boxes
    boxes = random_boxes(1, 750)
    torch.testing.assert_close(decode(near, encode(near, boxes)), boxes)


def test_upright_boxes_forget_the_angle():
    assert upright(torch.tensor([10.0, 20, 8, 2, 1.1])).tolist() == [6, 19, 14, 21]


# ---- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reg_max", [8, 0])
def test_the_channels_of_the_head(reg_max):
    """Channel ((k * 5) + p) * (R + 1) + b is bin b of parameter p of anchor k, and k * C + c class c."""
    torch.manual_seed(0)
    head, bins = RotatedRetinaHead(C, 32, 1, reg_max), reg_max + 1
    pyramid = [torch.randn(2, 32, *size) for size in SIZES]
    outputs = head(pyramid)
    assert outputs.logits.shape == (2, A, C) and outputs.bins.shape == (2, A, 5, bins) and outputs.sizes == SIZES
    level, row, column, k = 1, 2, 1, 5
    tower = {name: F.relu(F.conv2d(pyramid[level], *convolution, padding=1)) for name, convolution in (
        (name, (getattr(head, name)[0][0].weight, getattr(head, name)[0][0].bias))
        for name in ("class_tower", "box_tower"))}
    scores = F.conv2d(tower["class_tower"], head.classify.weight, head.classify.bias, padding=1)[1, :, row, column]
    values = F.conv2d(tower["box_tower"], head.regress.weight, head.regress.bias, padding=1)[1, :, row, column]
    place = 9 * (8 * 8 + row * 4 + column) + k
    torch.testing.assert_close(outputs.logits[1, place], scores[k * C:(k + 1) * C])
    torch.testing.assert_close(outputs.bins[1, place], values[k * 5 * bins:(k + 1) * 5 * bins].view(5, bins))
    assert torch.allclose(outputs.scores, torch.tensor(0.01), atol=5e-3)


def test_the_published_detector():
    with torch.device("meta"):
        network = Detector(15, Architecture(18, reg_max=8, head="rotated"))
        outputs = network(torch.zeros(1, 3, 1024, 1024))
    assert network.head.regress.out_channels == 405 and network.head.classify.out_channels == 135
    assert outputs.bins.shape == (1, 9 * 21824, 5, 9) and outputs.logits.shape == (1, 9 * 21824, 15)
    assert network.neck.extra[0].in_channels == 512 and len(network.head.box_tower) == 4
    assert not any(isinstance(module, torch.nn.GroupNorm) for module in network.head.modules())
    settings = RotatedSettings(depth=18)
    assert ROTATED.architecture(settings) == network.architecture and settings.box_loss == "gwd"


def test_p6_is_made_of_c5():
    torch.manual_seed(0)
    neck, maps = FeaturePyramid((8, 16, 24), 32, p6_of_c5=True), [torch.randn(1, 8 * 2**i, 8 >> i, 8 >> i)
                                                                   for i in range(2)]
    maps.append(torch.randn(1, 24, 2, 2))
    *_, p6, p7 = neck(maps)
    torch.testing.assert_close(p6, F.conv2d(maps[2], neck.extra[0].weight, neck.extra[0].bias, 2, 1))
    torch.testing.assert_close(p7, F.conv2d(p6, neck.extra[1].weight, neck.extra[1].bias, 2, 1))


# ---- assignment ------------------------------------------------------------------------------------------------------


def test_anchors_are_assigned_by_the_horizontal_boxes_around_the_objects(anchors):
    targets, number = targets_of(anchors), 0
    for image, objects in enumerate(OBJECTS):
        overlaps = iou(*pairs(circumscribed(objects), anchors.boxes)).tolist()
        largest = [max(own[a] for a in range(A) if targets.valid[image, a]) for own in overlaps]
        for a in range(A):
            own = [row[a] for row in overlaps] if targets.valid[image, a] else []
            expected = -1
            if own and max(own) >= 0.4:
                expected = number + own.index(max(own)) if max(own) >= 0.5 else IGNORED
            for g, overlap in enumerate(own):
                if overlap == largest[g] > 0:
                    expected = number + g
            assert targets.matched[image, a] == expected
            label = C if expected < 0 else (expected - number) % C
            assert targets.labels[image, a] == label
            if expected >= 0:
                assert torch.equal(targets.boxes[image, a], objects[expected - number])
        number += len(objects)
    assert (targets.matched == IGNORED).any() and targets.positive.sum() > 4


# ---- losses of Gaussians ---------------------------------------------------------------------------------------------


def covariance(box):
    _, _, w, h, theta = box.tolist()
    turn = torch.tensor([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]], dtype=torch.float64)
    return turn @ torch.diag(torch.tensor([w * w / 4, h * h / 4], dtype=torch.float64)) @ turn.T


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T


def slow_gwd(a, b):
    """By the roots of matrices, which is how the Wasserstein distance of Gaussians is defined."""
    p, t = covariance(a), covariance(b)
    squared = (a[:2] - b[:2]).square().sum() + (p + t - 2 * root(root(p) @ t @ root(p))).trace()
    return math.log1p(squared.clamp(min=0).sqrt() / (2 * (p.det() * t.det()) ** 0.125))


def slow_kld(a, b):
    gaussians = [MultivariateNormal(box[:2], covariance(box)) for box in (a, b)]
    return 1 - 1 / (1 + math.log1p(2 * kl_divergence(*gaussians)))


@pytest.mark.parametrize("loss, slow", [(gwd_loss, slow_gwd), (kld_loss, slow_kld)])
def test_the_losses_of_gaussians_against_their_definitions(loss, slow):
    a, b = random_boxes(2, 40), random_boxes(3, 40)
    b[:10] = a[:10] + 0.3 * random_boxes(4, 10)
    expected = torch.tensor([slow(*pair) for pair in zip(a, b, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(loss(a, b), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss(a.float(), b.float()), expected.float(), rtol=1e-3, atol=1e-3)


def test_golden_values_of_the_losses():
    boxes = torch.tensor([[0.0, 0, 2, 2, 0], [0, 0, 4, 2, 0], [0, 0, 4, 2, 0.3], [0, 0, 2, 2, 0.7]])
    others = torch.tensor([[2.0, 0, 2, 2, 0], [0, 0, 4, 2, QUARTER], [0, 0, 4, 2, 0.3], [0, 0, 2, 2, 0]])
    assert gwd_loss(boxes, others).tolist() == pytest.approx([math.log(2), 0.405465, 0, 0], abs=1e-3)
    assert kld_loss(boxes[:1], boxes[:1] + torch.tensor([1.0, 0, 0, 0, 0])).item() == pytest.approx(0.409384, abs=1e-6)
    assert kld_loss(boxes[2:3], others[2:3]).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("loss", [gwd_loss, kld_loss])
def test_a_rectangle_is_one_gaussian_however_it_is_described(loss):
    a, b = random_boxes(5, 30), random_boxes(6, 30)
    swapped = a[:, [0, 1, 3, 2, 4]] + torch.tensor([0, 0, 0, 0, QUARTER], dtype=torch.float64)
    for same in (a + torch.tensor([0, 0, 0, 0, math.pi], dtype=torch.float64), swapped, regularise(a)):
        torch.testing.assert_close(loss(same, b), loss(a, b))
        torch.testing.assert_close(loss(b, same), loss(b, a))
    scaled = torch.tensor([3, 3, 3, 3, 1], dtype=torch.float64)
    torch.testing.assert_close(loss(a * scaled, b * scaled), loss(a, b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [gwd_loss, kld_loss])
def test_gradients_are_finite_whatever_the_boxes(loss):
    boxes = torch.tensor([[5.0, 5, 10, 4, 0.5], [5, 5, 0, 0, 0], [5, 5, 1e-9, 60000, 1], [1e4, 5, 1e-9, 1e-9, 1],
                          [5, 5, 10, 4, 0.5], [0, 0, 60000, 60000, 0], [3, 3, 10, 10, 2]])
    targets = torch.tensor([[5.0, 5, 10, 4, 0.5], [5, 5, 0, 0, 0], [5, 5, 60000, 1e-9, 0], [0, 5, 2, 2, 1],
                            [5, 5, 10, 4, 0.5 + math.pi], [1e4, 1e4, 2, 2, 1], [3, 3, 10, 10, 1]])
    boxes.requires_grad_()
    values = loss(boxes, targets)
    values.sum().backward()
    assert values.isfinite().all() and (values >= 0).all() and boxes.grad.isfinite().all()
    assert values[[0, 4]].max() < 2e-3 and values[5] > 0.5


# ---- the losses of a batch -------------------------------------------------------------------------------------------


def slow_losses(outputs, targets, anchors, box_loss, box_norm):
    """Anchor by anchor."""
    classes, by_level = 0.0, [[] for _ in SIZES]
    for i in range(3):
        for a in range(A):
            if targets.valid[i, a] and targets.matched[i, a] != IGNORED:
                for c in range(C):
                    p = outputs.logits[i, a, c].sigmoid().item()
                    is_object = targets.labels[i, a] == c
                    classes += -0.25 * (1 - p) ** 2 * math.log(p) if is_object else -0.75 * p**2 * math.log(1 - p)
            if targets.matched[i, a] < 0:
                continue
            deltas, wanted = [], targets.boxes[i, a]
            for p in range(5):
                shares = [math.exp(z) for z in outputs.bins[i, a, p].tolist()]
                low, high = (-5, 2) if p == 4 else (-2, 2)
                places = [low + (high - low) * k / R for k in range(R + 1)]
                deltas.append(sum(s * place for s, place in zip(shares, places, strict=True)) / sum(shares))
            x1, y1, x2, y2 = anchors.boxes[a].tolist()
            w, h = x2 - x1, y2 - y1
            box = torch.tensor([(x1 + x2) / 2 + w * deltas[0], (y1 + y2) / 2 + h * deltas[1], w * math.exp(deltas[2]),
                                h * math.exp(deltas[3]), deltas[4]], dtype=torch.float64)
            if box_loss == "smooth_l1":
                goal = [(wanted[0] - (x1 + x2) / 2) / w, (wanted[1] - (y1 + y2) / 2) / h, math.log(wanted[2] / w),
                        math.log(wanted[3] / h), wanted[4]]
                apart = [abs(d - float(g)) for d, g in zip(deltas, goal, strict=True)]
                value = sum(0.5 * x * x / BETA if x < BETA else x - BETA / 2 for x in apart)
            else:
                value = (slow_gwd if box_loss == "gwd" else slow_kld)(box, wanted.double())
            by_level[anchors.levels[a]].append(float(value))
    positives = sum(max(int(targets.positive[i].sum()), 1) for i in range(3))
    boxes = (sum(map(sum, by_level)) / positives if box_norm == "positives" else
             sum(sum(level) / len(level) for level in by_level if level))
    return {"cls": classes / positives, "box": boxes}


@pytest.mark.parametrize("box_loss, box_norm", [("gwd", "positives"), ("kld", "level_mean"),
                                                ("smooth_l1", "positives")])
def test_the_losses_against_a_loop(batch, anchors, box_loss, box_norm):
    found = rotated_losses(*batch, anchors, box_loss, box_norm)
    expected = slow_losses(*batch, anchors, box_loss, box_norm)
    assert {name: loss.item() for name, loss in found.items()} == pytest.approx(expected, rel=1e-3)


def test_ignored_anchors_and_the_padding_cost_nothing(batch, anchors):
    outputs, targets = batch
    (gradient,) = torch.autograd.grad(rotated_losses(outputs, targets, anchors)["cls"], outputs.logits)
    out = ~targets.valid | (targets.matched == IGNORED)
    assert gradient[out].abs().max() == 0 and gradient[~out].abs().min() > 0


@pytest.mark.parametrize("box_loss", ["gwd", "smooth_l1"])
def test_two_processes_learn_what_one_learns_of_both_their_images(batch, anchors, monkeypatch, box_loss):
    """Their gradients are averaged."""
    outputs, targets = batch
    whole = rotated_losses(outputs, targets, anchors, box_loss)
    positives = targets.positive.sum(dim=1).clamp(min=1).sum().float()
    monkeypatch.setattr(losses, "mean_over_processes", lambda value: positives / 2)
    shares = []
    for own in ([0, 1], [2]):
        part = RotatedOutputs(outputs.logits[own], outputs.bins[own], outputs.features)
        of_part = targets_of(anchors, [OBJECTS[i] for i in own], [IMAGE_SIZES[i] for i in own])
        shares.append(rotated_losses(part, of_part, anchors, box_loss))
    for name, loss in whole.items():
        assert loss.item() == pytest.approx(sum(share[name].item() for share in shares) / 2, rel=1e-5)


def test_a_batch_without_objects_learns_that_there_are_none(anchors):
    outputs, targets = random_outputs(2), targets_of(anchors, [torch.zeros(0, 5)] * 3)
    found = rotated_losses(outputs, targets, anchors)
    sum(found.values()).backward()
    assert found["box"].item() == 0 and found["cls"].item() > 0 and outputs.bins.grad.abs().max() == 0
    with pytest.raises(ValueError, match="ciou"):
        rotated_losses(outputs, targets, anchors, "ciou")


@pytest.mark.parametrize("box_loss", ["gwd", "kld", "smooth_l1"])
def test_a_head_without_distributions_learns_boxes(anchors, box_loss):
    """Gradient descent on the deltas of the positives alone."""
    targets = targets_of(anchors)
    outputs = random_outputs(3, bins=1)
    outputs.bins.data *= 0.1
    optimizer = torch.optim.Adam([outputs.bins], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        rotated_losses(outputs, targets, anchors, box_loss)["box"].backward()
        optimizer.step()
    image, anchor = targets.positives
    assert rotated_iou(outputs.boxes(anchors)[image, anchor], targets.boxes[image, anchor]).min() > 0.9


# ---- detections ------------------------------------------------------------------------------------------------------


def test_boxes_in_the_original_image():
    boxes = torch.tensor([[20.0, 30, 8, 4, -5.0], [-3, 70, 8, 4, 0.5]])
    found = in_original(boxes, (60, 40), (0.5, 2.0))
    assert found[0].tolist() == pytest.approx([40, 15, 8, 4, 4 * QUARTER - 5], abs=1e-5)  # sides by sqrt(0.5 * 2)
    assert found[1].tolist() == pytest.approx([0, 30, 8, 4, 0.5], abs=1e-6)  # the centre is in the image
    around = corners(boxes[:1]).sum(dim=1)  # twice the sum of the centre's coordinates
    torch.testing.assert_close(corners(found[:1]).sum(dim=1), around / torch.tensor([0.5, 2.0]))


def test_detections_against_a_loop(anchors):
    outputs = random_outputs(4, images=1)
    outputs.logits.data -= 2
    (found,) = detections(outputs, anchors, [(64, 60)], [(0.5, 0.5)], HEADS["rotated"].selection)
    boxes = in_original(outputs.boxes(anchors)[0], (64, 60), (0.5, 0.5)).detach()
    scores, kept = outputs.scores[0].detach(), []
    order = sorted(((scores[a, c].item(), a, c) for a in range(A) for c in range(C)), reverse=True)
    for score, a, c in order[:150]:
        if score > 0.05 and all(c != label or rotated_iou(boxes[[a]], boxes[other]) <= 0.1 for _, other, label in kept):
            kept.append((score, a, c))
    assert 5 < len(kept) < len(found["scores"]) <= 2000
    assert found["scores"][:len(kept)].tolist() == pytest.approx([score for score, *_ in kept], rel=1e-6)
    assert torch.equal(found["boxes"][:len(kept)], boxes[[a for _, a, _ in kept]])
    assert found["labels"][:len(kept)].tolist() == [c for *_, c in kept]
