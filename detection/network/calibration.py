"""The calibration network of LTD, which stands between a student's feature pyramid and its teacher's in training alone
(layer-calibration and task-disentangle distillation, TGRS 2023). The layout is that of the authors' released code."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from detection.geometry.anchors import STRIDES


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


class LocalCalibration(nn.Module):
    """Local implicit calibration (LIC): a 3x3 convolution that samples each location's surroundings at places which
    another convolution chooses.

    zero_offsets: begin as an ordinary convolution. The released code begins at random places."""

    def __init__(self, channels: int, zero_offsets: bool):
        super().__init__()
        self.offsets = nn.Conv2d(channels, 2 * 9, 3, padding=1, bias=False)
        self.weight = nn.Conv2d(channels, channels, 3, bias=False).weight  # with its initial values
        if zero_offsets:
            nn.init.zeros_(self.offsets.weight)

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        """feature: (N, channels, H, W). Returns the same shape."""
        return deformable_convolution(feature, self.offsets(feature), self.weight)


def deformable_convolution(feature: torch.Tensor, offsets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Deformable convolution (Dai et al., ICCV 2017) by a 3x3 kernel, with zeros around the map.

    feature: (N, C, H, W). offsets: (N, 18, H, W), for each of the 9 taps, row by row, its shift in y and in x, in
    pixels. weight: (C', C, 3, 3). Returns (N, C', H, W).

    Values and gradients are those of torchvision.ops.deform_conv2d, which computes them pixel by pixel: on a CPU that
    takes six times as long, and is not possible in bf16. A sample here is a weighted sum of four rows of C channels."""
    images, channels, height, width = feature.shape
    device = feature.device
    tap = torch.arange(9, device=device)
    shift_y, shift_x = offsets.float().permute(0, 2, 3, 1).unflatten(3, (9, 2)).unbind(4)  # (N, H, W, 9) each
    y = torch.arange(height, device=device)[:, None, None] + tap // 3 - 1 + shift_y
    x = torch.arange(width, device=device)[:, None] + tap % 3 - 1 + shift_x
    rows, row_shares = neighbours(y, height)  # (N, H, W, 9, 2) each
    columns, column_shares = neighbours(x, width)
    image = torch.arange(images, device=device).view(-1, 1, 1, 1, 1, 1)
    pixels = (image * height + rows[..., :, None]) * width + columns[..., None, :]  # (N, H, W, 9, 2, 2)
    shares = row_shares[..., :, None] * column_shares[..., None, :]
    table = feature.float().permute(0, 2, 3, 1).reshape(-1, channels)  # (N * H * W, C)
    samples = F.embedding_bag(pixels.reshape(-1, 4), table, mode="sum",
                              per_sample_weights=shares.reshape(-1, 4))  # (N * H * W * 9, C)
    kernel = weight.permute(2, 3, 1, 0).flatten(0, 2)  # (9 * C, C')
    return (samples.view(images, height, width, -1) @ kernel).permute(0, 3, 1, 2)


def neighbours(places: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two whole coordinates around each of the `places` (...) on an axis, int64 within 0..size - 1, and their
    shares in a linear interpolation, 0 for one that is outside the map: (..., 2) each."""
    first = places.detach().nan_to_num().floor()  # a run that diverges is to end by its loss, not by an index
    found = first[..., None] + torch.arange(2, device=places.device)
    shares = torch.stack([first + 1 - places, places - first], dim=-1) * ((found >= 0) & (found < size))
    return found.clamp(0, size - 1).long(), shares
