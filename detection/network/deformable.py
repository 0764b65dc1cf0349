"""Deformable convolutions."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import register_flop_formula
from torchvision.ops import DeformConv2d


@register_flop_formula(torch.ops.torchvision.deform_conv2d)
def convolution_flops(x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    """What torch's counter counts for the operator: the FLOPs of an ordinary convolution of these shapes."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def as_places(offsets: torch.Tensor) -> torch.Tensor:
    """Offsets in which NaN is 0: it would pass the operator's checks that a place is within the map. A network that has
    diverged ends by its loss all the same, as the map that is sampled has NaN too."""
    return offsets.nan_to_num()


class ModulatedDeformConv2d(DeformConv2d):
    """A 3x3 convolution that samples its input at learned places (DCNv2: Zhu et al., CVPR 2019, eq. 1).

    y(p) = sum_k w_k * m_k(p) * x(p + p_k + d_k(p)), bilinear between pixels, over the 9 places p_k of the kernel. The
    offsets d (dy, dx of each place, in pixels) and the modulations m, sigmoids, are a convolution of the input, which
    starts at zero: d = 0 and m = 1/2.

    plain: the nn.Conv2d to replace, whose weights it takes over."""

    def __init__(self, plain: nn.Conv2d):
        super().__init__(plain.in_channels, plain.out_channels, 3, plain.stride, padding=1, groups=plain.groups,
                         bias=False)
        self.weight = plain.weight
        self.conv_offset = nn.Conv2d(plain.in_channels, 2 * 9 + 9, 3, plain.stride, padding=1)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (N, in_channels, H, W). Returns (N, out_channels, H', W') in the precision of x; computes in fp32, as the
        operator has no bf16 on a CPU."""
        offsets, modulations = self.conv_offset(x).float().split((18, 9), dim=1)
        return super().forward(x.float(), as_places(offsets), modulations.sigmoid()).to(x.dtype)
