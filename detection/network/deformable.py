"""Deformable convolutions.

Backbones have torchvision's operator, with strides, groups and modulations. `deformable_convolution` is the plain kind
of LTD, which is trained on CPUs too, where that operator is the slowest part of a step."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import register_flop_formula
from torchvision.ops import DeformConv2d


@register_flop_formula(torch.ops.torchvision.deform_conv2d)
def convolution_flops(x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    """What torch's counter counts for the operator: the FLOPs of an ordinary convolution of these shapes."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def as_places(offsets: torch.Tensor) -> torch.Tensor:
    """Offsets in which NaN is 0: it would pass the checks that a place is within the map. A network that has diverged
    ends by its loss all the same, as the map that is sampled has NaN too."""
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


def deformable_convolution(feature: torch.Tensor, offsets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Deformable convolution (Dai et al., ICCV 2017) by a 3x3 kernel, with zeros around the map.

    feature: (N, C, H, W). offsets: (N, 18, H, W), for each of the 9 taps, row by row, its shift in y and in x, in
    pixels, none NaN. weight: (C', C, 3, 3). Returns (N, C', H, W).

    Values and gradients are those of torchvision.ops.deform_conv2d, whose kernel for CPUs goes pixel by pixel: with it
    a training step of LTD takes two to four times as long there. A sample here is a weighted sum of four rows of C
    channels, in fp32."""
    images, channels, height, width = feature.shape
    device = feature.device
    tap = torch.arange(9, device=device)
    shift_y, shift_x = offsets.float().permute(0, 2, 3, 1).unflatten(3, (9, 2)).unbind(4)  # (N, H, W, 9) each
    y = torch.arange(height, device=device)[:, None, None] + tap // 3 - 1 + shift_y
    x = torch.arange(width, device=device)[:, None] + tap % 3 - 1 + shift_x
    rows, row_shares = neighbours(y, height)  # (N, H, W, 9, 2) each
    columns, column_shares = neighbours(x, width)
    image = torch.arange(images, device=device).view(-1, 1, 1, 1, 1, 1)
    pixels = (image * height + rows[..., :, None]) * width + columns[..., None, :]  # (N, H, W, 9, 2, 2)
    shares = row_shares[..., :, None] * column_shares[..., None, :]
    table = feature.float().permute(0, 2, 3, 1).reshape(-1, channels)  # (N * H * W, C)
    samples = F.embedding_bag(pixels.reshape(-1, 4), table, mode="sum",
                              per_sample_weights=shares.reshape(-1, 4))  # (N * H * W * 9, C)
    kernel = weight.permute(2, 3, 1, 0).flatten(0, 2)  # (9 * C, C')
    return (samples.view(images, height, width, -1) @ kernel).permute(0, 3, 1, 2)


def neighbours(places: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two whole coordinates around each of the `places` (...) on an axis, int64 within 0..size - 1, and their
    shares in a linear interpolation, 0 for one that is outside the map: (..., 2) each."""
    first = places.detach().floor()
    found = first[..., None] + torch.arange(2, device=places.device)
    shares = torch.stack([first + 1 - places, places - first], dim=-1) * ((found >= 0) & (found < size))
    return found.clamp(0, size - 1).long(), shares
