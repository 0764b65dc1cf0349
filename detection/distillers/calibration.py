"""The losses of cross-layer calibration distillation (CCD of LTD, TGRS 2023), as the authors' released code has them.

They are functions of the maps of two feature pyramids, whatever detectors these belong to. No gradient reaches the
teacher's. Sums and means are those of each process. A list has a map (N, channels, H_l, W_l) for each level i; F is the
student's pyramid, F^ its fused maps, W F the projected ones, T the teacher's pyramid."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from detection.network.calibration import CalibratedMaps

POOL_SOURCES = ("raw", "fused")
POOL_SIZES = (4, 2, 1)
ATTENTION_TEMPERATURE = 0.1
EPS = 1e-6  # under the square root, whose slope is infinite at 0


def calibration_losses(student: Sequence[torch.Tensor], calibrated: CalibratedMaps, teacher: Sequence[torch.Tensor],
                       pool_source: str = "raw") -> dict[str, torch.Tensor]:
    """The unweighted losses of CCD on a batch, {name: scalar}.

        ccd_fused      sum_i mean (F^_i - T_i)^2
        ccd_pooled     sum_i pooled_error(F_i, T_i)
        ccd_attention  sum_i attention_error(W_i F_i, T_i, a_i), where a_i is the mean of attention(F_i) and
                       attention(T_i), without gradient

    student, teacher: pyramids with as many channels. calibrated: CalibratedMaps of the student's. pool_source: `raw`,
    or `fused` to pool F^_i in place of F_i. Raises ValueError for another."""
    if pool_source not in POOL_SOURCES:
        raise ValueError(f"pool_source {pool_source!r}: expected one of {', '.join(POOL_SOURCES)}")
    student, fused, projected, teacher = ([feature.float() for feature in maps] for maps in (
        student, calibrated.fused, calibrated.projected, teacher))
    teacher = [feature.detach() for feature in teacher]
    pooled = student if pool_source == "raw" else fused
    with torch.no_grad():
        attentions = [(attention(own) + attention(of_teacher)) / 2
                      for own, of_teacher in zip(student, teacher, strict=True)]
    return {"ccd_fused": sum(map(F.mse_loss, fused, teacher)),
            "ccd_pooled": sum(map(pooled_error, pooled, teacher)),
            "ccd_attention": sum(map(attention_error, projected, teacher, attentions))}


def pooled_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor | float:
    """sum_k w_k MSE(pool_k(student), pool_k(teacher)) / (1 + sum_k w_k), where pool_k is the average on a grid of s x s
    cells, s those of 4, 2, 1 that are smaller than the map is high, and w_k = 1/2, 1/4, 1/8 in this order. The 1 counts
    a term at full scale, which ReviewKD has (Chen et al., CVPR 2021). student, teacher: (N, channels, H, W)."""
    sizes = [size for size in POOL_SIZES if size < student.shape[2]]
    weights = [0.5**number for number in range(1, len(sizes) + 1)]
    errors = [F.mse_loss(*(F.adaptive_avg_pool2d(feature, size) for feature in (student, teacher))) for size in sizes]
    return sum(weight * error for weight, error in zip(weights, errors, strict=True)) / (1 + sum(weights))


def attention(feature: torch.Tensor) -> torch.Tensor:
    """Where a map is strong: H * W * softmax(mean_c |feature| / 0.1) over the locations of each image. (N, C, H, W) ->
    (N, H, W), 1 on average."""
    strength = feature.abs().mean(dim=1)
    shares = (strength / ATTENTION_TEMPERATURE).flatten(1).softmax(dim=1).view_as(strength)
    return shares * strength[0].numel()


def attention_error(student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sqrt(sum weights * (student - teacher)^2) over the whole batch: it grows with the root of the number of images.
    student, teacher: (N, C, H, W). weights: (N, H, W)."""
    return ((student - teacher).square().sum(dim=1) * weights).sum().add(EPS).sqrt()
