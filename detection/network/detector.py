"""The detector: backbone, feature pyramid, head."""

from dataclasses import dataclass

import torch
from torch import nn

from detection.geometry.anchors import Anchors, make_anchors
from detection.network import gfl_head as gfl
from detection.network import paa_head as paa
from detection.network.backbone import Backbone
from detection.network.pyramid import FeaturePyramid


@dataclass(frozen=True)
class Architecture:
    """The parts of a detector, as plain values that its checkpoints hold. The defaults are the published ones."""

    depth: int = 50  # of the backbone
    channels: int = 256  # of pyramid and towers
    tower_convs: int = 4  # convolutions of each tower
    reg_max: int = 16  # R: the largest distance to a side, in strides; of the head gfl
    quality: bool = False  # GFocal V2's quality branch; of the head gfl
    head: str = "gfl"  # of HEADS
    backbone: str = "resnet"  # of FAMILIES
    dcn: str = "none"  # of DCN: where the backbone is deformable
    auxiliary: str = "iou"  # of paa_head.AUXILIARIES; of the head paa
    cop_padding: str = "prob0"  # of paa_head.COP_PADDINGS; of the head paa


def gfl_head(num_classes: int, architecture: Architecture) -> gfl.GFLHead:
    """The GFLHead of an Architecture."""
    return gfl.GFLHead(num_classes, architecture.channels, architecture.tower_convs, architecture.reg_max,
                       architecture.quality)


def paa_head(num_classes: int, architecture: Architecture) -> paa.PAAHead:
    """The PAAHead of an Architecture."""
    return paa.PAAHead(num_classes, architecture.channels, architecture.tower_convs, architecture.auxiliary,
                       architecture.cop_padding)


# The heads that a checkpoint may name, as functions of C and the Architecture.
HEADS = {"gfl": gfl_head, "paa": paa_head}
SUPPRESSION_OF = {"gfl": "nms", "paa": "nms-voting"}  # with which the published results of a head were tested


def suppression_of(head: str, name: str) -> str:
    """The name of the suppression that `name` asks for: auto is that of the head's published results."""
    return SUPPRESSION_OF[head] if name == "auto" else name


class Detector(nn.Module):
    """Backbone, feature pyramid, and the head that the Architecture names.

    num_classes: C. architecture: Architecture. frozen: fine-tune the backbone the published way (see Backbone)."""

    def __init__(self, num_classes: int, architecture: Architecture, frozen: bool = False):
        super().__init__()
        self.num_classes, self.architecture = num_classes, architecture
        self.backbone = Backbone(architecture.depth, frozen, architecture.backbone, architecture.dcn)
        self.neck = FeaturePyramid(self.backbone.out_channels, architecture.channels)
        self.head = HEADS[architecture.head](num_classes, architecture)

    def forward(self, images: torch.Tensor) -> gfl.Outputs | paa.Outputs:
        """images: (N, 3, H, W) normalised colours, H and W multiples of 32. Returns the Outputs of the head."""
        return self.head(self.neck(self.backbone(images)))

    def anchors(self, sizes: tuple[tuple[int, int], ...], device: torch.device) -> Anchors:
        """The Anchors that the head predicts for. sizes: ((H_l, W_l), ...) of the levels."""
        return make_anchors(sizes, device)

    def suppression(self, name: str) -> str:
        """The `suppression_of` this detector."""
        return suppression_of(self.architecture.head, name)
