"""The head of PAA (Kim and Lee, Probabilistic Anchor Assignment, ECCV 2020) with the auxiliary predictions of LAD
(Nguyen et al., WACV 2022), and what it answers."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from detection.geometry.anchors import STRIDES, Anchors
from detection.geometry.deltas import decode
from detection.network.towers import flatten, initialise_head, logit, tower

DELTA_STDS = (0.1, 0.1, 0.2, 0.2)
AUXILIARIES = ("iou", "iou+iop", "iou+cop", "iop", "cop")
COP_PADDINGS = {"prob0": 0.0, "logit0": 0.5}  # the class probability of what lies outside the map
IOP_BIAS = 1e-4  # what implicit objectness subtracts at the start


@dataclass
class Outputs:
    """The predictions of a PAA detector for a batch. N images, A anchors of all levels, C classes."""

    logits: torch.Tensor  # (N, A, C) classification logits, fp32
    deltas: torch.Tensor  # (N, A, 4) box deltas against the anchors, fp32
    features: list[torch.Tensor]  # 5 maps (N, channels, H_l, W_l), P3 to P7
    iou_logits: torch.Tensor | None = None  # (N, A) of the IoU that the box will have, fp32
    probabilities: torch.Tensor | None = None  # (N, A, C) with IOP or COP: the class scores in place of the sigmoids

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """((H_l, W_l), ...) of the levels."""
        return tuple(tuple(feature.shape[2:]) for feature in self.features)

    @property
    def class_scores(self) -> torch.Tensor:
        """(N, A, C) scores of the classes alone, in 0..1."""
        return self.logits.sigmoid() if self.probabilities is None else self.probabilities

    @property
    def scores(self) -> torch.Tensor:
        """(N, A, C) scores in 0..1: the square root of class score times IoU; without an IoU the class score."""
        if self.iou_logits is None:
            return self.class_scores
        return (self.class_scores * self.iou_logits.sigmoid()[..., None]).sqrt()

    def boxes(self, anchors: Anchors) -> torch.Tensor:
        """(N, A, 4) decoded boxes in pixels."""
        return decode(anchors.boxes, self.deltas, stds=DELTA_STDS)

    def boxes_of(self, anchors: Anchors, image: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        """(P, 4) decoded boxes in pixels of the anchors (P,) of the images (P,)."""
        return decode(anchors.boxes[anchor], self.deltas[image, anchor], stds=DELTA_STDS)


class PAAHead(nn.Module):
    """Two towers, shared by all levels: one scores the classes, the other gives the deltas of a box and the auxiliary
    predictions. auxiliary: one of AUXILIARIES. cop_padding: one of COP_PADDINGS.

        iou  the IoU that the box will have
        iop  implicit objectness o and bias b: class scores relu(sigmoid(z) - b) * o
        cop  conditional objectness: class scores are the mean over the 3 x 3 neighbours j of sigmoid(z_j) * coef_j"""

    def __init__(self, num_classes: int, channels: int, tower_convs: int, auxiliary: str, cop_padding: str):
        super().__init__()
        self.outside = COP_PADDINGS[cop_padding]
        self.class_tower, self.box_tower = tower(channels, tower_convs), tower(channels, tower_convs)
        self.classify, self.regress = (nn.Conv2d(channels, count, 3, padding=1) for count in (num_classes, 4))
        self.scales = nn.Parameter(torch.ones(len(STRIDES)))  # one for each level
        self.iou, self.objectness, self.bias, self.coefficients = (
            nn.Conv2d(channels, count, 3, padding=1) if name in auxiliary.split("+") else None
            for name, count in (("iou", 1), ("iop", 1), ("iop", 1), ("cop", 9)))
        initialise_head(self, self.classify)
        if self.bias is not None:
            nn.init.constant_(self.bias.bias, logit(IOP_BIAS))

    def forward(self, pyramid: list[torch.Tensor]) -> Outputs:
        """pyramid: 5 maps (N, channels, H_l, W_l). Returns Outputs."""
        logits, deltas, ious, probabilities = [], [], [], []
        for scale, feature in zip(self.scales, pyramid, strict=True):
            classes, box = self.classify(self.class_tower(feature)).float(), self.box_tower(feature)
            logits.append(classes)
            deltas.append(self.regress(box).float() * scale)
            if self.iou is not None:
                ious.append(self.iou(box).float())
            if self.objectness is not None:
                probabilities.append(implicit_objectness(classes, self.objectness(box), self.bias(box)))
            if self.coefficients is not None:
                probabilities.append(conditional_objectness(classes, self.coefficients(box), self.outside))
        logits, deltas, ious, probabilities = (
            torch.cat([flatten(level, 1).squeeze(2) for level in levels], dim=1) if levels else None
            for levels in (logits, deltas, ious, probabilities))
        return Outputs(logits, deltas, pyramid, None if ious is None else ious.squeeze(2), probabilities)


def implicit_objectness(logits: torch.Tensor, objectness: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """IOP of LAD: the class scores relu(sigmoid(z) - sigmoid(b)) * sigmoid(o), (N, C, H, W) in fp32.

    logits: (N, C, H, W) z. objectness, bias: (N, 1, H, W) logits o and b."""
    return (logits.float().sigmoid() - bias.float().sigmoid()).relu() * objectness.float().sigmoid()


def conditional_objectness(logits: torch.Tensor, coefficients: torch.Tensor, outside: float = 0.0) -> torch.Tensor:
    """COP of LAD: the class scores mean_j sigmoid(z_j) * sigmoid(coef_j) over the 3 x 3 neighbours j of a
    location, row by row, (N, C, H, W) in fp32.

    logits: (N, C, H, W) z. coefficients: (N, 9, H, W) logits, shared by the classes. outside: the probability of each
    class at the neighbours outside the map."""
    height, width = logits.shape[2:]
    padded = F.pad(logits.float().sigmoid(), (1, 1, 1, 1), value=outside)
    shares = coefficients.float().sigmoid()
    return sum(padded[..., j // 3:j // 3 + height, j % 3:j % 3 + width] * shares[:, j:j + 1] for j in range(9)) / 9
