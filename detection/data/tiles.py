"""Large images in tiles that overlap."""

from collections.abc import Sequence

import torch

CUT = 0.01  # of the side of a tile: a box so near to a border inside the image may be a part of an object


def windows(height: int, width: int, size: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """The windows [(x0, y0, x1, y1)], x1 and y1 excluded, of `size` x `size` pixels that cover an image of height x
    width pixels, row by row: every size - overlap pixels, 0 <= overlap < size, the last one shifted back to end at the
    border. Along a side that is no longer than `size` there is one window, of the length of that side."""
    columns, rows = ((_starts(length, size, overlap), min(length, size)) for length in (width, height))
    return [(x, y, x + columns[1], y + rows[1]) for y in rows[0] for x in columns[0]]


def _starts(length: int, size: int, overlap: int) -> list[int]:
    """The first pixels of the windows along one side."""
    last = max(length - size, 0)
    return [*range(0, last, size - overlap), last]


def is_left_to_others(boxes: torch.Tensor, own: int, tiles: Sequence[tuple[int, int, int, int]]) -> torch.Tensor:
    """Which of the boxes found in a tile it may have cut, while another tile shows them whole, (M,) bool.

    boxes: (M, 4) xyxy in pixels of the image. own: the number of the tile they were found in, among the windows `tiles`
    of the image. A tile shows a box whole that keeps clear of those of its borders that are not the image's."""
    near, far = torch.tensor(tiles, dtype=torch.float32).split(2, dim=1)  # (T, 2) each
    margin = CUT * (far - near)
    near = torch.where(near > 0, near + margin, near)
    far = torch.where(far < far.amax(dim=0), far - margin, far)
    whole = ((boxes[:, None, :2] >= near) & (boxes[:, None, 2:] <= far)).all(dim=2)  # (M, T)
    return ~whole[:, own] & whole.any(dim=1)
