"""PAA's assignment and losses, against loops over images, objects, levels and anchors; its head."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_iou, generalized_box_iou

from detection.assigners.paa import assign_by_paa, assign_by_paa_of_two, prefers_peer
from detection.assigners.targets import ground_truth
from detection.geometry.anchors import make_anchors, valid_anchors
from detection.geometry.deltas import encode
from detection.losses.paa import paa_losses
from detection.network.detector import Architecture, Detector
from detection.network.paa_head import (
    AUXILIARIES,
    COP_PADDINGS,
    DELTA_STDS,
    Outputs,
    conditional_objectness,
    implicit_objectness,
)

SIZES = ((16, 16), (8, 8), (4, 4), (2, 2), (1, 1))  # of 128 x 128
ANCHORS = make_anchors(SIZES)
A, C = 341, 4
IMAGE_SIZES = [(128, 128), (128, 128), (64, 128)]  # half of the third is padding
COUNTS = [6, 0, 3]


def scene(seed=0, counts=COUNTS):
    generator = torch.Generator().manual_seed(seed)
    sides = 8 + 80 * torch.rand(sum(counts), 2, generator=generator)
    corners = torch.rand(sum(counts), 2, generator=generator) * (torch.tensor([127, 63]) - sides).clamp(min=0)
    boxes = torch.cat([corners, (corners + sides).minimum(torch.tensor([128.0, 64]))], dim=1)
    labels = torch.randint(0, C, (sum(counts),), generator=generator)
    return ground_truth(boxes, labels, counts, IMAGE_SIZES, C)


def random_outputs(seed=1, iou=True, probabilities=False, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    logits, deltas, ious = (scale * torch.randn(3, A, size, generator=generator)
                            for size, scale in ((C, 1), (4, 2), (1, 1)))
    parts = [part.requires_grad_(requires_grad) for part in (logits - 2, deltas, ious.squeeze(2))]
    return Outputs(parts[0], parts[1], [], parts[2] if iou else None,
                   0.9 * parts[0].sigmoid() if probabilities else None)


# ---- slow references -------------------------------------------------------------------------------------------------


def focal(p, label):
    """Of one anchor's scores p [C]."""
    return sum(-0.25 * (1 - q)**2 * math.log(q) if c == label else -0.75 * q**2 * math.log(1 - q)
               for c, q in enumerate(p))


def class_scores(outputs, image, anchor):
    return outputs.class_scores[image, anchor].tolist()


def cost(outputs, image, anchor, box, label):
    decoded = outputs.boxes(ANCHORS)[image, anchor]
    return (focal(class_scores(outputs, image, anchor), label)
            + 1.3 * (1 - generalized_box_iou(decoded[None].double(), box[None].double()).item()))


def cheap_of(costs):
    """Which of ascending costs are positive, by EM in plain numbers."""
    if len(costs) < 2:
        return []
    pi, mu, v, before = [.5, .5], [costs[0], costs[-1]], [1.0, 1.0], -math.inf

    def joint(x):
        return [math.log(pi[k]) - (math.log(2 * math.pi * v[k]) + (x - mu[k])**2 / v[k]) / 2 for k in (0, 1)]

    def density(x):
        first, second = joint(x)
        return max(first, second) + math.log1p(math.exp(-abs(first - second)))

    for _ in range(100):
        likelihood = sum(map(density, costs)) / len(costs)
        shares = [[math.exp(joint(x)[k] - density(x)) for x in costs] for k in (0, 1)]
        for k in (0, 1):
            total = sum(shares[k])
            mu[k] = sum(share * x for share, x in zip(shares[k], costs, strict=True)) / total
            v[k] = sum(share * (x - mu[k])**2 for share, x in zip(shares[k], costs, strict=True)) / total + 1e-6
            pi[k] = total / len(costs)
        if abs(likelihood - before) < 1e-3:
            break
        before = likelihood
    cheap = [number for number, x in enumerate(costs) if joint(x)[0] >= joint(x)[1]]
    best = max(cheap, key=lambda number: density(costs[number]), default=-1)
    return [number for number in cheap if number <= best]


def slow_assignment(truth, cost_of):
    """matched (N, A), object by object. cost_of(number, level, anchors) -> their costs."""
    valid = valid_anchors(ANCHORS, truth.image_sizes)
    matched = torch.full((3, A), -1)
    overlaps = box_iou(truth.boxes, ANCHORS.boxes) * valid[truth.image_of]
    potential = torch.full((3, A), -1)
    for image in range(3):
        own = (truth.image_of == image).nonzero().flatten().tolist()
        for anchor in range(A) if own else ():
            best = max(own, key=lambda number, anchor=anchor: overlaps[number, anchor].item())
            if overlaps[best, anchor] >= 0.1:
                potential[image, anchor] = best
        for number in own:
            potential[image, (overlaps[number] == overlaps[number].max()) & (overlaps[number] > 0)] = number
    for number, image in enumerate(truth.image_of.tolist()):
        candidates = []
        for level in range(5):
            anchors = ((potential[image] == number) & (ANCHORS.levels == level)).nonzero().flatten().tolist()
            costs = cost_of(number, image, anchors) if anchors else []
            candidates += sorted(zip(costs, anchors, strict=True))[:9]
        candidates.sort()
        for place in cheap_of([cost for cost, _ in candidates]):
            matched[image, candidates[place][1]] = number
    return matched


