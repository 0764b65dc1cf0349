"""Non-maximum suppression: which of the many overlapping detections of an image remain. Ways with one signature:

    suppress(boxes, scores, labels, threshold=0.6, limit=100) -> boxes, scores, labels

boxes: (M, 4) xyxy in any one unit, of any size and sign. scores: (M,) in 0..1, above 0. labels: (M,) int64 classes.
Scores and boxes are worked on, and returned, in fp32. threshold: a box goes if its similarity to a remaining box of its
class with a higher score (of equal scores: one that comes first) is above `threshold`; boxes of different classes never
touch each other. limit: the most to return. Returns (K, 4), (K,) and (K,), K <= limit, in descending order of scores.

Classes are told apart by their labels. To shift the boxes of each class to a place of its own, as is often done, lets
classes overlap once an image is larger than the shift, and costs precision before that."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torchvision import ops

from common.runtime import UserError
from detection.geometry.boxes import centre_distance, iou, pairs

# Boxes compared at once: bounds the memory, and with a limit of 100 most blocks of this size are never looked at.
BLOCK = 256

# Of score voting: how similar a box must be to have a vote, in LD and in PAA, and how fast its weight falls with
# 1 - similarity, squared.
VOTING_THRESHOLD, VOTING_THRESHOLD_PAA = 0.7, 0.01
VOTING_WIDTH = 0.025


def nms(boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, threshold: float = 0.6,
        limit: int = 100) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Greedy NMS by IoU. Arguments and results: see the module."""
    if boxes.device.type != "cpu":
        return cluster_nms(boxes, scores, labels, threshold, limit)  # the same boxes, without a loop over the classes
    boxes, scores, labels = by_score(boxes, scores, labels)
    # torchvision compares an fp32 IoU with a double: an IoU of exactly 3/5, in fp32 0.60000002, would be above 0.6.
    threshold = torch.tensor(threshold, dtype=torch.float32).item()
    keep = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique():  # not ops.batched_nms: it shifts the boxes of each class, see the module
        own = (labels == label).nonzero().squeeze(1)
        keep[own[ops.nms(boxes[own], scores[own], threshold)]] = True
    kept = keep.nonzero().squeeze(1)[:limit]
    return boxes[kept], scores[kept], labels[kept]


def cluster_nms(boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, threshold: float = 0.6,
                limit: int = 100) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cluster-NMS by IoU (Zheng et al., Enhancing Geometric Factors, IEEE Trans. Cybernetics 2022): the boxes of `nms`,
    found with matrices instead of box after box. Arguments and results: see the module."""
    boxes, scores, labels = by_score(boxes, scores, labels)
    kept = greedy(iou, boxes, labels, threshold, limit)
    return boxes[kept], scores[kept], labels[kept]


def score_voting_cluster_diou_nms(boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor,
                                  threshold: float = 0.6,
                                  limit: int = 100) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cluster-NMS by S = IoU - (rho^2 / c^2)^0.8, then score voting, as Localization Distillation is tested (Zheng et
    al., CVPR 2022; the voting is that of Kim and Lee, PAA, ECCV 2020). Arguments and results: see the module.

    The i-th remaining box becomes the mean of the boxes j of its class with S_ij > 0.7, itself and those after it in
    the order of scores, suppressed or not, weighted by exp(-(1 - S_ij)^2 / 0.025) * score_j. Scores do not change.

    The original also counts every other box j after i, with a weight of exp(-40) * score_j = 4e-18 * score_j. As
    score_j is at most score_i, the weight of the box itself, 10^4 boxes in an image of 4000 pixels would move a side by
    less than 2e-10 pixels: nothing in fp32."""
    boxes, scores, labels = by_score(boxes, scores, labels)
    kept = greedy(distance_penalised_iou, boxes, labels, threshold, limit)
    voted = _vote(distance_penalised_iou, boxes, scores, labels, kept, VOTING_THRESHOLD, below_only=True)
    return voted, scores[kept], labels[kept]


