"""The divergence that distillation is made of, and how it is summed over the anchors of a batch."""

import torch

from detection.geometry.anchors import Anchors


def mean_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 / n * sum_k p_k (log p_k - log q_k), p = softmax(teacher / T), q = softmax(student / T).

    student, teacher: (..., n) logits; no gradient reaches the teacher's. Returns (...). The MEAN over the n bins, not
    the sum of Hinton et al. (2015), is what the published weights of LD are tuned for (its code's reduction)."""
    log_q = (student.float() / temperature).log_softmax(dim=-1)
    log_p = (teacher.detach().float() / temperature).log_softmax(dim=-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).mean(dim=-1)


def divergence(student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor, temperature: float) -> torch.Tensor:
    """sum_a weight_a sum_k KL(student_ak, teacher_ak), a scalar.

    student, teacher: (N, A, K, n) logits of the K distributions that each anchor has. weights: (N, A)."""
    rows = weights.nonzero(as_tuple=True)  # few of many anchors: the others need no softmax
    kl = mean_kl(student[rows], teacher[rows], temperature)  # (P, K)
    return (weights[rows][:, None] * kl).sum()


def shares_of_level_means(region: torch.Tensor, anchors: Anchors) -> torch.Tensor:
    """(N, A) weights such that sum(weights * values) is the sum over the levels of the values' mean over the region on
    this level, in the whole batch; a level without any of the region counts 0. region: (N, A) bool."""
    counts = anchors.levels.new_zeros(len(anchors.sizes)).index_add_(0, anchors.levels, region.sum(dim=0))
    return region / counts.clamp(min=1)[anchors.levels]
