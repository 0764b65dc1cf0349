"""Tiles of large images: the windows, and detections in them."""

import numpy as np
import pytest

from detection.data.tiles import windows


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
