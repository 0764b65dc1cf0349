"""The ResNet, ResNeXt or Res2Net under a detector, and where its weights come from: nowhere, ImageNet, or a file."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from common.files import check_entries
from common.weights import imagenet_state, with_batch_counts
from detection.data.transforms import MEAN, STD
from detection.network.deformable import ModulatedDeformConv2d
from detection.network.res2net import Res2NetBlock, deep_stem, pooled_shortcut
from resnet50 import read_weights

# depth: (block, blocks of each layer, channels of C3, C4, C5)
DEPTHS = {18: (BasicBlock, [2, 2, 2, 2], (128, 256, 512)), 34: (BasicBlock, [3, 4, 6, 3], (128, 256, 512)),
          50: (Bottleneck, [3, 4, 6, 3], (512, 1024, 2048)), 101: (Bottleneck, [3, 4, 23, 3], (512, 1024, 2048))}


class Family(NamedTuple):
    """Backbones that differ in depth alone. {} stands for the depth."""

    name: str
    torchvision: str  # the model that has their ImageNet weights, if there is one
    groups: int  # of a bottleneck's middle convolution; parts of a Res2NetBlock
    width: int  # channels of each in layer1


FAMILIES = {"resnet": Family("ResNet-{}", "resnet{}", 1, 64),
            "resnext": Family("ResNeXt-{} 32x4d", "resnext{}_32x4d", 32, 4),
            "res2net": Family("Res2Net-{} 26w x 4s", "res2net{}", 4, 26)}
DCN = {"none": (), "c3-c5": ("layer2", "layer3", "layer4"), "c4-c5": ("layer3", "layer4")}  # deformable layers
LUMA = (0.299, 0.587, 0.114)  # how much red, green and blue make grey (ITU-R BT.601, as Pillow converts)


def is_backbone(depth: Any, family: Any, dcn: Any) -> bool:
    """Whether these describe a Backbone. Those but the plain ResNet are made of bottlenecks, as from depth 50 on."""
    return (type(depth) is int and depth in DEPTHS and family in tuple(FAMILIES) and dcn in tuple(DCN)
            and (DEPTHS[depth][0] is Bottleneck or (family, dcn) == ("resnet", "none")))


def backbone_name(depth: int, family: str, dcn: str) -> str:
    """Human-readable name of a Backbone."""
    return FAMILIES[family].name.format(depth) + (f" with deformable convolutions in {dcn}" if DCN[dcn] else "")


class Backbone(ResNet):
    """torchvision's ResNet-18/34/50/101 without its classifier, or one of its relatives.

    depth, family, dcn: keys of DEPTHS, FAMILIES and DCN, for which is_backbone holds.
    frozen: the published fine-tuning. Stem and layer1 get no gradient, and ALL batch norms keep their running
    statistics, while the scale and shift of those in layer2 to layer4 are trained."""

    def __init__(self, depth: int, frozen: bool, family: str = "resnet", dcn: str = "none"):
        block, blocks, self.out_channels = DEPTHS[depth]
        _, torchvision, groups, width = FAMILIES[family]
        super().__init__(Res2NetBlock if family == "res2net" else block, blocks, groups=groups, width_per_group=width)
        self.name, self.torchvision = backbone_name(depth, family, dcn), torchvision.format(depth)
        self.frozen = frozen
        del self.fc, self.avgpool
        if family == "res2net":
            self.stem = deep_stem()
            del self.conv1, self.bn1
            for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
                layer[0].downsample = pooled_shortcut(*layer[0].downsample)
        for layer in DCN[dcn]:
            for each in getattr(self, layer):
                if family == "res2net":
                    each.convs = nn.ModuleList(ModulatedDeformConv2d(plain) for plain in each.convs)
                else:
                    each.conv2 = ModulatedDeformConv2d(each.conv2)
        if frozen:
            for module in (*self.stem_modules, self.layer1):
                module.requires_grad_(False)

    @property
    def stem_modules(self) -> tuple[nn.Module, ...]:
        """What an image passes before it is pooled."""
        return (self.stem,) if hasattr(self, "stem") else (self.conv1, self.bn1, self.relu)

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        if self.frozen:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """images: (N, 3, H, W), normalised. Returns C3, C4, C5 with strides 8, 16, 32."""
        x = images
        for module in self.stem_modules:
            x = module(x)
        c3 = self.layer2(self.layer1(self.maxpool(x)))
        c4 = self.layer3(c3)
        return c3, c4, self.layer4(c4)


def initialise(backbone: Backbone, init: str) -> str:
    """Fill `backbone` in place as `init` says; returns in words what was loaded.

    init: `none`; `imagenet` (torchvision's IMAGENET1K_V1); or a file: torchvision's, mmdetection's, or a checkpoint of
    this project's recognition stages (a ResNet-50). Offsets of deformable convolutions, which classifiers do not have,
    stay at zero. Raises UserError for weights that cannot be fetched or do not fit."""
    if init == "none":
        return "random weights"
    state = imagenet_state(backbone.torchvision) if init == "imagenet" else read_weights(init)[0]
    state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    expected = backbone.state_dict()
    grey = "conv1.weight" in expected and getattr(state.get("conv1.weight"), "shape", ()) == (64, 1, 7, 7)
    if grey:
        expected["conv1.weight"] = expected["conv1.weight"][:, :1]
    state = {**{name: value for name, value in expected.items() if ".conv_offset." in name},
             **with_batch_counts(state, backbone)}
    check_entries(f"--init {init}", state, expected, f"a {backbone.name} without its classifier")
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
