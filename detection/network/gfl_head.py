"""The head of Generalized Focal Loss (GFL: Li et al., NeurIPS 2020), and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from detection.geometry.anchors import STRIDES, Anchors
from detection.geometry.boxes import boxes_at, expected_distances
from detection.network.towers import flatten, initialise_head, tower


@dataclass
class Outputs:
    """The predictions of a detector for a batch. N images, A anchors of all levels, C classes."""

    logits: torch.Tensor  # (N, A, C) classification logits, fp32
    edges: torch.Tensor  # (N, A, 4, R + 1) logits of the distances 0..R to the left, top, right and bottom side, fp32
    features: list[torch.Tensor]  # 5 maps (N, channels, H_l, W_l), P3 to P7
    quality: torch.Tensor | None = None  # (N, A, 1) in 0..1: GFocal V2's estimate of the IoU

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """((H_l, W_l), ...) of the levels."""
        return tuple(tuple(feature.shape[2:]) for feature in self.features)

    @property
    def scores(self) -> torch.Tensor:
        """(N, A, C) scores in 0..1: the sigmoid of the logits, in GFocal V2 times the quality."""
        scores = self.logits.sigmoid()
        return scores if self.quality is None else scores * self.quality

    def boxes(self, anchors: Anchors) -> torch.Tensor:
        """(N, A, 4) decoded boxes in pixels."""
        return boxes_at(anchors.centres, expected_distances(self.edges) * anchors.strides[:, None])


class GFLHead(nn.Module):
    """Two towers, shared by all levels: one scores the classes, the other gives each side of the box a distribution of
    its distance (Li et al., NeurIPS 2020). With `quality` also GFocal V2's branch (Li et al., CVPR 2021)."""

    def __init__(self, num_classes: int, channels: int, tower_convs: int, reg_max: int, quality: bool):
        super().__init__()
        self.reg_max = reg_max
        self.class_tower, self.box_tower = tower(channels, tower_convs), tower(channels, tower_convs)
        self.classify = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.regress = nn.Conv2d(channels, 4 * (reg_max + 1), 3, padding=1)
        self.scales = nn.Parameter(torch.ones(len(STRIDES)))  # one for each level
        # The four largest of each side's probabilities and their mean say how sure the box is (GFocal V2, eq. 3 and 4).
        self.quality = nn.Sequential(nn.Conv2d(4 * 5, 64, 1), nn.ReLU(inplace=True), nn.Conv2d(64, 1, 1),
                                     nn.Sigmoid()) if quality else None
        initialise_head(self, self.classify)

    def forward(self, pyramid: list[torch.Tensor]) -> Outputs:
        """pyramid: 5 maps (N, channels, H_l, W_l). Returns Outputs."""
        logits, edges, quality = [], [], []
        for scale, feature in zip(self.scales, pyramid, strict=True):
            logits.append(flatten(self.classify(self.class_tower(feature)), 1))
            sides = self.regress(self.box_tower(feature)).float() * scale
            edges.append(flatten(sides, 4))  # (N, A_l, 4, R + 1)
            if self.quality is not None:
                quality.append(self._quality(edges[-1], feature.shape[2:]))
        return Outputs(torch.cat(logits, dim=1).squeeze(2).float(), torch.cat(edges, dim=1), pyramid,
                       torch.cat(quality, dim=1) if quality else None)

    def _quality(self, edges: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """(N, A_l, 4, R + 1) logits of a level of `size` (H_l, W_l) -> (N, A_l, 1)."""
        top = edges.softmax(dim=-1).topk(4, dim=-1).values
        statistics = torch.cat([top, top.mean(dim=-1, keepdim=True)], dim=-1).flatten(2)  # (N, A_l, 20)
        with torch.autocast(edges.device.type, enabled=False):  # bf16 would leave a dozen different qualities
            found = self.quality(statistics.transpose(1, 2).unflatten(2, size))  # (N, 1, H_l, W_l)
        return flatten(found, 1).squeeze(2)
