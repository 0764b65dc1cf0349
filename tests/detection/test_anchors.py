"""The anchors of a pyramid, and which of them lie on an image, against loops over rows and columns."""

import math

import pytest
import torch

from detection.geometry.anchors import RETINA, SQUARE, STRIDES, make_anchors, pyramid_sizes, valid_anchors
from detection.methods import colad, gfl, paa, rotated
from detection.network.detector import Detector

FULL = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))  # of 800 x 1344
SMALL = ((12, 8), (6, 4), (3, 2), (2, 1), (1, 1))  # of 96 x 64


@pytest.fixture(scope="module")
def full():
    return make_anchors(FULL)


def slow_valid(sizes, image):
    """Whether each location's row and column is one of those that the padded image alone would have."""
    valid = []
    for (rows, columns), stride in zip(sizes, STRIDES, strict=True):
        height, width = (math.ceil(side / 32) * 32 for side in image)
        for i in range(rows):
            for j in range(columns):
                valid.append(i < math.ceil(height / stride) and j < math.ceil(width / stride))
    return valid


def test_the_levels_of_800_by_1344(full):
    assert pyramid_sizes(800, 1344) == FULL and pyramid_sizes(96, 64) == SMALL
    assert full.counts == [16800, 4200, 1050, 273, 77] and sum(full.counts) == 22_400
    assert full.boxes.shape == (22_400, 4) and full.centres.shape == (22_400, 2)
    assert full.strides.shape == full.levels.shape == (22_400,)
    assert full.boxes.dtype == full.centres.dtype == torch.float32 and full.levels.dtype == torch.int64


def test_levels_come_one_after_the_other_p3_first(full):
    assert torch.equal(full.levels, torch.arange(5).repeat_interleave(torch.tensor(full.counts)))
    assert torch.equal(full.strides, torch.tensor(STRIDES, dtype=torch.float32)[full.levels])


def test_squares_of_8_strides_around_their_centres(full):
    sides = full.boxes[:, 2:] - full.boxes[:, :2]
    assert torch.equal(sides, (8 * full.strides)[:, None].expand(-1, 2)) and SQUARE.shapes == [(8, 8)]
    assert torch.equal((full.boxes[:, :2] + full.boxes[:, 2:]) / 2, full.centres)
    assert full.boxes[0].tolist() == [-32, -32, 32, 32]  # no offset of half a stride
    assert sorted(set(sides[:, 0].tolist())) == [64, 128, 256, 512, 1024]


def test_a_grid_with_anchors_of_half_the_size():
    grid = RETINA.scaled(0.5)
    assert (grid.scales, grid.ratios) == (tuple(2 * 2 ** (octave / 3) for octave in range(3)), RETINA.ratios)
    published, half = (make_anchors(SMALL, grid=each) for each in (RETINA, grid))
    torch.testing.assert_close(2 * (half.boxes[:, 2:] - half.boxes[:, :2]),
                               published.boxes[:, 2:] - published.boxes[:, :2])
    assert torch.equal(half.centres, published.centres) and SQUARE.scaled(1) is SQUARE


@pytest.mark.parametrize("architecture, settings, published", [
    (gfl.architecture, gfl.GFLSettings, 64), (paa.architecture, paa.PAASettings, 64),
    (colad.peer_architecture, colad.CoLADSettings, 64), (rotated.architecture, rotated.RotatedSettings, 32)])
def test_every_detector_has_anchors_of_the_size_in_its_settings(architecture, settings, published):
    for factor in (1.0, 0.25):
        with torch.device("meta"):
            network = Detector(1, architecture(settings(depth=18, channels=64, tower_convs=0, anchor_size=factor)))
        first = network.anchors(SMALL, torch.device("cpu")).boxes[0].tolist()
        assert first == [-published * factor / 2] * 2 + [published * factor / 2] * 2


def test_centres_row_by_row():
    anchors, number = make_anchors(SMALL), 0
    for (rows, columns), stride in zip(SMALL, STRIDES, strict=True):
        for i in range(rows):
            for j in range(columns):
                assert anchors.centres[number].tolist() == [j * stride, i * stride]
                number += 1
    assert number == len(anchors.boxes)


def test_the_spacing_is_the_stride_where_the_image_is_not_a_multiple_of_it(full):
    """800 / 13 rows would be a spacing of 61 pixels."""
    p6, p7 = full.centres[full.levels == 3], full.centres[full.levels == 4]
    assert (p6[1] - p6[0]).tolist() == [64, 0] and (p6[21] - p6[0]).tolist() == [0, 64]
    assert (p7[1] - p7[0]).tolist() == [128, 0] and (p7[11] - p7[0]).tolist() == [0, 128]


def test_a_batch_of_800_by_1344_with_an_image_of_800_by_1088(full):
    valid = valid_anchors(full, [(800, 1088), (800, 1344), (800, 1067)])
    assert valid.shape == (3, 22_400) and valid.dtype == torch.bool
    levels = [part.view(size) for part, size in zip(valid[0].split(full.counts), FULL, strict=True)]
    assert levels[0].sum() == 100 * 136 and levels[0][:, :136].all() and not levels[0][:, 136:].any()
    assert [level.sum().item() for level in levels] == [100 * 136, 50 * 68, 25 * 34, 13 * 17, 7 * 9]
    assert valid[1].all()
    assert torch.equal(valid[2], valid[0])  # 1067 is padded to 1088


@pytest.mark.parametrize("image", [(96, 64), (1, 1), (32, 64), (33, 31), (64, 33), (96, 1)])
def test_valid_anchors_against_a_loop(image):
    valid = valid_anchors(make_anchors(SMALL), [image])
    assert valid[0].tolist() == slow_valid(SMALL, image)
    assert valid[0].any()


def test_anchors_first_made_while_testing_serve_training_too():
    """An image size that a test during training has seen first: the same Anchors are used again."""
    sizes = ((3, 5), (2, 3), (1, 2), (1, 1), (1, 1))
    with torch.inference_mode():
        make_anchors(sizes)
    anchors = make_anchors(sizes)
    factor = torch.ones(1, requires_grad=True)
    (factor * anchors.boxes.view(-1)).sum().backward()
    assert factor.grad.item() == anchors.boxes.sum().item()