# ---- assignment ------------------------------------------------------------------------------------------------------


def costs_of(outputs, truth):
    return lambda number, image, anchors: [
        cost(outputs, image, anchor, truth.boxes[number], truth.labels[number].item()) for anchor in anchors]


@pytest.mark.parametrize(("seed", "probabilities"), [(0, False), (1, True)])
def test_the_assignment_is_the_loop_over_objects_levels_and_anchors(seed, probabilities):
    truth, outputs = scene(seed), random_outputs(seed, probabilities=probabilities)
    expected = slow_assignment(truth, costs_of(outputs, truth))
    targets = assign_by_paa(outputs, ANCHORS, truth)
    assert torch.equal(targets.matched, expected) and (expected >= 0).sum() > 20
    assert torch.equal(targets.labels == C, expected < 0)
    assert not targets.positive[2, ~targets.valid[2]].any()


def test_the_objects_of_other_images_change_nothing():
    truth, outputs = scene(), random_outputs()
    first = ground_truth(truth.boxes[:6], truth.labels[:6], [6, 0, 0], IMAGE_SIZES, C)
    assert torch.equal(assign_by_paa(outputs, ANCHORS, first).matched[0],
                       assign_by_paa(outputs, ANCHORS, truth).matched[0])


def test_no_object_at_all_is_background():
    targets = assign_by_paa(random_outputs(), ANCHORS, scene(counts=[0, 0, 0]))
    assert not targets.positive.any() and (targets.labels == C).all()


# ---- CoLAD -----------------------------------------------------------------------------------------------------------


def test_the_costs_that_tell_anchors_better_apart_decide():
    ours, peers = [1, 1.2, 1.1, 3, 5], [.5, 1.5, 2.5, 2, 6]
    groups = torch.tensor([1, 1, 1, 2, 0])
    for scale in (1, 10):
        found = prefers_peer(torch.tensor(ours), scale * torch.tensor(peers), groups, 3)
        assert found.tolist() == [False, True, scale == 1]
    same = prefers_peer(torch.tensor(ours), torch.tensor(ours), groups, 3)
    assert same.tolist() == [False, True, False]  # ties are the peer's, but of a single anchor


def test_two_equal_networks_assign_as_one():
    truth, outputs = scene(), random_outputs()
    assert torch.equal(assign_by_paa_of_two(outputs, outputs, ANCHORS, truth).matched,
                       assign_by_paa(outputs, ANCHORS, truth).matched)


def test_two_networks_decide_by_object_and_level():
    truth, first, second = scene(3), random_outputs(3), random_outputs(4)

    def mixed(number, image, anchors):
        own, peers = (torch.tensor(costs_of(outputs, truth)(number, image, anchors)) for outputs in (first, second))
        if len(anchors) == 1:
            return (peers if peers < own else own).tolist()
        return (peers if peers.std() / peers.mean() >= own.std() / own.mean() else own).tolist()

    expected = slow_assignment(truth, mixed)
    found = assign_by_paa_of_two(first, second, ANCHORS, truth).matched
    assert torch.equal(found, expected)
    assert not torch.equal(found, assign_by_paa(first, ANCHORS, truth).matched)
    assert not torch.equal(found, assign_by_paa(second, ANCHORS, truth).matched)


# ---- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("iou", "probabilities", "weighted"), [(True, False, True), (True, True, False),
                                                              (False, True, False)])
def test_losses_are_loops_over_anchors(iou, probabilities, weighted):
    truth, outputs = scene(), random_outputs(iou=iou, probabilities=probabilities)
    targets = assign_by_paa(outputs, ANCHORS, truth)
    found = paa_losses(outputs, targets, ANCHORS, weighted)
    boxes = outputs.boxes(ANCHORS)
    classes, box, weights, errors, count = 0, 0, 0, 0, 0
    for image in range(3):
        for anchor in range(A):
            if targets.valid[image, anchor]:
                classes += focal(class_scores(outputs, image, anchor), targets.labels[image, anchor].item())
            number = targets.matched[image, anchor].item()
            if number < 0:
                continue
            pair = boxes[image, anchor][None], truth.boxes[number][None]
            overlap = box_iou(*pair).item()
            weight = overlap if weighted else 1
            count, weights = count + 1, weights + weight
            box += weight * (1 - generalized_box_iou(*pair).item())
            if iou:
                errors += F.binary_cross_entropy(outputs.iou_logits[image, anchor].sigmoid(),
                                                 torch.tensor(overlap)).item()
    expected = {"cls": classes / max(count, 3), "box": box / weights, **({"iou": errors / count} if iou else {})}
    assert {name: loss.item() for name, loss in found.items()} == pytest.approx(expected, rel=1e-4)


