"""Probabilistic anchor assignment (PAA, Kim and Lee, ECCV 2020): the losses that anchors have now decide which of them
are positive. Whose losses is up to the caller: in LAD (Nguyen et al., WACV 2022) they are the teacher's, in CoLAD those
of two networks.

Potential positives are K pairs of an anchor and the one object that it could be positive for."""

from dataclasses import dataclass

import torch

from detection.assigners.max_iou import max_iou
from detection.assigners.mixture import two_gaussians
from detection.assigners.targets import GroundTruth, Targets, targets_of_matches
from detection.geometry.anchors import Anchors, valid_anchors
from detection.geometry.boxes import giou
from detection.losses.paa import BOX_WEIGHT, class_losses
from detection.network.paa_head import Outputs

THRESHOLD = 0.1  # the least IoU of a potential positive with its object, but for an object that has none
CANDIDATES = 9  # potential positives of an object on each level that the mixture is fitted to


@dataclass(frozen=True)
class PotentialPositives:
    """The potential positives of a batch, and where they are."""

    images: torch.Tensor  # (K,) int64
    anchors: torch.Tensor  # (K,) int64 index of the anchor
    objects: torch.Tensor  # (K,) int64 index of the object among the T
    groups: torch.Tensor  # (K,) int64 number of the pair of object and level: objects * levels + level
    valid: torch.Tensor  # (N, A) bool: whether the anchor lies on its image


@torch.no_grad()
def assign_by_paa(outputs: Outputs, anchors: Anchors, truth: GroundTruth, lone_candidate: bool = False) -> Targets:
    """The Targets of a batch by the costs that the anchors have for the network with these `outputs`.

    lone_candidate: an object with a single candidate has it as its positive; else it has none, as in the released code
    of LAD."""
    potential = potential_positives(anchors, truth)
    return assign_by_costs(costs_of(outputs, potential, anchors, truth), potential, anchors, truth, lone_candidate)


@torch.no_grad()
def assign_by_paa_of_two(outputs: Outputs, peer: Outputs, anchors: Anchors, truth: GroundTruth,
                         lone_candidate: bool = False) -> Targets:
    """The Targets of a batch by the costs of two networks (CoLAD): of each object and level those of the network that
    `prefers_peer` decides for."""
    potential = potential_positives(anchors, truth)
    costs, costs_of_peer = (costs_of(each, potential, anchors, truth) for each in (outputs, peer))
    of_peer = prefers_peer(costs, costs_of_peer, potential.groups, len(truth.boxes) * len(anchors.sizes))
    costs = torch.where(of_peer[potential.groups], costs_of_peer, costs)
    return assign_by_costs(costs, potential, anchors, truth, lone_candidate)


def potential_positives(anchors: Anchors, truth: GroundTruth) -> PotentialPositives:
    """Step 1: the anchors with an IoU of at least THRESHOLD with an object, and of each object the best ones."""
    valid = valid_anchors(anchors, truth.image_sizes)
    matched = max_iou(anchors.boxes, truth.boxes, truth.image_of, valid, THRESHOLD, THRESHOLD)
    images, numbers = (matched >= 0).nonzero(as_tuple=True)
    objects = matched[images, numbers]
    return PotentialPositives(images, numbers, objects, objects * len(anchors.sizes) + anchors.levels[numbers], valid)


def costs_of(outputs: Outputs, potential: PotentialPositives, anchors: Anchors, truth: GroundTruth) -> torch.Tensor:
    """Step 2 (PAA, eq. 7): the cost (K,) of each potential positive, its focal loss + 1.3 times its GIoU loss."""
    place = potential.images, potential.anchors
    boxes, wanted = outputs.boxes_of(anchors, *place), truth.boxes[potential.objects]
    return class_losses(outputs, truth.labels[potential.objects], place) + BOX_WEIGHT * (1 - giou(boxes, wanted))


def assign_by_costs(costs: torch.Tensor, potential: PotentialPositives, anchors: Anchors, truth: GroundTruth,
                    lone_candidate: bool) -> Targets:
    """Steps 3 to 5: the Targets of a batch. costs: (K,) of the potential positives."""
    chosen = choose(costs, potential, len(truth.boxes), len(anchors.sizes), lone_candidate)  # (K,)
    matched = torch.full(potential.valid.shape, -1, device=costs.device)
    matched[potential.images, potential.anchors] = potential.objects.masked_fill(~chosen, -1)
    return targets_of_matches(matched, potential.valid, truth.boxes.new_full((len(truth.boxes),), THRESHOLD), truth)


