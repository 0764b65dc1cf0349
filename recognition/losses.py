"""Classification losses for long-tailed data: cross-entropy, and those of the methods that T2FTS is compared with.

n_c are the training images of class c, p_c = n_c / sum(n) its share of them, z the logits, y the label. Every loss is
returned by image, (B,), so that its mean over the batch is the loss of a step."""

import torch
import torch.nn.functional as F
from torch import nn

LDAM_SCALE = 30.0  # s of LDAM: its logits are s times cosines
LDAM_LARGEST_MARGIN = 0.5  # of the class with the fewest images
DRW_BETA = 0.9999
DRW_START = 0.8  # part of the epochs after which LDAM weights the classes (160 of 200 in the paper)


def classification_loss(name: str, logits: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor,
                        reweighted: bool = False) -> torch.Tensor:
    """The loss of `--loss`, (B,) fp32. reweighted: whether the deferred re-weighting of `ldam-drw` has begun.

    logits: (B, C). labels: (B,) int64. counts: (C,) n_c on the same device."""
    logits = logits.float()
    if name == "balanced-softmax":
        return balanced_softmax(logits, labels, counts)
    if name == "ldam-drw":
        losses = ldam(logits, labels, counts)
        return weighted(losses, labels, effective_number_weights(counts)) if reweighted else losses
    return F.cross_entropy(logits, labels, reduction="none")


def balanced_softmax(logits: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """-log( n_y exp(z_y) / sum_c n_c exp(z_c) ): Ren et al., Balanced Meta-Softmax, NeurIPS 2020, eq. 4.

    It is also the logit-adjusted cross-entropy of Menon et al. at tau = 1 (ICLR 2021, eq. 10). Shapes as in
    `classification_loss`; a class without images counts as one with a single image."""
    return F.cross_entropy(logits + counts.clamp(min=1).log(), labels, reduction="none")


def ldam(logits: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of s (cos_c - [c = y] margin_c), margin_c proportional to n_c^(-1/4) and at most 0.5: Cao et al.,
    NeurIPS 2019, eq. 12 and 13. Shapes as in `classification_loss`; logits are s cos_c, of a `CosineClassifier`."""
    margins = counts.clamp(min=1).double().pow(-0.25)
    margins = (LDAM_LARGEST_MARGIN * margins / margins.max()).float()
    true_class = F.one_hot(labels, len(counts))
    return F.cross_entropy(logits - LDAM_SCALE * margins * true_class, labels, reduction="none")


def effective_number_weights(counts: torch.Tensor) -> torch.Tensor:
    """(1 - beta) / (1 - beta^n_c) of each class, (C,) with mean 1: the weights of deferred re-weighting (DRW), Cao et
    al., section 3.3, after Cui et al., CVPR 2019, eq. 6."""
    weights = (1 - DRW_BETA) / (1 - DRW_BETA ** counts.clamp(min=1).double())
    return (weights / weights.mean()).float()


def weighted(losses: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(B,) losses times the weights of their classes over the mean weight of the batch: the mean is a weighted mean."""
    weights = weights[labels]
    return losses * weights / weights.mean()


class CosineClassifier(nn.Linear):
    """s times the cosine between a feature vector and each class's weight vector: the classifier of LDAM. It has the
    entries of nn.Linear, with an unused bias."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        with torch.autocast(features.device.type, enabled=False):
            cosines = F.linear(F.normalize(features.float()), F.normalize(self.weight.float()))
            return LDAM_SCALE * cosines

    @torch.no_grad()
    def as_linear(self) -> nn.Linear:
        """An nn.Linear with the same predictions: the length of a feature vector does not reorder the classes."""
        linear = nn.Linear(self.in_features, self.out_features, device=self.weight.device)
        linear.weight.copy_(LDAM_SCALE * F.normalize(self.weight))
        linear.bias.zero_()
        return linear


@torch.no_grad()
def adjust_logits(classifier: nn.Linear, counts: torch.Tensor, tau: float) -> None:
    """Subtract tau log p_c from the logit of each class, in the bias: post-hoc logit adjustment, Menon et al.,
    ICLR 2021, eq. 9.

    classifier: nn.Linear over the classes, changed in place. counts: (C,) n_c; a class without images counts as one
    with a single image."""
    counts = counts.clamp(min=1).to(classifier.bias)
    classifier.bias -= tau * (counts / counts.sum()).log()
