"""The network of T2FTS: torchvision's ResNet-50 with a stem for grey images, and its initial weights: random, of
ImageNet, of a checkpoint of this project, or of the authors' released files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from common.files import check_entries, is_metadata, is_stored_whole, load_checkpoint
from common.images import is_value_range
from common.runtime import UserError
from common.weights import imagenet_state, with_batch_counts

# Required metadata of this project's checkpoints, and their types.
DESCRIPTION = {"stage": str, "classes": list, "groups": dict, "preprocessing": dict, "epoch": int, "selected_on": str}


class SmallMapConv2d(nn.Conv2d):
    """A convolution (1x1, or 3x3 with padding 1) that in training computes a small output as one matrix product: on a
    CPU this shortens the gradient of its weights to as little as a tenth of the time, and a whole step on images of
    64 x 64 to two thirds. Larger outputs, inference and GPUs are left to nn.Conv2d."""

    LARGEST = {1: 16 * 16, 3: 4 * 4}  # pixels of an output, by the side of the kernel

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images: (B, C_in, H, W). Returns (B, C_out, H/stride, W/stride)."""
        (size, _), (stride, _) = self.kernel_size, self.stride
        height, width = ((side - 1) // stride + 1 for side in images.shape[-2:])
        if not self.training or images.device.type != "cpu" or height * width > self.LARGEST[size]:
            return super().forward(images)
        pixels = images.permute(0, 2, 3, 1)
        if size == 1:
            patches = pixels[:, ::stride, ::stride]  # (B, H/stride, W/stride, C_in)
        else:
            windows = F.pad(pixels, (0, 0, 1, 1, 1, 1)).unfold(1, size, stride).unfold(2, size, stride)
            patches = windows.permute(0, 1, 2, 4, 5, 3).flatten(3)  # (B, H/stride, W/stride, size * size * C_in)
        return F.linear(patches, self.weight.permute(0, 2, 3, 1).flatten(1)).permute(0, 3, 1, 2)


class ResNet50(ResNet):
    """ResNet-50 over grey images. Convolutions start as N(0, sqrt(2 / (k * k * c_out))), batch norms as 1 / 0."""

    def __init__(self, num_classes: int):
        super().__init__(Bottleneck, [3, 4, 6, 3], num_classes=num_classes)
        self.conv1 = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for module in layer.modules():
                if isinstance(module, nn.Conv2d):
                    module.__class__ = SmallMapConv2d  # the same weights, computed with in another way

    def layer3_features(self, images: torch.Tensor) -> torch.Tensor:
        """f(x) of the paper. images: (B, 1, H, W) float in [-1, 1]. Returns (B, 1024, H/16, W/16)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))  # (B, 64, H/4, W/4)
        return self.layer3(self.layer2(self.layer1(x)))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """images: (B, 1, H, W). Returns the logits z(x) (B, classes) and the layer3 features f(x)
        (B, 1024, H/16, W/16)."""
        features = self.layer3_features(images)
        pooled = torch.flatten(self.avgpool(self.layer4(features)), 1)  # (B, 2048)
        return self.fc(pooled), features


def read_weights(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """A checkpoint file as (state dict in the names of ResNet50, description or None).

    Reads this project's checkpoints, plain state dicts, and the authors' released files: `conv2` is their stem,
    `fclass` their classifier, `conv1` a layer that their forward pass never used; a `module.` before every name is
    dropped. The description is the metadata of this project's checkpoints (stage, classes, preprocessing, ...). Raises
    UserError for anything else."""
    content = load_checkpoint(path)
    description = None
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content, description = content["model"], content.get("description")
        description = description if is_description(description) else None
    if not isinstance(content, dict) or not content or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()):
        raise UserError(f"{path}: not a state dict; expected names with tensors, or a checkpoint of this project")
    for name, value in content.items():
        if not is_stored_whole(value):
            raise UserError(f"{path}: {name[:80]} is no dense tensor of numbers ({value.layout}, {value.dtype})")
    state = dict(content)
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    if "fclass.weight" in state and "conv2.weight" in state:
        state.pop("conv1.weight", None)
        renamed = {"conv2.weight": "conv1.weight", "fclass.weight": "fc.weight", "fclass.bias": "fc.bias"}
        state = {renamed.get(name, name): value for name, value in state.items()}
    return state, description


def is_description(value: Any) -> bool:
    """Whether `value` is the metadata of a checkpoint of this project, each part of its type and range."""
    if not is_metadata(value, DESCRIPTION):
        return False
    size = value["preprocessing"].get("image_size")
    return (type(size) is int and 32 <= size <= 4096 and is_value_range(value["preprocessing"].get("value_range"))
            and all(isinstance(ids, list) and all(type(each) is int for each in ids)
                    for ids in value["groups"].values()))


def load_state(network: ResNet50, state: dict[str, torch.Tensor], path: str | Path) -> None:
    """Load a state dict into `network`. Raises UserError naming the first missing, unknown or misshapen entry."""
    expected = network.state_dict()
    classifier = state.get("fc.weight")
    if classifier is not None and classifier.ndim and classifier.shape[:1] != expected["fc.weight"].shape[:1]:
        raise UserError(f"{path}: is for {classifier.shape[0]} classes; the data set has {network.fc.out_features}")
    check_entries(path, state, expected, "ResNet-50")
    network.load_state_dict(state)


def load_network(path: str | Path, num_classes: int) -> tuple[ResNet50, dict[str, Any] | None]:
    """A ResNet50 with the weights of a file, and the file's description (None for plain state dicts)."""
    state, description = read_weights(path)
    network = ResNet50(num_classes)
    load_state(network, state, path)
    return network, description


def initialise(network: ResNet50, init: str) -> tuple[str, dict[str, Any] | None]:
    """Load the initial weights into `network`. Returns a message on the entries that were loaded and those that were
    not, and the description in the file, None without one.

    init: `none`; `imagenet` (torchvision's weights); or a file: a checkpoint of the same classes, or torchvision's
    ResNet-50 file, for machines that cannot download it."""
    if init == "none":
        return "random weights", None
    if init == "imagenet":
        return _load_imagenet(network, imagenet_state("resnet50"), "ImageNet"), None
    state, description = read_weights(init)
    if getattr(state.get("conv1.weight"), "shape", ())[1:2] == (3,):
        return _load_imagenet(network, state, init), None
    load_state(network, state, init)
    origin = f", {description['stage']} at epoch {description['epoch']}" if description else ""
    return f"all {len(state)} entries from {init}{origin}", description


def _load_imagenet(network: ResNet50, state: Mapping[str, torch.Tensor], source: str) -> str:
    """Load a 3-channel, 1000-class ResNet-50: the stem summed over its input channels, the classifier kept."""
    new = {"fc.weight": network.fc.weight.detach(), "fc.bias": network.fc.bias.detach()}
    stem = state["conv1.weight"].sum(dim=1, keepdim=True)  # a grey pixel is the same value in all three channels
    load_state(network, {**with_batch_counts(state, network), **new, "conv1.weight": stem}, source)
    return f"{len(state) - 2} entries from {source} (stem summed over its 3 input channels), new: fc.weight, fc.bias"