def choose(costs: torch.Tensor, potential: PotentialPositives, count: int, levels: int,
           lone_candidate: bool) -> torch.Tensor:
    """Which of the potential positives are positive, (K,) bool. costs: (K,). count: of the objects.

    The candidates of an object are the CANDIDATES cheapest of each level, in one row in order of their costs."""
    candidates = (ranks(costs, potential.groups, count * levels) < CANDIDATES).nonzero().squeeze(1)
    objects, costs_of_candidates = potential.objects[candidates], costs[candidates]
    columns = ranks(costs_of_candidates, objects, count)
    rows = torch.full((count, levels * CANDIDATES), torch.inf, dtype=costs.dtype, device=costs.device)
    rows[objects, columns] = costs_of_candidates
    taken = torch.zeros_like(rows, dtype=torch.bool)
    taken[objects, columns] = True
    chosen = torch.zeros_like(costs, dtype=torch.bool)
    chosen[candidates] = cheap_ones(rows, taken, lone_candidate)[objects, columns]
    return chosen


def cheap_ones(costs: torch.Tensor, taken: torch.Tensor, lone_candidate: bool) -> torch.Tensor:
    """Which candidates of each object are positive, (T, n) bool: those of the cheap component up to the one of the
    highest density (PAA, figure 3c). costs: (T, n), in ascending order. taken: (T, n) bool, which there are."""
    if costs.device.type == "mps":  # it has no float64
        return cheap_ones(costs.cpu(), taken.cpu(), lone_candidate).to(costs.device)
    cheap, density = two_gaussians(costs, taken)
    cheap &= taken
    density = density.masked_fill(~cheap, -torch.inf)
    is_densest = cheap & (density == density.amax(dim=1, keepdim=True))
    columns = torch.arange(costs.shape[1], device=costs.device)
    last = columns.masked_fill(~is_densest, costs.shape[1]).amin(dim=1, keepdim=True)  # of equal densities the first
    several = taken.sum(dim=1, keepdim=True) > 1
    return torch.where(several, cheap & (columns <= last), taken & lone_candidate)


def ranks(values: torch.Tensor, groups: torch.Tensor, count: int) -> torch.Tensor:
    """How many of its group come before each value in ascending order, (K,) int64; equal values keep their order.
    groups: (K,) int64 in 0..count - 1."""
    order = values.argsort(stable=True)
    order = order[groups[order].argsort(stable=True)]
    sizes = torch.zeros(count, dtype=torch.int64, device=values.device)
    sizes.index_add_(0, groups, torch.ones_like(groups))
    starts = sizes.cumsum(0) - sizes
    found = torch.empty_like(order)
    found[order] = torch.arange(len(order), device=order.device) - starts[groups[order]]
    return found


# ---- CoLAD -----------------------------------------------------------------------------------------------------------


def prefers_peer(costs: torch.Tensor, costs_of_peer: torch.Tensor, groups: torch.Tensor, count: int) -> torch.Tensor:
    """CoLAD's criterion Std/Mean: of which groups the peer's costs decide, (count,) bool.

    costs, costs_of_peer: (K,). groups: (K,) int64 in 0..count - 1, the pair of object and level of each. The peer
    decides where the deviation (of a sample) of its costs, relative to their mean, is at least as large: it tells the
    anchors of the group better apart. Of a single anchor, where its cost is lower."""
    sizes = group_sums(torch.ones_like(costs), groups, count)
    means, spreads = [], []
    for each in (costs, costs_of_peer):
        mean = group_sums(each, groups, count) / sizes.clamp(min=1)
        squares = group_sums((each - mean[groups])**2, groups, count)
        means.append(mean)
        spreads.append((squares / (sizes - 1).clamp(min=1)).sqrt() / mean)
    return torch.where(sizes > 1, spreads[1] >= spreads[0], means[1] < means[0])


def group_sums(values: torch.Tensor, groups: torch.Tensor, count: int) -> torch.Tensor:
    """(count,) sums of the values (K,) of each group."""
    return values.new_zeros(count).index_add_(0, groups, values)
