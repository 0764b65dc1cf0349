"""Geometry of oriented boxes: conversions, deltas, overlaps, suppression.

An oriented box is (cx, cy, w, h, theta): its centre, its two sides, and the angle in radians from the x axis to the
side w, clockwise as an image is seen (y points down). Its corners are

    centre +- w / 2 (cos theta, sin theta) +- h / 2 (-sin theta, cos theta).

Any angle is understood; every box made here has theta in (0, pi / 2], the convention "oc" of OpenCV >= 4.5.1, in which
each rectangle has one description: an axis-aligned box has theta = pi / 2, w its height and h its width."""

import math
from collections.abc import Callable

import torch
from torch.nn.functional import pad

from detection.geometry import deltas as horizontal
from detection.geometry.boxes import EPS, centres, intersection
from detection.geometry.suppression import Selection, by_score, greedy

QUARTER = math.pi / 2
PAIRS = 2**16  # compared at once: bounds the memory
DELTA_RANGE, ANGLE_RANGE = (-2.0, 2.0), (-5.0, 2.0)  # of the bins of a delta; of an angle's, in radians


# ---- conversions -----------------------------------------------------------------------------------------------------


def regularise(boxes: torch.Tensor) -> torch.Tensor:
    """The same rectangles (..., 5) with theta in (0, pi / 2]: w and h change places with each quarter turn."""
    centres, w, h, theta = boxes.split([2, 1, 1, 1], dim=-1)
    turns = (theta / QUARTER).ceil() - 1
    odd = turns % 2 == 1
    theta = (theta - turns * QUARTER).clamp(torch.finfo(theta.dtype).tiny, QUARTER)  # rounding could reach 0
    return torch.cat([centres, torch.where(odd, h, w), torch.where(odd, w, h), theta], dim=-1)


def corners(boxes: torch.Tensor) -> torch.Tensor:
    """(..., 5) boxes -> (..., 4, 2) corners, clockwise as an image is seen."""
    centres, w, h, theta = boxes.split([2, 1, 1, 1], dim=-1)
    along = w / 2 * torch.cat([theta.cos(), theta.sin()], dim=-1)  # (..., 2)
    across = h / 2 * torch.cat([-theta.sin(), theta.cos()], dim=-1)
    return torch.stack([centres - along - across, centres + along - across, centres + along + across,
                        centres - along + across], dim=-2)


def bounds(points: torch.Tensor) -> torch.Tensor:
    """(..., K, 2) points -> (..., 4), x1 y1 x2 y2 of the horizontal boxes around them."""
    return torch.cat([points.amin(dim=-2), points.amax(dim=-2)], dim=-1)


def circumscribed(boxes: torch.Tensor) -> torch.Tensor:
    """(..., 5) boxes -> (..., 4), x1 y1 x2 y2 of the horizontal boxes around them."""
    return bounds(corners(boxes))


