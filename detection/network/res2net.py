"""What a Res2Net has in place of a ResNet's parts (Gao et al., TPAMI 2021), under mmdetection's names."""

from typing import Any

import torch
from torch import nn
from torchvision.models.resnet import Bottleneck


class Res2NetBlock(Bottleneck):
    """A bottleneck with a hierarchy of 3x3 convolutions K_i over s parts x_i of its channels (section 3.1):

    y_1 = K_1(x_1), y_i = K_i(x_i + y_{i-1}), y_s = x_s. In the first block of a layer y_i is K_i(x_i), and where these
    are strided, y_s is pooled. Of the arguments, torchvision's, `groups` is s and `base_width` the width of a part in
    layer1."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        scales, width = self.conv2.groups, self.conv2.in_channels // self.conv2.groups
        del self.conv2, self.bn2
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, self.stride, padding=1, bias=False)
                                   for _ in range(scales - 1))
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(scales - 1))
        self.pool = nn.AvgPool2d(3, self.stride, padding=1) if self.stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *parts, last = self.relu(self.bn1(self.conv1(x))).chunk(len(self.convs) + 1, dim=1)  # (N, width, H, W) each
        scales: list[torch.Tensor] = []
        for part, convolution, norm in zip(parts, self.convs, self.bns, strict=True):
            if scales and self.downsample is None:
                part = part + scales[-1]
            scales.append(self.relu(norm(convolution(part))))
        y = self.bn3(self.conv3(torch.cat([*scales, self.pool(last)], dim=1)))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


def deep_stem() -> nn.Sequential:
    """Three 3x3 convolutions in place of the 7x7 one: (N, 3, H, W) -> (N, 64, H/2, W/2)."""
    layers: list[nn.Module] = []
    for channels, outputs, stride in ((3, 32, 2), (32, 32, 1), (32, 64, 1)):
        convolution = nn.Conv2d(channels, outputs, 3, stride, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def pooled_shortcut(convolution: nn.Conv2d, norm: nn.Module) -> nn.Sequential:
    """A strided shortcut that pools and then convolves, so that no pixel is left out."""
    pool = nn.AvgPool2d(convolution.stride, ceil_mode=True)
    convolution.stride = (1, 1)
    return nn.Sequential(pool, convolution, norm)
