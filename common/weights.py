"""Weights of ResNets and their kin: ImageNet's files, batch norm folded into convolutions, convolutions in bf16."""

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import get_model_weights, list_models

from common.runtime import UserError


def with_batch_counts(state: Mapping[str, torch.Tensor], network: nn.Module) -> dict[str, torch.Tensor]:
    """`state` with the `num_batches_tracked` of `network` where it has none: files of older releases of torchvision
    lack them, and with a fixed momentum nothing reads them."""
    counts = {name: value for name, value in network.state_dict().items() if name.endswith("num_batches_tracked")}
    return {**counts, **state}


def imagenet_state(model: str) -> Mapping[str, torch.Tensor]:
    """The state dict of torchvision's model of that name (IMAGENET1K_V1). Raises UserError where there is none, or it
    cannot be downloaded."""
    if model not in list_models():
        raise UserError(f"--init imagenet: torchvision has no weights of {model}; give a file of them as --init FILE, "
                        "or --init none")
    weights = get_model_weights(model).IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:  # a download that does not match its hash is a RuntimeError
        raise UserError(f"--init imagenet: torchvision's weights could not be fetched ({error}); download "
                        f"{weights.url} and give the file as --init FILE, or --init none")


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """A copy of `network` for inference alone: each batch norm, with its running statistics, is part of the convolution
    before it. In fp32 the logits stay the same up to rounding; on a CPU it saves about a third of the time."""
    network = copy.deepcopy(network).eval()
    modules: dict[str, Any] = dict(network.named_modules())
    for name, norm in modules.items():
        if isinstance(norm, nn.BatchNorm2d):
            before = convolution_before(name)
            for place, module in ((before, fuse_conv_bn_eval(modules[before], norm)), (name, nn.Identity())):
                parent, _, child = place.rpartition(".")
                setattr(modules[parent], child, module)
    return network


def convolution_before(norm: str) -> str:
    """The name of the convolution before a batch norm of that name: layer1.0.conv2 of layer1.0.bn2, convs.2 of bns.2,
    and in a sequence 0 of 1."""
    if re.search(r"\bbn", norm):
        return re.sub(r"\bbn", "conv", norm)
    parent, _, number = norm.rpartition(".")
    return f"{parent}.{int(number) - 1}"


def cast_convolutions(network: nn.Module, dtype: torch.dtype) -> None:
    """Give the convolutions of a frozen network, in place, weights of `dtype`: bf16 once and for all, where autocast
    would cast them at every step, as it keeps no copy of weights that are not trained."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.to(dtype)