def from_horizontal(boxes: torch.Tensor) -> torch.Tensor:
    """(..., 4) boxes, x1 y1 x2 y2 -> (..., 5)."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
    return torch.cat([centres(boxes), torch.stack([height, width, torch.full_like(width, QUARTER)], dim=-1)], dim=-1)


def upright(boxes: torch.Tensor) -> torch.Tensor:
    """(..., 5) boxes -> (..., 4), x1 y1 x2 y2 of the boxes turned to theta = 0."""
    middle, half = boxes[..., :2], boxes[..., 2:4] / 2
    return torch.cat([middle - half, middle + half], dim=-1)


def minimum_area_rectangle(points: torch.Tensor) -> torch.Tensor:
    """The rectangles (..., 5) of least area around points (..., K, 2), in any order, of at least two places.

    One side of such a rectangle lies along an edge of the convex hull (Freeman and Shapira, CACM 1975). The lines
    through every two points contain those edges, so no hull is needed; there are K (K - 1) / 2: for few points."""
    middle = points.mean(dim=-2, keepdim=True)
    points = points - middle
    first, second = torch.triu_indices(points.shape[-2], points.shape[-2], 1, device=points.device)
    edges = points[..., second, :] - points[..., first, :]  # (..., D, 2)
    theta = torch.atan2(edges[..., 1], edges[..., 0])  # (..., D)
    axes = torch.stack([torch.stack([theta.cos(), theta.sin()], dim=-1),
                        torch.stack([-theta.sin(), theta.cos()], dim=-1)], dim=-2)  # (..., D, 2 axes, 2)
    places = (axes[..., None, :] * points[..., None, None, :, :]).sum(dim=-1)  # (..., D, 2 axes, K)
    low, high = places.amin(dim=-1), places.amax(dim=-1)  # (..., D, 2)
    areas = (high - low).prod(dim=-1).masked_fill((edges == 0).all(dim=-1), math.inf)
    best = areas.argmin(dim=-1, keepdim=True)  # (..., 1)
    low, high = (side.gather(-2, best[..., None].expand(*best.shape, 2)).squeeze(-2) for side in (low, high))
    axes = axes.gather(-3, best[..., None, None].expand(*best.shape, 2, 2)).squeeze(-3)  # (..., 2 axes, 2)
    centres = middle.squeeze(-2) + (((low + high) / 2)[..., None] * axes).sum(dim=-2)
    return regularise(torch.cat([centres, high - low, theta.gather(-1, best)], dim=-1))


# ---- deltas of horizontal anchors ------------------------------------------------------------------------------------


def encode(anchors: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """The deltas (dx, dy, dw, dh, dtheta) that take horizontal anchors to oriented boxes.

    anchors: (..., 4), x1 y1 x2 y2. boxes: (..., 5). Returns (..., 5): detection.geometry.deltas of the upright box, and
    its angle."""
    return torch.cat([horizontal.encode(anchors, upright(boxes)), boxes[..., 4:]], dim=-1)


def decode(anchors: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
    """The boxes (..., 5) that deltas (..., 5) take anchors (..., 4) to, the inverse of `encode`. Any angle may come
    out."""
    boxes = horizontal.decode(anchors, deltas[..., :4])
    return torch.cat([centres(boxes), boxes[..., 2:] - boxes[..., :2], deltas[..., 4:]], dim=-1)


def expected_deltas(bins: torch.Tensor) -> torch.Tensor:
    """The expectation of each delta over its bins, which are evenly spaced over DELTA_RANGE or ANGLE_RANGE (Rotated-LD,
    Zheng et al., arXiv:2204.05957).

    bins: (..., 5, R + 1) logits; for R = 0 there is no distribution, and they are the deltas. Returns (..., 5)."""
    count = bins.shape[-1]
    if count == 1:
        return bins.squeeze(-1)
    values = torch.stack([torch.linspace(*span, count, device=bins.device)
                          for span in (*[DELTA_RANGE] * 4, ANGLE_RANGE)])  # (5, R + 1)
    return (bins.softmax(dim=-1) * values).sum(dim=-1)


# ---- overlaps --------------------------------------------------------------------------------------------------------


def rotated_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of oriented boxes. a, b: (..., 5), broadcast against each other, fp32 or fp64 -> (...)
    in 0..1. Each of P with each of G boxes: rotated_iou(a[:, None], b), (P, G)."""
    return _where_near(_iou_of_boxes, a, b, circumscribed)


def polygon_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of simple polygons, as `rotated_iou`. a: (..., K, 2), b: (..., L, 2) -> (...)."""
    return _where_near(_iou_of_polygons, a, b, bounds)


def polygon_iof(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over foreground: the part of the area of the polygons `a` that lies in `b`; as `polygon_iou`."""
    return _where_near(_iof_of_polygons, a, b, bounds)


