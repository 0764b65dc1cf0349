"""Tiles of large images: the windows, and detections in them."""

import numpy as np
import pytest
import torch
from PIL import Image

from detection.data.tiles import is_left_to_others, windows
from detection.geometry.suppression import Selection
from detection.network.detector import HEADS
from detection.predict import find_in_tiles


@pytest.mark.parametrize("height, width, size, overlap", [
    (100, 250, 64, 16), (64, 64, 64, 16), (65, 64, 64, 0), (30, 200, 64, 63), (112, 112, 64, 16), (7, 5, 64, 20)])
def test_windows_cover_the_image_and_overlap(height, width, size, overlap):
    found = windows(height, width, size, overlap)
    assert len(set(found)) == len(found) and found[0][:2] == (0, 0) and found[-1][2:] == (width, height)
    covered = np.zeros((height, width), int)
    for x0, y0, x1, y1 in found:
        assert (x1 - x0, y1 - y0) == (min(size, width), min(size, height))
        covered[y0:y1, x0:x1] += 1
    assert covered.min() == 1
    for axis in (0, 1):
        starts = sorted({window[axis] for window in found})
        steps = np.diff(starts)
        assert (steps[:-1] == size - overlap).all() and (steps <= size - overlap).all()


def test_the_last_window_is_shifted_back_to_the_border():
    assert windows(50, 250, 100, 20) == [(0, 0, 100, 50), (80, 0, 180, 50), (150, 0, 250, 50)]
    assert windows(100, 180, 100, 20) == [(0, 0, 100, 100), (80, 0, 180, 100)]


# ---- detections in tiles ---------------------------------------------------------------------------------------------


def find_squares(image, scale):
    """A detector that finds whatever is bright and connected, as `open_detector` gives one; what lies more at the left
    is surer."""
    bright = image[0].numpy() > 128
    boxes, taken = [], np.zeros_like(bright)
    for y, x in zip(*np.nonzero(bright), strict=True):
        if not taken[y, x]:
            right, bottom = x, y
            while right < bright.shape[1] and bright[y, right]:
                right += 1
            while bottom < bright.shape[0] and bright[bottom, x]:
                bottom += 1
            taken[y:bottom, x:right] = True
            boxes.append([x, y, right, bottom])
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4) / torch.tensor([*scale, *scale])
    scores = 1 / (2 + boxes[:, 0])
    return {"boxes": boxes, "scores": scores, "labels": torch.zeros(len(boxes), dtype=torch.int64)}


@pytest.mark.parametrize("size, overlap", [(100, 30), (100, 0), (64, 40), (500, 100)])
def test_every_object_is_found_once_where_it_is(size, overlap):
    """Objects of up to 25 pixels, on a grid that meets the borders of tiles in every way."""
    pixels, expected = np.zeros((230, 310, 3), np.uint8), []
    for y in range(0, 230, 31):
        for x in range(0, 310, 29):
            box = [x, y, min(x + 25, 310), min(y + 20, 230)]
            pixels[box[1]:box[3], box[0]:box[2]] = 255
            expected.append(box)
    tiles = windows(230, 310, size, overlap)
    preprocessing = {"short": size, "long": 2 * size}  # so that tiles are not scaled
    if size == 500:  # one tile, the whole image
        preprocessing = {"short": 230, "long": 310}
    found = find_in_tiles(find_squares, Image.fromarray(pixels), preprocessing, Selection(), "nms", tiles)
    boxes = sorted(map(tuple, found["boxes"].int().tolist()))
    if overlap:
        assert boxes == sorted(map(tuple, expected))
    else:  # parts remain
        assert set(boxes) > {tuple(box) for box in expected if box[2] < 100 and box[3] < 100}
    assert (found["scores"].diff() <= 0).all() or len(tiles) == 1


def test_a_box_is_left_to_a_tile_that_shows_it_whole_and_never_to_none():
    tiles = windows(100, 180, 100, 20)  # 0 to 100 and 80 to 180
    boxes = torch.tensor([[85.0, 10, 100, 20], [70, 10, 100, 20], [10, 0, 20, 100], [80, 10, 100, 20]])
    assert is_left_to_others(boxes, 0, tiles).tolist() == [True, False, False, False]  # the last fills the overlap
    assert is_left_to_others(boxes, 1, tiles).tolist() == [False, False, True, False]


def test_oriented_objects_are_found_once_where_they_are():
    """The value of the pixel at an object's centre is its number."""
    generator = torch.Generator().manual_seed(0)
    pixels, expected = np.zeros((230, 310, 3), np.uint8), []
    for y in range(20, 230, 40):
        for x in range(20, 310, 40):
            w, h, theta = (torch.rand(3, generator=generator) * torch.tensor([16, 8, 1.5]) + 2).tolist()
            expected.append([x + 0.5, y + 0.5, w, h, theta])
            pixels[y, x] = len(expected)

    def find(image, scale):
        y, x = image[0].nonzero(as_tuple=True)
        boxes = torch.tensor(expected)[image[0, y, x].long() - 1]
        boxes[:, :2] = torch.stack([x, y], dim=1) + 0.5
        count = len(boxes)
        return {"boxes": boxes, "scores": torch.linspace(0.5, 0.9, count), "labels": torch.zeros(count).long()}

    tiles, preprocessing = windows(230, 310, 100, 40), {"short": 100, "long": 100}
    found = find_in_tiles(find, Image.fromarray(pixels), preprocessing, HEADS["rotated"].selection, "auto", tiles)
    assert len(found["boxes"]) == len(expected)
    rows = sorted(found["boxes"].tolist(), key=lambda box: (round(box[1]), box[0]))
    torch.testing.assert_close(torch.tensor(rows), torch.tensor(expected))
