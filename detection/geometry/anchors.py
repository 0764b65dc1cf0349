"""One square anchor at every location of the feature pyramid, and which of them lie on an image."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

STRIDES = (8, 16, 32, 64, 128)  # pixels of the input image between two locations of P3, ..., P7
ANCHOR_SCALE = 8  # side of an anchor, in strides


@dataclass(frozen=True)
class Anchors:
    """The anchors of all levels, P3 first, each level row by row. A = sum of H_l * W_l."""

    sizes: tuple[tuple[int, int], ...]  # ((H_l, W_l), ...) locations of each level
    boxes: torch.Tensor  # (A, 4) xyxy, pixels
    centres: torch.Tensor  # (A, 2) x and y, pixels
    strides: torch.Tensor  # (A,) pixels
    levels: torch.Tensor  # (A,) int64, 0 for P3

    @property
    def counts(self) -> list[int]:
        """[H_l * W_l] of each level."""
        return [height * width for height, width in self.sizes]


def make_anchors(sizes: tuple[tuple[int, int], ...], device: torch.device | None = None) -> Anchors:
    """The Anchors of levels of `sizes` ((H_l, W_l), ...) locations: at row i and column j of a level with stride s a
    square of side ANCHOR_SCALE * s around (j * s, i * s). There is no offset of half a stride (ATSS, CVPR 2020, as GFL
    uses it). Images of the same size get the same Anchors."""
    if torch.compiler.is_compiling():  # sizes of an exported program are symbols, no keys of a cache
        return _make_anchors.__wrapped__(sizes, device)
    return _make_anchors(sizes, device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what a test between two epochs makes first must serve training too
def _make_anchors(sizes: tuple[tuple[int, int], ...], device: torch.device | None) -> Anchors:
    centres, sides, levels = [], [], []
    for level, ((height, width), stride) in enumerate(zip(sizes, STRIDES, strict=True)):
        y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
        centres.append(torch.stack([x, y], dim=-1).reshape(-1, 2) * float(stride))
        sides.append(torch.full((height * width,), float(stride), device=device))
        levels.append(torch.full((height * width,), level, device=device))
    centres, sides = torch.cat(centres), torch.cat(sides)  # (A, 2), (A,)
    half = ANCHOR_SCALE / 2 * sides[:, None]
    return Anchors(sizes, torch.cat([centres - half, centres + half], dim=1), centres, sides, torch.cat(levels))


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
