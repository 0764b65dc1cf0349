"""The anchors at every location of the feature pyramid, and which of them lie on an image."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

STRIDES = (8, 16, 32, 64, 128)  # pixels of the input image between two locations of P3, ..., P7
FACTORS = (0.125, 8.0)  # range of AnchorGrid.scaled


@dataclass(frozen=True)
class AnchorGrid:
    """The anchors of a location: one of each scale for each ratio, in this order, around the same centre."""

    scales: tuple[float, ...]  # roots of the anchors' areas, in strides
    ratios: tuple[float, ...]  # height / width

    @property
    def shapes(self) -> list[tuple[float, float]]:
        """[(width, height)] in strides."""
        return [(scale / math.sqrt(ratio), scale * math.sqrt(ratio)) for ratio in self.ratios for scale in self.scales]

    def scaled(self, factor: float) -> "AnchorGrid":
        """The grid of anchors whose sides are `factor` times as long."""
        return self if factor == 1 else AnchorGrid(tuple(scale * factor for scale in self.scales), self.ratios)


SQUARE = AnchorGrid((8,), (1.0,))  # of ATSS (Zhang et al., CVPR 2020), as GFL uses it
RETINA = AnchorGrid(tuple(4 * 2 ** (octave / 3) for octave in range(3)), (1.0, 0.5, 2.0))  # Lin et al., ICCV 2017


@dataclass(frozen=True)
class Anchors:
    """The anchors of all levels, P3 first, each level row by row, those of a location next to each other. K anchors a
    location, A = K * sum of H_l * W_l."""

    sizes: tuple[tuple[int, int], ...]  # ((H_l, W_l), ...) locations of each level
    boxes: torch.Tensor  # (A, 4) xyxy, pixels
    centres: torch.Tensor  # (A, 2) x and y, pixels
    strides: torch.Tensor  # (A,) pixels
    levels: torch.Tensor  # (A,) int64, 0 for P3

    @property
    def counts(self) -> list[int]:
        """[K * H_l * W_l] of each level."""
        return [self.per_location * height * width for height, width in self.sizes]

    @property
    def per_location(self) -> int:
        """K."""
        return len(self.boxes) // sum(height * width for height, width in self.sizes)

    @property
    def locations(self) -> "Anchors":
        """The first anchor of each location."""
        first = slice(None, None, self.per_location)
        return Anchors(self.sizes, self.boxes[first], self.centres[first], self.strides[first], self.levels[first])


def make_anchors(sizes: tuple[tuple[int, int], ...], device: torch.device | None = None,
                 grid: AnchorGrid = SQUARE) -> Anchors:
    """The Anchors of levels of `sizes` ((H_l, W_l), ...) locations: those of `grid` around (j * s, i * s) at row i and
    column j of a level with stride s. There is no offset of half a stride. Images of the same size get the same
    Anchors."""
    if torch.compiler.is_compiling():  # sizes of an exported program are symbols, no keys of a cache
        return _make_anchors.__wrapped__(sizes, device, grid)
    return _make_anchors(sizes, device, grid)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what a test between two epochs makes first must serve training too
def _make_anchors(sizes: tuple[tuple[int, int], ...], device: torch.device | None, grid: AnchorGrid) -> Anchors:
    half = torch.tensor(grid.shapes, device=device) / 2  # (K, 2) in strides
    boxes, centres, strides, levels = [], [], [], []
    for level, ((height, width), stride) in enumerate(zip(sizes, STRIDES, strict=True)):
        y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
        centre = (torch.stack([x, y], dim=-1).reshape(-1, 1, 2) * float(stride)).expand(-1, len(half), -1)
        boxes.append(torch.cat([centre - half * stride, centre + half * stride], dim=-1).flatten(0, 1))
        centres.append(centre.flatten(0, 1))
        count = len(half) * height * width
        strides.append(torch.full((count,), float(stride), device=device))
        levels.append(torch.full((count,), level, device=device))
    return Anchors(sizes, torch.cat(boxes), torch.cat(centres), torch.cat(strides), torch.cat(levels))


def pyramid_sizes(height: int, width: int) -> tuple[tuple[int, int], ...]:
    """((H_l, W_l), ...) locations of P3 to P7 of an image whose sides, in pixels, are multiples of 32."""
    return tuple((math.ceil(height / stride), math.ceil(width / stride)) for stride in STRIDES)


def valid_anchors(anchors: Anchors, image_sizes: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Which anchors lie on each image of a batch, (N, A) bool.

    image_sizes: [(height, width)] of the images before they were padded to the size of the batch. An anchor is valid
    where its row and column lie on the image, padded to a multiple of 32: no more is asked of it."""
    rows, columns = (anchors.centres / anchors.strides[:, None]).flip(1).unbind(1)  # (A,) each
    padded = [[32 * math.ceil(side / 32) for side in size] for size in image_sizes]
    limits = torch.tensor([pyramid_sizes(*size) for size in padded], dtype=torch.float32)
    limits = limits.to(anchors.boxes.device, non_blocking=True)[:, anchors.levels]  # (N, A, 2)
    return (rows < limits[..., 0]) & (columns < limits[..., 1])
