"""The calibration network of LTD, which stands between a student's feature pyramid and its teacher's in training alone
(layer-calibration and task-disentangle distillation, TGRS 2023). The layout is that of the authors' released code."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import DeformConv2d

from detection.geometry.anchors import STRIDES
from detection.network.deformable import as_places, deformable_convolution


@dataclass
class CalibratedMaps:
    """A student's pyramid, made ready to be compared with the teacher's. Each list has 5 maps (N, channels, H_l, W_l),
    P3 first."""

    fused: list[torch.Tensor]  # a level and, from coarse to fine, all coarser ones
    projected: list[torch.Tensor]  # a level by itself


class CalibrationNetwork(nn.Module):
    """Cross-layer calibration (CCD): x_i = BN(Conv1x1(F_i)) of each student level F_i; from the coarsest to the finest

        r_i = alpha * x_i + beta * up(r_{i+1}),   (alpha, beta) = sigmoid(Conv1x1([x_i; up(r_{i+1})]))   per location,

    the coarsest r_i being x_i. The fused map is BN(LIC(r_i)), the projected one Conv1x1(F_i). A level of the teacher,
    with which the fused map of its level is compared, thus teaches all student levels that are as coarse or coarser.

    channels: of all maps. lic: without it an ordinary 3x3 convolution is in the place of LIC. zero_offsets: see
    LocalCalibration. Batch norms are those of each process."""

    def __init__(self, channels: int, lic: bool = True, zero_offsets: bool = True):
        super().__init__()

        def normed(convolution: nn.Module) -> nn.Sequential:
            return nn.Sequential(convolution, nn.BatchNorm2d(channels))

        def calibration() -> nn.Module:
            if lic:
                return LocalCalibration(channels, zero_offsets)
            return nn.Conv2d(channels, channels, 3, padding=1, bias=False)

        self.lateral = nn.ModuleList(normed(nn.Conv2d(channels, channels, 1, bias=False)) for _ in STRIDES)
        self.gates = nn.ModuleList(nn.Conv2d(2 * channels, 2, 1) for _ in STRIDES[:-1])
        self.output = nn.ModuleList(normed(calibration()) for _ in STRIDES)
        self.project = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in STRIDES)

    def forward(self, pyramid: Sequence[torch.Tensor]) -> CalibratedMaps:
        """pyramid: the student's P3 to P7, (N, channels, H_l, W_l)."""
        merged = [lateral(feature) for lateral, feature in zip(self.lateral, pyramid, strict=True)]
        for level in reversed(range(len(self.gates))):
            own = merged[level]
            above = F.interpolate(merged[level + 1], size=own.shape[2:], mode="nearest")
            gate = self.gates[level](torch.cat([own, above], dim=1)).sigmoid()  # (N, 2, H_l, W_l)
            merged[level] = gate[:, :1] * own + gate[:, 1:] * above
        return CalibratedMaps([output(feature) for output, feature in zip(self.output, merged, strict=True)],
                              [project(feature) for project, feature in zip(self.project, pyramid, strict=True)])


class LocalCalibration(DeformConv2d):
    """Local implicit calibration (LIC): a deformable 3x3 convolution (Dai et al., ICCV 2017), which samples each
    location's surroundings at places that another convolution chooses.

    zero_offsets: begin as an ordinary convolution. The released code begins at random places."""

    def __init__(self, channels: int, zero_offsets: bool):
        super().__init__(channels, channels, 3, padding=1, bias=False)
        self.offsets = nn.Conv2d(channels, 2 * 9, 3, padding=1, bias=False)
        if zero_offsets:
            nn.init.zeros_(self.offsets.weight)

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        """feature: (N, channels, H, W). Returns the same shape. Samples in fp32."""
        offsets = as_places(self.offsets(feature).float())
        if feature.device.type == "cpu":
            return deformable_convolution(feature, offsets, self.weight)
        return super().forward(feature.float(), offsets)
