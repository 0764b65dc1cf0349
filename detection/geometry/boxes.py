"""Geometry of boxes: overlaps, and distances from a point to the sides of a box. Boxes are xyxy in any one unit; a
box's width is x2 - x1."""

import math
from collections.abc import Iterable

import torch

EPS = 1e-6  # the least denominator
PAIRS = 3 * 2**20  # overlaps held at once: 13 MB, and a comparison needs about ten such matrices


def areas(boxes: torch.Tensor) -> torch.Tensor:
    """(..., 4) boxes -> (...) areas."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def centres(boxes: torch.Tensor) -> torch.Tensor:
    """(..., 4) boxes -> (..., 2) centres."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def pairs(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(P, 4) and (G, 4) boxes, shaped so that the functions below compare each of `a` with each of `b`, (P, G)."""
    return a[:, None], b[None]


def in_chunks(count: int, *tensors: torch.Tensor) -> Iterable[tuple[torch.Tensor, ...]]:
    """The same few rows of each tensor, (T, ...) -> (G, ...), one after the other; nothing for none. count: how many
    boxes each row is compared with."""
    rows = max(1, PAIRS // count)
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True) if len(tensors[0]) else ()


def intersection(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Area that two boxes share. a, b: (..., 4), broadcast against each other."""
    width = torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0])
    height = torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1])
    return width.clamp(min=0) * height.clamp(min=0)


def iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union. a, b: (..., 4), broadcast against each other -> (...) in 0..1."""
    shared = intersection(a, b)
    return shared / (areas(a) + areas(b) - shared).clamp(min=EPS)


def iof(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over foreground: the part of the area of `a` that lies in `b`, in 0..1."""
    return intersection(a, b) / areas(a).clamp(min=EPS)


def _enclosing(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Width and height of the smallest box around two boxes."""
    width = torch.maximum(a[..., 2], b[..., 2]) - torch.minimum(a[..., 0], b[..., 0])
    height = torch.maximum(a[..., 3], b[..., 3]) - torch.minimum(a[..., 1], b[..., 1])
    return width, height


def giou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Generalized IoU = IoU - (|enclosing| - |union|) / |enclosing|, in -1..1 (Rezatofighi et al., CVPR 2019)."""
    shared = intersection(a, b)
    union = areas(a) + areas(b) - shared
    width, height = _enclosing(a, b)
    enclosing = (width * height).clamp(min=EPS)
    return shared / union.clamp(min=EPS) - (enclosing - union) / enclosing


def centre_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """rho^2 / c^2: squared distance of the centres over the squared diagonal of the smallest box around both."""
    width, height = _enclosing(a, b)
    apart = (a[..., 0] + a[..., 2] - b[..., 0] - b[..., 2]) ** 2 + (a[..., 1] + a[..., 3] - b[..., 1] - b[..., 3]) ** 2
    return apart / 4 / (width**2 + height**2).clamp(min=EPS)


def diou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Distance IoU = IoU - rho^2 / c^2, in -1..1 (Zheng et al., AAAI 2020)."""
    return iou(a, b) - centre_distance(a, b)


def ciou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Complete IoU of predictions `a` and targets `b`: DIoU - v^2 / (1 - IoU + v), where v compares the aspect ratios
    (Zheng et al., AAAI 2020)."""
    overlap = iou(a, b)
    angle = [torch.atan((box[..., 2] - box[..., 0]) / (box[..., 3] - box[..., 1]).clamp(min=EPS)) for box in (a, b)]
    v = 4 / math.pi**2 * (angle[1] - angle[0]) ** 2
    return overlap - centre_distance(a, b) - v**2 / (1 - overlap + v).clamp(min=EPS)


# ---- distances from a point ------------------------------------------------------------------------------------------


def distances(points: torch.Tensor, boxes: torch.Tensor, limit: float | None = None) -> torch.Tensor:
    """How far the left, top, right and bottom side of a box lie from a point, (..., 4).

    points: (..., 2). boxes: (..., 4). limit: distances are clamped to 0..limit; None for as they are."""
    found = torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)
    return found if limit is None else found.clamp(0, limit)


def boxes_at(points: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
    """The boxes (..., 4) whose sides lie at `distances` (..., 4) left, top, right and bottom of `points` (..., 2)."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)


def expected_distances(edges: torch.Tensor) -> torch.Tensor:
    """The integral of Generalized Focal Loss (Li et al., NeurIPS 2020, eq. 4): each side's expected distance.

    edges: (..., 4, R + 1) logits of the distances 0, 1, ..., R. Returns (..., 4) in 0..R, in units of the stride."""
    bins = torch.arange(edges.shape[-1], device=edges.device, dtype=torch.float32)
    return edges.float().softmax(dim=-1) @ bins
