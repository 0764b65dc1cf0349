"""The detector: backbone, feature pyramid, head."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from detection.geometry.anchors import RETINA, SQUARE, AnchorGrid, Anchors, make_anchors
from detection.geometry.oriented import ORIENTED_SELECTION
from detection.geometry.suppression import PAA_SELECTION, Selection
from detection.network import gfl_head as gfl
from detection.network import paa_head as paa
from detection.network.backbone import Backbone
from detection.network.pyramid import FeaturePyramid
from detection.network.rotated_head import RotatedRetinaHead


@dataclass(frozen=True)
class Architecture:
    """The parts of a detector, as plain values that its checkpoints hold. The defaults are the published ones."""

    depth: int = 50  # of the backbone
    channels: int = 256  # of pyramid and towers
    tower_convs: int = 4  # convolutions of each tower
    reg_max: int = 16  # R: of R + 1 bins; of GFL also the largest distance to a side, in strides
    quality: bool = False  # GFocal V2's quality branch; of the head gfl
    head: str = "gfl"  # of HEADS
    backbone: str = "resnet"  # of FAMILIES
    dcn: str = "none"  # of DCN: where the backbone is deformable
    auxiliary: str = "iou"  # of paa_head.AUXILIARIES; of the head paa
    cop_padding: str = "prob0"  # of paa_head.COP_PADDINGS; of the head paa
    anchor_size: float = 1.0  # sides of the anchors, in those of the head's grid

    @classmethod
    def of(cls, settings: Any, head: str) -> "Architecture":
        """That of a detector with this head which the settings of the same names describe."""
        return cls(**{each.name: getattr(settings, each.name, each.default) for each in fields(cls)} | {"head": head})

    @property
    def kind(self) -> "HeadKind":
        """What goes with the head."""
        return HEADS[self.head]

    @property
    def grid(self) -> AnchorGrid:
        """The anchors of a location."""
        return self.kind.grid.scaled(self.anchor_size)


@dataclass(frozen=True)
class HeadKind:
    """A head, and what of the detector goes with it.

    build: the head of C classes and an Architecture. Its outputs have `logits`, `features`, `scores`, `boxes(anchors)`
    and `sizes`, as gfl_head.Outputs. grid: the published anchors of a location. p6_of_c5: see FeaturePyramid. oriented:
    whether its boxes are, (..., 5). selection: which of them are detections. least_reg_max: of the Architecture."""

    build: Callable[[int, Architecture], nn.Module]
    grid: AnchorGrid = SQUARE
    p6_of_c5: bool = False
    oriented: bool = False
    selection: Selection = Selection()
    least_reg_max: int = 4


def gfl_head(num_classes: int, architecture: Architecture) -> gfl.GFLHead:
    """The GFLHead of an Architecture."""
    return gfl.GFLHead(num_classes, architecture.channels, architecture.tower_convs, architecture.reg_max,
                       architecture.quality)


def paa_head(num_classes: int, architecture: Architecture) -> paa.PAAHead:
    """The PAAHead of an Architecture."""
    return paa.PAAHead(num_classes, architecture.channels, architecture.tower_convs, architecture.auxiliary,
                       architecture.cop_padding)


def rotated_head(num_classes: int, architecture: Architecture) -> RotatedRetinaHead:
    """The RotatedRetinaHead of an Architecture."""
    return RotatedRetinaHead(num_classes, architecture.channels, architecture.tower_convs, architecture.reg_max)


# The heads that a checkpoint may name.
HEADS = {"gfl": HeadKind(gfl_head),
         "paa": HeadKind(paa_head, selection=PAA_SELECTION),
         "rotated": HeadKind(rotated_head, RETINA, p6_of_c5=True, oriented=True, selection=ORIENTED_SELECTION,
                             least_reg_max=0)}


class Detector(nn.Module):
    """Backbone, feature pyramid, and the head that the Architecture names.

    num_classes: C. architecture: Architecture. frozen: fine-tune the backbone the published way (see Backbone)."""

    def __init__(self, num_classes: int, architecture: Architecture, frozen: bool = False):
        super().__init__()
        self.num_classes, self.architecture = num_classes, architecture
        self.backbone = Backbone(architecture.depth, frozen, architecture.backbone, architecture.dcn)
        self.neck = FeaturePyramid(self.backbone.out_channels, architecture.channels, architecture.kind.p6_of_c5)
        self.head = architecture.kind.build(num_classes, architecture)

    def forward(self, images: torch.Tensor) -> Any:
        """images: (N, 3, H, W) normalised colours, H and W multiples of 32. Returns the outputs of the head."""
        return self.head(self.neck(self.backbone(images)))

    def anchors(self, sizes: tuple[tuple[int, int], ...], device: torch.device) -> Anchors:
        """The Anchors that the head predicts for. sizes: ((H_l, W_l), ...) of the levels."""
        return make_anchors(sizes, device, self.architecture.grid)

    def suppression(self, name: str) -> str:
        """The name of the suppression that `name` asks for: see Selection.named."""
        return self.architecture.kind.selection.named(name)
