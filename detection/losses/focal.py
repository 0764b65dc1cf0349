"""Focal loss (Lin et al., RetinaNet, ICCV 2017) of logits and of probabilities."""

import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

ALPHA, GAMMA = 0.25, 2.0  # weight of the positives; exponent by which easy examples lose weight


def focal_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """alpha_t (1 - p_t)^2 (-log p_t), summed over the classes, p = sigmoid(logits).

    logits: (..., C). labels: (...) int64 in 0..C, C for background. Returns (...)."""
    return sigmoid_focal_loss(logits, one_hot(labels, logits), ALPHA, GAMMA).sum(dim=-1)


def focal_loss_of_probabilities(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The focal loss of scores (..., C) in 0..1 that are no sigmoids of logits. Else as focal_loss; in fp32, also where
    autocast would have less."""
    with torch.autocast(probabilities.device.type, enabled=False):
        p = probabilities.float()
        target = one_hot(labels, p)
        wrong = p + target - 2 * p * target  # 1 - p_t
        weights = ALPHA * target + (1 - ALPHA) * (1 - target)
        return (weights * wrong**GAMMA * F.binary_cross_entropy(p, target, reduction="none")).sum(dim=-1)


def one_hot(labels: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(...) labels in 0..C, C for background, as a row of C zeros and ones each. like: (..., C), of which type, device
    and C are taken."""
    target = like.new_zeros(*labels.shape, like.shape[-1] + 1)
    return target.scatter_(-1, labels[..., None], 1)[..., :-1]