def test_without_objects_only_the_classes_learn():
    outputs = random_outputs(requires_grad=True)
    found = paa_losses(outputs, assign_by_paa(outputs, ANCHORS, scene(counts=[0, 0, 0])), ANCHORS, True)
    assert found["box"] == found["iou"] == 0 and found["cls"] > 0
    sum(found.values()).backward()
    assert outputs.deltas.grad.abs().sum() == outputs.iou_logits.grad.abs().sum() == 0
    assert outputs.logits.grad.isfinite().all()


def test_no_gradient_passes_through_the_iou():
    outputs = random_outputs(requires_grad=True)
    targets = assign_by_paa(outputs, ANCHORS, scene())
    paa_losses(outputs, targets, ANCHORS, True)["iou"].backward()
    assert outputs.deltas.grad is None and outputs.iou_logits.grad.abs().sum() > 0


# ---- the head --------------------------------------------------------------------------------------------------------


def test_implicit_objectness():
    zeros = torch.zeros(1, 1, 2, 2)
    bias = torch.full_like(zeros, -math.log((1 - 1e-4) / 1e-4))
    assert torch.allclose(implicit_objectness(torch.zeros(1, 3, 2, 2), zeros, bias), torch.tensor(.24995))
    assert not implicit_objectness(torch.full((1, 3, 2, 2), -20.0), zeros, bias).any()


@pytest.mark.parametrize(("padding", "edge", "corner"), [("prob0", .003333, .002222), ("logit0", .086667, .141111)])
def test_conditional_objectness_at_the_border(padding, edge, corner):
    found = conditional_objectness(torch.full((1, 2, 4, 5), -4.59512), torch.zeros(1, 9, 4, 5), COP_PADDINGS[padding])
    assert found.shape == (1, 2, 4, 5)
    for place, expected in (((1, 1), .005), ((0, 2), edge), ((0, 0), corner)):
        assert found[0, 1][place].item() == pytest.approx(expected, abs=1e-6)


def test_conditional_objectness_is_the_unfolded_product():
    generator = torch.Generator().manual_seed(0)
    logits, coefficients = (torch.randn(2, size, 4, 6, generator=generator) for size in (3, 9))
    neighbours = F.unfold(logits.sigmoid(), 3, padding=1).view(2, 3, 9, 4, 6)
    expected = (neighbours * coefficients.sigmoid()[:, None]).mean(dim=2)
    assert torch.allclose(conditional_objectness(logits, coefficients), expected, atol=1e-6)


@pytest.mark.parametrize("auxiliary", AUXILIARIES)
def test_the_heads_predict_what_they_are_named_for(auxiliary):
    torch.manual_seed(0)
    network = Detector(C, Architecture(18, 64, 1, head="paa", auxiliary=auxiliary)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = network(torch.rand(2, 3, 64, 96))
    count = sum(height * width for height, width in outputs.sizes)
    assert outputs.logits.shape == outputs.scores.shape == (2, count, C) and outputs.deltas.shape == (2, count, 4)
    assert (outputs.iou_logits is None) == ("iou" not in auxiliary)
    assert (outputs.probabilities is None) == (auxiliary == "iou")
    start = {"iou": (.01 * .5) ** .5, "iou+iop": (.0099 * .25) ** .5, "iop": .0099 * .5, "cop": .005}
    inside = outputs.scores[0, :96].view(8, 12, C)[2:6, 2:10].mean().item()
    assert inside == pytest.approx(start.get(auxiliary, (.005 * .5) ** .5), rel=0.1)
    for part in (outputs.logits, outputs.deltas, outputs.iou_logits, outputs.probabilities):
        assert part is None or part.dtype == torch.float32
    anchors = make_anchors(outputs.sizes)
    exact = replace(outputs, deltas=encode(anchors.boxes, anchors.boxes + 3, stds=DELTA_STDS).expand(2, -1, -1))
    assert torch.allclose(exact.boxes(anchors)[1], anchors.boxes + 3, atol=1e-3)
    unused = [name for name, parameter in network.head.named_parameters() if not parameter.requires_grad]
    sum(loss.sum() for loss in (outputs.logits, outputs.deltas, *(
        part for part in (outputs.iou_logits, outputs.probabilities) if part is not None))).backward()
    unused += [name for name, parameter in network.head.named_parameters() if parameter.grad is None]
    assert not unused