def score_voting_nms(boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, threshold: float = 0.6,
                     limit: int = 100) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cluster-NMS by IoU, the boxes of `nms`, then score voting as PAA is tested (Kim and Lee, ECCV 2020): each
    remaining box i becomes the mean of all boxes j of its class with IoU_ij > 0.01, of higher scores too, weighted by
    exp(-(1 - IoU_ij)^2 / 0.025) * score_j. Scores do not change. Arguments and results: see the module."""
    boxes, scores, labels = by_score(boxes, scores, labels)
    kept = greedy(iou, boxes, labels, threshold, limit)
    return _vote(iou, boxes, scores, labels, kept, VOTING_THRESHOLD_PAA), scores[kept], labels[kept]


SUPPRESSIONS = {"nms": nms, "cluster": cluster_nms, "cluster-diou-voting": score_voting_cluster_diou_nms,
                "nms-voting": score_voting_nms}


@dataclass(frozen=True)
class Selection:
    """Which of a detector's boxes are its detections of an image. The defaults are the published ones of GFL."""

    candidates: int = 1000  # of each level, by their highest class score
    least_score: float = 0.05
    overlap: float = 0.6  # IoU above which the higher-scoring of two boxes of a class suppresses the other
    most: int = 100
    suppressions: Mapping[str, Callable[..., tuple[torch.Tensor, ...]]] = field(default_factory=lambda: SUPPRESSIONS)

    def named(self, name: str) -> str:
        """The name of the suppression that `name` asks for: `auto` is the first, of the published results. Raises
        UserError for one that such boxes do not have."""
        if name != "auto" and name not in self.suppressions:
            raise UserError(f"--suppression {name}: not for this detector's boxes; expected "
                            f"{' or '.join(self.suppressions)}")
        return next(iter(self.suppressions)) if name == "auto" else name


PAA_SELECTION = Selection(suppressions={"nms-voting": score_voting_nms, **SUPPRESSIONS})


def distance_penalised_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """IoU - (rho^2 / c^2)^0.8, rho the distance of the centres, c the diagonal of the smallest box around both.

    a, b: (..., 4), broadcast against each other -> (...) in -1..1."""
    return iou(a, b) - centre_distance(a, b) ** 0.8


def by_score(boxes: torch.Tensor, scores: torch.Tensor,
             labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three in fp32 and descending order of the scores; equal scores stay in the order they came in."""
    scores, order = scores.float().sort(stable=True, descending=True)
    return boxes[order].float(), scores, labels[order]


def _similarity(measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], boxes: torch.Tensor,
                labels: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(R, C) similarities of the boxes numbered `rows` (R,) and `columns` (C,), 0 between different classes."""
    same = labels[rows, None] == labels[columns]
    return measure(*pairs(boxes[rows], boxes[columns])) * same


def greedy(measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], boxes: torch.Tensor, labels: torch.Tensor,
           threshold: float, limit: int) -> torch.Tensor:
    """The numbers (K,) of the first `limit` boxes that greedy NMS keeps; boxes are in descending order of the scores.

    Block after block: what the boxes kept so far suppress goes first, the rest of the block decides among itself. A
    box depends on those before it only, so this is the result of one matrix of all boxes; and it can end at `limit`."""
    kept = labels.new_empty(0)
    for block in torch.arange(len(boxes), device=boxes.device).split(BLOCK):
        if len(kept) >= limit:
            break
        suppressed = (_similarity(measure, boxes, labels, kept, block) > threshold).any(dim=0)
        free = block[~suppressed]
        above = (_similarity(measure, boxes, labels, free, free) > threshold).triu(1)
        kept = torch.cat([kept, free[_fixed_point(above)]])
    return kept[:limit]


def _fixed_point(above: torch.Tensor) -> torch.Tensor:
    """The iteration of Cluster-NMS: a box is kept if no kept box before it is too similar.

    above: (B, B) bool, [i, j] whether i, which comes before j, suppresses j if it is kept itself. Returns (B,) bool.
    After t steps the first t boxes are as in greedy NMS, so it ends after B + 1 steps at most, mostly after a few."""
    above = above.float()
    keep = above.new_ones(len(above))
    while True:
        previous, keep = keep, (keep @ above == 0).float()
        if torch.equal(previous, keep):
            return keep.bool()


def _vote(measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], boxes: torch.Tensor, scores: torch.Tensor,
          labels: torch.Tensor, kept: torch.Tensor, threshold: float, below_only: bool = False) -> torch.Tensor:
    """The boxes (K, 4) numbered `kept` (K,), moved by those more similar than `threshold`; boxes are in descending
    order of the scores. below_only: those before a box have no vote."""
    columns = torch.arange(len(boxes), device=boxes.device)
    voted = []
    for rows in kept.split(BLOCK):
        similarity = _similarity(measure, boxes, labels, rows, columns)  # (R, M)
        similarity[columns[:len(rows)], rows] = 1  # with itself, also where a box has no area
        votes = similarity > threshold
        if below_only:
            votes &= columns >= rows[:, None]
        weights = torch.exp(-((1 - similarity) ** 2) / VOTING_WIDTH) * scores * votes
        # In double precision: where fp32 products are allowed to be TF32, a side would move by half a pixel in 1000.
        weights = weights.double()
        voted.append((weights @ boxes.double() / weights.sum(dim=1, keepdim=True)).float())
    return torch.cat(voted)
