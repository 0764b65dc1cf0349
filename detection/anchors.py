"""One square anchor at every location of the feature pyramid, and which of them lie on an image."""

import math
from dataclasses import dataclass

import torch

STRIDES = (8, 16, 32, 64, 128)  # pixels of the input image between two locations of P3, ..., P7
ANCHOR_SCALE = 8  # side of an anchor, in strides


@dataclass(frozen=True)
class Anchors:
    """The anchors of all levels, P3 first, each level row by row. A = sum of H_l * W_l."""

    sizes: list  # [(H_l, W_l)] locations of each level
    boxes: torch.Tensor  # (A, 4) xyxy, pixels
    centres: torch.Tensor  # (A, 2) x and y, pixels
    strides: torch.Tensor  # (A,) pixels
    levels: torch.Tensor  # (A,) int64, 0 for P3

    @property
    def counts(self):
        """[H_l * W_l] of each level."""
        return [height * width for height, width in self.sizes]


def make_anchors(sizes, device=None, strides=STRIDES, scale=ANCHOR_SCALE):
    """The Anchors of levels of `sizes` [(H_l, W_l)] locations: at row i and column j of a level with stride s a square
    of side `scale * s` around (j * s, i * s). There is no offset of half a stride (ATSS, CVPR 2020, as GFL uses it)."""
    centres, sides, levels = [], [], []
    for level, ((height, width), stride) in enumerate(zip(sizes, strides, strict=True)):
        y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
        centres.append(torch.stack([x, y], dim=-1).reshape(-1, 2) * float(stride))
        sides.append(torch.full((height * width,), float(stride), device=device))
        levels.append(torch.full((height * width,), level, device=device))
    centres, sides = torch.cat(centres), torch.cat(sides)  # (A, 2), (A,)
    half = scale / 2 * sides[:, None]
    return Anchors(list(sizes), torch.cat([centres - half, centres + half], dim=1), centres, sides, torch.cat(levels))


def valid_counts(size, anchors, strides=STRIDES, divisor=32):
    """[(rows, columns)] of each level that lie on an image of `size` (height, width) padded to a multiple of
    `divisor`."""
    height, width = (divisor * math.ceil(side / divisor) for side in size)
    return [(min(math.ceil(height / stride), rows), min(math.ceil(width / stride), columns))
            for (rows, columns), stride in zip(anchors.sizes, strides, strict=True)]


def valid_anchors(anchors, image_sizes, strides=STRIDES):
    """Which anchors lie on each image of a batch, (N, A) bool.

    image_sizes: [(height, width)] of the images before they were padded to the size of the batch. An anchor is valid
    where its row and column lie on the image, padded to a multiple of 32: no more is asked of it."""
    rows, columns = (anchors.centres / anchors.strides[:, None]).flip(1).unbind(1)  # (A,) each
    limits = torch.tensor([valid_counts(size, anchors, strides) for size in image_sizes], dtype=torch.float32)
    limits = limits.to(anchors.boxes.device)[:, anchors.levels]  # (N, A, 2)
    return (rows < limits[..., 0]) & (columns < limits[..., 1])
