"""Weights of torchvision's ResNets: ImageNet's files, batch norm folded into convolutions, convolutions in bf16."""

import copy
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import get_model_weights

from common.runtime import UserError


def with_batch_counts(state: Mapping[str, torch.Tensor], network: nn.Module) -> dict[str, torch.Tensor]:
    """`state` with the `num_batches_tracked` of `network` where it has none: files of older releases of torchvision
    lack them, and with a fixed momentum nothing reads them."""
    counts = {name: value for name, value in network.state_dict().items() if name.endswith("num_batches_tracked")}
    return {**counts, **state}


def imagenet_state(depth: int) -> Mapping[str, torch.Tensor]:
    """The state dict of torchvision's ResNet of that depth (IMAGENET1K_V1). Raises UserError where it cannot be
    downloaded."""
    weights = get_model_weights(f"resnet{depth}").IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:  # a download that does not match its hash is a RuntimeError
        raise UserError(f"--init imagenet: torchvision's weights could not be fetched ({error}); download "
                        f"{weights.url} and give the file as --init FILE, or --init none")


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """A copy of `network` for inference alone: each batch norm, with its running statistics, is part of the convolution
    before it. In fp32 the logits stay the same up to rounding; on a CPU it saves about a third of the time."""
    network = copy.deepcopy(network).eval()
    pairs = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1"))  # the last pair: of a shortcut
    for module in list(network.modules()):
        for convolution, norm in pairs:
            if isinstance(getattr(module, norm, None), nn.BatchNorm2d):
                folded = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
                setattr(module, convolution, folded)
                setattr(module, norm, nn.Identity())
    return network


def cast_convolutions(network: nn.Module, dtype: torch.dtype) -> None:
    """Give the convolutions of a frozen network, in place, weights of `dtype`: bf16 once and for all, where autocast
    would cast them at every step, as it keeps no copy of weights that are not trained."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.to(dtype)
