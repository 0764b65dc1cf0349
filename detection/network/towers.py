"""What the heads have in common: towers of convolutions, their start, and maps as rows of locations."""

import math
from functools import partial

import torch
from torch import nn
from torchvision.ops import Conv2dNormActivation

PRIOR = 0.01  # the score that every anchor starts from, so that the many negatives do not drown the rest


def tower(channels: int, convs: int) -> nn.Sequential:
    """`convs` 3x3 convolutions of `channels` channels, each with group norm of 32 groups and ReLU."""
    norm = partial(nn.GroupNorm, 32)
    return nn.Sequential(*(Conv2dNormActivation(channels, channels, 3, norm_layer=norm, bias=False)
                           for _ in range(convs)))


def initialise_head(head: nn.Module, classify: nn.Conv2d) -> None:
    """The start of a head's convolutions, in place: small weights, no bias, but scores of PRIOR from `classify`."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.constant_(classify.bias, logit(PRIOR))


def logit(probability: float) -> float:
    """The inverse of the sigmoid."""
    return math.log(probability / (1 - probability))


def flatten(feature: torch.Tensor, groups: int) -> torch.Tensor:
    """(N, groups * K, H, W) -> (N, H * W, groups, K): locations row by row."""
    return feature.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (groups, -1))
