"""The losses of a detector of oriented boxes: focal loss of the classes, and one of three losses of the boxes.

The Gaussian of a box has its centre as mean and the covariance S = R diag(w^2 / 4, h^2 / 4) R^T, R the rotation by
theta. It is the same for every (w, h, theta) that describes the rectangle."""

import torch
import torch.nn.functional as F

from detection.assigners.max_iou import IGNORED
from detection.assigners.targets import Targets
from detection.distillers.divergence import shares_of_level_means
from detection.geometry.anchors import Anchors
from detection.geometry.oriented import decode, encode, expected_deltas
from detection.losses.focal import focal_loss
from detection.losses.reduction import mean_over_processes
from detection.network.rotated_head import RotatedOutputs

LEAST_SIDE = 1e-3  # pixels: no Gaussian is thinner, so that logarithms, roots and inverses have finite gradients
LEAST_DISTANCE = 1e-6  # of Gaussians: the root of 0 and its gradient are left out
BETA = 1 / 9  # of the smooth L1 loss: where it becomes linear
BOX_LOSSES = ("gwd", "kld", "smooth_l1")
BOX_NORMS = ("positives", "level_mean")


def rotated_losses(outputs: RotatedOutputs, targets: Targets, anchors: Anchors, box_loss: str = "gwd",
                   box_norm: str = "positives") -> dict[str, torch.Tensor]:
    """The unweighted losses of a detector of oriented boxes on a batch, {name: scalar}.

        cls  sum_a focal(logits_a) / P      over all anchors but those ignored
        box  sum_{a positive} loss_a / P    `gwd` and `kld` of the decoded boxes, `smooth_l1` of the deltas

    P is the number of positives, at least 1 an image, as a mean over the processes. box_norm: `positives` is this;
    `level_mean` sums the means over the positives of each level, as the code of Rotated-LD does for `kld`. Raises
    ValueError for another box_loss or box_norm."""
    if box_loss not in BOX_LOSSES or box_norm not in BOX_NORMS:
        raise ValueError(f"box_loss {box_loss!r}, box_norm {box_norm!r}: expected one of {', '.join(BOX_LOSSES)}, and "
                         f"one of {', '.join(BOX_NORMS)}")
    image, anchor = targets.positives
    deltas, wanted = expected_deltas(outputs.bins[image, anchor]), targets.boxes[image, anchor]  # (P, 5) each
    boxes = anchors.boxes[anchor]
    if box_loss == "smooth_l1":
        by_box = F.smooth_l1_loss(deltas, encode(boxes, wanted), reduction="none", beta=BETA).sum(dim=1)
    else:
        by_box = (gwd_loss if box_loss == "gwd" else kld_loss)(decode(boxes, deltas), wanted)
    positives = mean_over_processes(targets.positive.sum(dim=1).clamp(min=1).sum().float())
    shares = (1 / positives if box_norm == "positives" else
              shares_of_level_means(targets.positive, anchors)[image, anchor])
    counted = targets.valid & (targets.matched != IGNORED)
    by_anchor = focal_loss(outputs.logits.flatten(0, 1), targets.labels.flatten())
    return {"cls": (by_anchor * counted.flatten()).sum() / positives, "box": (by_box * shares).sum()}


# ---- Gaussians -------------------------------------------------------------------------------------------------------


def gaussian(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(..., 5) boxes -> means (..., 2), covariances S (..., 2, 2) and sqrt(det S) = w h / 4 (...)."""
    sides = boxes[..., 2:4].clamp(min=LEAST_SIDE)
    cos, sin = boxes[..., 4].cos(), boxes[..., 4].sin()
    axes = torch.stack([torch.stack([cos, -sin], dim=-1), torch.stack([sin, cos], dim=-1)], dim=-2)  # R
    covariance = (axes * (sides / 2).square()[..., None, :]) @ axes.mT
    return boxes[..., :2], covariance, sides.prod(dim=-1) / 4


def trace_of_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """tr(a b) of symmetric matrices (..., 2, 2) -> (...)."""
    return (a * b).sum(dim=(-2, -1))


def gwd_loss(boxes: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log(1 + d) of the Gaussian Wasserstein distance (Yang et al., ICML 2021), made free of the scale:

        W^2 = |m_p - m_t|^2 + tr S_p + tr S_t - 2 sqrt(tr(S_p S_t) + 2 sqrt(det S_p det S_t))
        d = W / (2 (det S_p det S_t)^(1/8))

    boxes, targets: (P, 5). Returns (P,)."""
    (mean_p, cov_p, root_p), (mean_t, cov_t, root_t) = gaussian(boxes), gaussian(targets)
    overlap = (trace_of_product(cov_p, cov_t) + 2 * root_p * root_t).sqrt()
    squared = (mean_p - mean_t).square().sum(dim=-1) + trace(cov_p) + trace(cov_t) - 2 * overlap
    distance = squared.clamp(min=LEAST_DISTANCE).sqrt() / (2 * (root_p * root_t) ** 0.25)
    return distance.log1p()


def kld_loss(boxes: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """1 - 1 / (1 + log(1 + D)) of twice the Kullback-Leibler divergence of the Gaussians (Yang et al., NeurIPS
    2021):

        D = (m_p - m_t)^T S_t^-1 (m_p - m_t) + tr(S_t^-1 S_p) + log(det S_t / det S_p) - 2

    boxes, targets: (P, 5). Returns (P,)."""
    (mean_p, cov_p, root_p), (mean_t, cov_t, root_t) = gaussian(boxes), gaussian(targets)
    adjugate = trace(cov_t)[..., None, None] * torch.eye(2, device=cov_t.device) - cov_t
    inverse = adjugate / root_t.square()[..., None, None]
    apart = mean_p - mean_t
    squared = (apart[..., None, :] @ inverse @ apart[..., :, None]).flatten()
    divergence = squared + trace_of_product(inverse, cov_p) + 2 * (root_t.log() - root_p.log()) - 2
    return 1 - 1 / (1 + divergence.clamp(min=LEAST_DISTANCE).log1p())


def trace(matrices: torch.Tensor) -> torch.Tensor:
    """(..., 2, 2) -> (...)."""
    return matrices.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
