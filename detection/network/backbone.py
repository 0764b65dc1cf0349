"""The ResNet under a detector, and where its weights come from: nowhere, ImageNet, or a file."""

from collections.abc import Mapping

import torch
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from common.files import check_entries
from common.weights import imagenet_state, with_batch_counts
from detection.data.transforms import MEAN, STD
from resnet50 import read_weights

# depth: (block, blocks of each layer, channels of C3, C4, C5)
DEPTHS = {18: (BasicBlock, [2, 2, 2, 2], (128, 256, 512)), 34: (BasicBlock, [3, 4, 6, 3], (128, 256, 512)),
          50: (Bottleneck, [3, 4, 6, 3], (512, 1024, 2048)), 101: (Bottleneck, [3, 4, 23, 3], (512, 1024, 2048))}
LUMA = (0.299, 0.587, 0.114)  # how much red, green and blue make grey (ITU-R BT.601, as Pillow converts)


class Backbone(ResNet):
    """torchvision's ResNet-18/34/50/101 without its classifier.

    frozen: the published fine-tuning. Stem and layer1 get no gradient, and ALL batch norms keep their running
    statistics, while the scale and shift of those in layer2 to layer4 are trained."""

    def __init__(self, depth: int, frozen: bool):
        block, blocks, self.out_channels = DEPTHS[depth]
        super().__init__(block, blocks)
        del self.fc, self.avgpool
        self.frozen = frozen
        if frozen:
            for module in (self.conv1, self.bn1, self.layer1):
                module.requires_grad_(False)

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        if self.frozen:
            for module in self.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """images: (N, 3, H, W), normalised. Returns C3, C4, C5 with strides 8, 16, 32."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        c3 = self.layer2(self.layer1(x))
        c4 = self.layer3(c3)
        return c3, c4, self.layer4(c4)


def initialise(backbone: Backbone, depth: int, init: str) -> str:
    """Fill `backbone` in place as `init` says; returns in words what was loaded.

    init: `none`; `imagenet` (torchvision's IMAGENET1K_V1); or a file: torchvision's, or a checkpoint of this project's
    recognition stages (a ResNet-50). Raises UserError for weights that cannot be fetched or do not fit."""
    if init == "none":
        return "random weights"
    state = imagenet_state(depth) if init == "imagenet" else read_weights(init)[0]
    state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    grey = getattr(state.get("conv1.weight"), "shape", ()) == (64, 1, 7, 7)
    expected = backbone.state_dict()
    if grey:
        expected["conv1.weight"] = expected["conv1.weight"][:, :1]
    state = with_batch_counts(state, backbone)
    check_entries(f"--init {init}", state, expected, f"a ResNet-{depth} without its classifier")
    backbone.load_state_dict(in_colour(state) if grey else state)
    return f"{len(state)} entries from {init}" + " (its grey stem sees the grey of the colours)" * grey


def in_colour(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A recognition network's state dict with a stem that takes normalised colours in place of grey in -1..1.

    grey = 2 * sum_c luma_c * (std_c * x_c + mean_c) / 255 - 1: the factors go into the convolution, and the constant
    into the running mean of the batch norm after it."""
    luma, mean, std = (torch.tensor(values) for values in (LUMA, MEAN, STD))
    stem = state["conv1.weight"].float()  # (64, 1, 7, 7)
    constant = 2 * (luma * mean).sum() / 255 - 1
    return {**state, "conv1.weight": stem * (2 * luma * std / 255)[None, :, None, None],
            "bn1.running_mean": state["bn1.running_mean"] - constant * stem.sum(dim=(1, 2, 3))}