def _where_near(measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], a: torch.Tensor, b: torch.Tensor,
                around: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """measure(a, b), broadcast, where the horizontal boxes around the two overlap, else 0; PAIRS of them at a time.

    measure: of (P, ...) and (P, ...) -> (P,). around: the horizontal boxes (..., 4) of its argument."""
    a, b = (side.to(torch.promote_types(side.dtype, torch.float32)) for side in (a, b))
    around_a, around_b = around(a), around(b)
    shape = torch.broadcast_shapes(around_a.shape[:-1], around_b.shape[:-1])
    a, b = (side.expand(*shape, *side.shape[box.dim() - 1:]) for side, box in ((a, around_a), (b, around_b)))
    around_a, around_b = (box.expand(*shape, 4) for box in (around_a, around_b))
    values = a.new_zeros(shape)
    rows = max(PAIRS // max(math.prod(shape[1:]), 1), 1)
    for part in (slice(first, first + rows) for first in range(0, shape[0], rows)):
        near = (intersection(around_a[part], around_b[part]) > 0).nonzero(as_tuple=True)
        values[part][near] = measure(a[part][near], b[part][near])
    return values


def _iou_of_boxes(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(P, 5) and (P, 5) boxes -> (P,), seen from the centre of `a`: far from the origin fp32 would lose the corners."""
    origin = pad(a[:, :2], (0, 3))
    return _iou_of_polygons(corners(a - origin), corners(b - origin))


def _iou_of_polygons(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(P, K, 2) and (P, L, 2) polygons -> (P,)."""
    shared = _shared_area(a, b)
    return (shared / (_area(a) + _area(b) - shared).clamp(min=EPS)).clamp(max=1)


def _iof_of_polygons(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(P, K, 2) and (P, L, 2) polygons -> (P,)."""
    return (_shared_area(a, b) / _area(a).clamp(min=EPS)).clamp(max=1)


def _area(points: torch.Tensor) -> torch.Tensor:
    """(P, K, 2) polygons -> (P,) areas."""
    x, y = (points - points[:, :1]).unbind(-1)
    return ((x.roll(-1, 1) - x) * (y.roll(-1, 1) + y)).sum(dim=1).abs() / 2


def _shared_area(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(P, K, 2) and (P, L, 2) polygons -> (P,) areas of their intersections.

    Let s_i be the sign of the direction in x of edge i of `a`, y_i(x) its height over the x that it spans, s_j and y_j
    those of `b`. Over each x a polygon has the length sum_i s_i y_i (up to one sign), two share
    sum_ij s_i s_j min(y_i, y_j), and sum_i s_i = 0; with min(u, v) = (u + v - |u - v|) / 2 the shared area is

        -1/2 sum_ij s_i s_j integral |y_i(x) - y_j(x)| dx over the x that both edges span.

    There is nothing to decide where edges touch or coincide: every term is continuous in the points."""
    a, b = a - a[:, :1], b - a[:, :1]
    (a_start, a_end), (b_start, b_end) = ((points, points.roll(-1, 1)) for points in (a, b))
    a_start, a_end = a_start[:, :, None], a_end[:, :, None]  # (P, K, 1, 2)
    b_start, b_end = b_start[:, None], b_end[:, None]  # (P, 1, L, 2)
    left = torch.maximum(torch.minimum(a_start, a_end), torch.minimum(b_start, b_end))[..., 0]  # (P, K, L)
    right = torch.minimum(torch.maximum(a_start, a_end), torch.maximum(b_start, b_end))[..., 0]
    gap_left, gap_right = (_height(a_start, a_end, x) - _height(b_start, b_end, x) for x in (left, right))
    total = gap_left.abs() + gap_right.abs()
    crossed = gap_left * gap_right < 0  # then |gap| is two triangles instead of a trapezium
    mean_gap = torch.where(crossed, (gap_left**2 + gap_right**2) / total, total) / 2
    signs = (a_end - a_start)[..., 0].sign() * (b_end - b_start)[..., 0].sign()
    return (signs * mean_gap * (right - left).clamp(min=0)).sum(dim=(1, 2)).abs() / 2


def _height(start: torch.Tensor, end: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """y of the edges from `start` to `end` (..., 2) at `x` (...), kept between those of the ends."""
    run, rise = (end - start).unbind(-1)
    part = (x - start[..., 0]) / torch.where(run == 0, 1, run)
    return start[..., 1] + rise * part.clamp(0, 1)


# ---- suppression -----------------------------------------------------------------------------------------------------


def rotated_nms(boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, threshold: float = 0.1,
                limit: int = 2000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Greedy NMS by rotated IoU, each class for itself. boxes: (M, 5); else as in detection.geometry.suppression. The
    defaults are those of the published results on DOTA."""
    boxes, scores, labels = by_score(boxes, scores, labels)
    kept = greedy(rotated_iou, boxes, labels, threshold, limit)
    return boxes[kept], scores[kept], labels[kept]


# The published way to test on DOTA.
ORIENTED_SELECTION = Selection(candidates=2000, overlap=0.1, most=2000, suppressions={"nms": rotated_nms})
