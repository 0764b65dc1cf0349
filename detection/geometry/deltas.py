"""Box deltas: a box as its shift and scaling against an anchor (Girshick et al., R-CNN, CVPR 2014, appendix C)."""

import math
from collections.abc import Sequence

import torch

from detection.geometry.boxes import centres

LIMIT = math.log(1000 / 16)  # of |dw| and |dh|: no box is more than 62.5 times as large, or as small, as its anchor


def encode(anchors: torch.Tensor, boxes: torch.Tensor, means: Sequence[float] = (0, 0, 0, 0),
           stds: Sequence[float] = (1, 1, 1, 1)) -> torch.Tensor:
    """The deltas (dx, dy, dw, dh) that take anchors to boxes, less `means`, over `stds`.

    anchors, boxes: (..., 4) xyxy with sides above 0, broadcast against each other. Returns (..., 4)."""
    sides, wanted = (part[..., 2:] - part[..., :2] for part in (anchors, boxes))
    deltas = torch.cat([(centres(boxes) - centres(anchors)) / sides, (wanted / sides).log()], dim=-1)
    parts = zip(deltas.unbind(-1), means, stds, strict=True)
    return torch.stack([(delta - mean) / std for delta, mean, std in parts], dim=-1)


def decode(anchors: torch.Tensor, deltas: torch.Tensor, means: Sequence[float] = (0, 0, 0, 0),
           stds: Sequence[float] = (1, 1, 1, 1)) -> torch.Tensor:
    """The boxes that deltas take anchors to, the inverse of `encode` where no |dw| or |dh| exceeds LIMIT.

    anchors: (..., 4) xyxy. deltas: (..., 4). Returns (..., 4) xyxy."""
    parts = zip(deltas.unbind(-1), means, stds, strict=True)  # numbers, as a tensor of them would wait for the GPU
    shift, scaling = torch.stack([delta * std + mean for delta, mean, std in parts], dim=-1).split(2, dim=-1)
    sides = anchors[..., 2:] - anchors[..., :2]
    centre, half = centres(anchors) + shift * sides, sides * scaling.clamp(-LIMIT, LIMIT).exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)
