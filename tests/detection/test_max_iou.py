"""Assignment by the largest IoU, against loops over anchors and objects."""

import pytest
import torch
from torchvision.ops import box_iou

from detection.assigners.max_iou import BACKGROUND, IGNORED, max_iou
from detection.geometry import boxes as geometry
from detection.geometry.anchors import make_anchors

SIZES = ((8, 8), (4, 4), (2, 2), (1, 1), (1, 1))  # of 64 x 64


def slow(anchors, boxes, images, valid, positive, negative, low_quality):
    """The definition, anchor by anchor and object by object."""
    overlaps = box_iou(boxes, anchors)
    matched = torch.full(valid.shape, BACKGROUND)
    for image in range(len(valid)):
        own = [number for number, of in enumerate(images) if of == image]
        for anchor in range(len(anchors)):
            if valid[image, anchor] and own:
                best = max(own, key=lambda number, anchor=anchor: overlaps[number, anchor].item())
                value = overlaps[best, anchor].item()
                matched[image, anchor] = best if value >= positive else BACKGROUND if value < negative else IGNORED
        for number in own * low_quality:
            largest = max((overlaps[number, anchor].item() for anchor in range(len(anchors)) if valid[image, anchor]),
                          default=0)
            for anchor in range(len(anchors)):
                if valid[image, anchor] and overlaps[number, anchor].item() == largest > 0:
                    matched[image, anchor] = number
    return matched


def one_image(anchors, boxes, *thresholds):
    anchors, boxes = torch.tensor(anchors, dtype=torch.float32), torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    valid = torch.ones(1, len(anchors), dtype=torch.bool)
    return max_iou(anchors, boxes, torch.zeros(len(boxes), dtype=torch.int64), valid, *thresholds)[0].tolist()


def test_hand_computed_overlaps():
    assert one_image([[0, 0, 10, 10], [10, 10, 20, 20]], [[0, 0, 10, 9]], 0.5, 0.5) == [0, BACKGROUND]
    # IoU .05 is far below the threshold, but no anchor has more with this object.
    assert one_image([[0, 0, 10, 10], [10, 10, 20, 20]], [[0, 0, 1, 5]], 0.5, 0.5) == [0, BACKGROUND]
    assert one_image([[0, 0, 10, 10]], [[0, 0, 1, 5]], 0.5, 0.5, False) == [BACKGROUND]
    # .9, .45 and .3 of the same object; .45 lies between the thresholds.
    anchors = [[0, 0, 10, 9], [0, 0, 10, 4.5], [0, 0, 10, 3]]
    assert one_image(anchors, [[0, 0, 10, 10]], 0.5, 0.4) == [0, IGNORED, BACKGROUND]
    # Both objects are best on the only anchor: the last gets it. One outside of all anchors gets none.
    assert one_image([[0, 0, 10, 10]], [[0, 0, 10, 9], [0, 0, 10, 5], [50, 50, 60, 60]], 0.5, 0.5) == [1]
    assert one_image([[0, 0, 10, 10]], [], 0.5, 0.4) == [BACKGROUND]


@pytest.mark.parametrize(("positive", "negative", "low_quality", "a_time"),
                         [(0.1, 0.1, True, 10**6), (0.5, 0.4, True, 200), (0.15, 0.1, False, 1)])
def test_a_batch_is_the_loop_over_anchors_and_objects(monkeypatch, positive, negative, low_quality, a_time):
    """Also a few objects at a time, with several anchors a location, an empty image, and one that is half padding."""
    monkeypatch.setattr(geometry, "PAIRS", a_time)
    generator = torch.Generator().manual_seed(len(str(a_time)))
    images = torch.tensor([0] * 7 + [2] * 5)
    corners = 50 * torch.rand(12, 2, generator=generator)
    boxes = torch.cat([corners, corners + 4 + 30 * torch.rand(12, 2, generator=generator)], dim=1)
    boxes[3] = boxes[1]  # equal overlaps with two objects
    square = make_anchors(SIZES).boxes
    flat = square * torch.tensor([1, 0.5, 1, 0.5])
    anchors = torch.stack([square, flat], dim=1).flatten(0, 1)
    valid = torch.ones(3, len(anchors), dtype=torch.bool)
    valid[2, len(anchors) // 3:] = False
    expected = slow(anchors, boxes, images.tolist(), valid, positive, negative, low_quality)
    found = max_iou(anchors, boxes, images, valid, positive, negative, low_quality)
    assert torch.equal(found, expected) and (expected >= 0).sum() > 10
