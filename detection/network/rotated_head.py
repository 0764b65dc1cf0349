"""The head of rotated RetinaNet with distributions (Rotated-LD: Zheng et al., arXiv:2204.05957), and its outputs."""

from dataclasses import dataclass

import torch
from torch import nn
from torchvision.ops import Conv2dNormActivation

from detection.geometry.anchors import RETINA, Anchors
from detection.geometry.oriented import decode, expected_deltas
from detection.network.towers import flatten, initialise_head


@dataclass
class RotatedOutputs:
    """The predictions of a detector of oriented boxes for a batch. N images, A anchors of all levels, C classes."""

    logits: torch.Tensor  # (N, A, C) classification logits, fp32
    bins: torch.Tensor  # (N, A, 5, R + 1) logits of the values of dx, dy, dw, dh, dtheta; for R = 0 the deltas; fp32
    features: list[torch.Tensor]  # 5 maps (N, channels, H_l, W_l), P3 to P7

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """((H_l, W_l), ...) of the levels."""
        return tuple(tuple(feature.shape[2:]) for feature in self.features)

    @property
    def scores(self) -> torch.Tensor:
        """(N, A, C) scores in 0..1."""
        return self.logits.sigmoid()

    def boxes(self, anchors: Anchors) -> torch.Tensor:
        """(N, A, 5) decoded boxes in pixels and radians."""
        return decode(anchors.boxes, expected_deltas(self.bins))


class RotatedRetinaHead(nn.Module):
    """Two towers, shared by all levels (RetinaNet: Lin et al., ICCV 2017): one scores the classes of the anchors of a
    location, the other gives each of the five deltas of an anchor a distribution, or for reg_max = 0 a value."""

    def __init__(self, num_classes: int, channels: int, tower_convs: int, reg_max: int):
        super().__init__()
        self.per_location = len(RETINA.shapes)  # K
        self.class_tower, self.box_tower = (
            nn.Sequential(*(Conv2dNormActivation(channels, channels, 3, norm_layer=None) for _ in range(tower_convs)))
            for _ in range(2))
        self.classify = nn.Conv2d(channels, self.per_location * num_classes, 3, padding=1)
        self.regress = nn.Conv2d(channels, self.per_location * 5 * (reg_max + 1), 3, padding=1)
        initialise_head(self, self.classify)

    def forward(self, pyramid: list[torch.Tensor]) -> RotatedOutputs:
        """pyramid: 5 maps (N, channels, H_l, W_l). Returns RotatedOutputs."""
        logits = [flatten(self.classify(self.class_tower(feature)), self.per_location)  # (N, H_l * W_l, K, C)
                  for feature in pyramid]
        bins = [flatten(self.regress(self.box_tower(feature)), self.per_location * 5)  # (N, H_l * W_l, K * 5, R + 1)
                for feature in pyramid]
        return RotatedOutputs(torch.cat(logits, dim=1).flatten(1, 2).float(),
                              torch.cat(bins, dim=1).unflatten(2, (-1, 5)).flatten(1, 2).float(), pyramid)
