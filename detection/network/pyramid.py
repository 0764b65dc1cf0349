"""The feature pyramid of a detector."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class StridedConv2d(nn.Conv2d):
    """A 3x3 convolution of stride 2. On a CPU a map of one column is convolved in the precision of the weights: torch's
    bf16 leaves parts of the weights' gradient unset there."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, stride=2, padding=1)

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        """feature: (N, in_channels, H, W). Returns (N, out_channels, ceil(H / 2), ceil(W / 2))."""
        if feature.device.type == "cpu" and feature.shape[3] == 1:
            with torch.autocast("cpu", enabled=False):
                return super().forward(feature.to(self.weight.dtype))
        return super().forward(feature)


class FeaturePyramid(nn.Module):
    """C3, C4, C5 -> P3 to P7 (Lin et al., CVPR 2017). P6 is made of P5, with `p6_of_c5` of C5 (RetinaNet, ICCV 2017),
    and P7 of P6, without ReLU between them."""

    def __init__(self, in_channels: Sequence[int], channels: int, p6_of_c5: bool = False):
        super().__init__()
        self.p6_of_c5 = p6_of_c5
        self.lateral = nn.ModuleList(nn.Conv2d(count, channels, 1) for count in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        self.extra = nn.ModuleList(StridedConv2d(count, channels)
                                   for count in (in_channels[-1] if p6_of_c5 else channels, channels))
        for convolution in (*self.lateral, *self.output, *self.extra):
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.zeros_(convolution.bias)

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """maps: C3, C4, C5. Returns [P3, ..., P7], (N, channels, H_l, W_l)."""
        merged = [lateral(feature) for lateral, feature in zip(self.lateral, maps, strict=True)]
        for fine in (1, 0):
            merged[fine] = merged[fine] + F.interpolate(merged[fine + 1], size=merged[fine].shape[2:], mode="nearest")
        pyramid = [output(feature) for output, feature in zip(self.output, merged, strict=True)]
        p6 = self.extra[0](maps[-1] if self.p6_of_c5 else pyramid[-1])
        return [*pyramid, p6, self.extra[1](p6)]
