"""The delta coder, against its formula with numbers."""

import math

import pytest
import torch

from detection.geometry.deltas import LIMIT, decode, encode

MEANS, STDS = (0.05, 0.0, -0.1, 0.0), (0.1, 0.1, 0.2, 0.2)


def boxes(count, seed):
    generator = torch.Generator().manual_seed(seed)
    corners, sides = torch.rand(2, count, 2, generator=generator, dtype=torch.float64)
    return torch.cat([200 * corners, 200 * corners + 2 + 90 * sides], dim=1)


def test_a_hand_computed_box():
    """The anchor is 8 wide and 4 high around (4, 2), the box 16 wide and 4 high around (6, 1)."""
    anchor, box = torch.tensor([0.0, 0, 8, 4]), torch.tensor([-2.0, -1, 14, 3])
    assert encode(anchor, box).tolist() == pytest.approx([0.25, -0.25, math.log(2), 0])
    assert decode(anchor, encode(anchor, box, MEANS, STDS), MEANS, STDS).tolist() == pytest.approx(box.tolist())
    assert encode(anchor, box, MEANS, STDS).tolist() == pytest.approx([2, -2.5, (math.log(2) + 0.1) / 0.2, 0])


def test_no_deltas_are_the_anchor_and_decoding_inverts_encoding():
    anchors, wanted = boxes(50, 0), boxes(50, 1)
    assert torch.allclose(decode(anchors, torch.zeros(50, 4)), anchors)
    for coding in ((), (MEANS, STDS)):
        assert torch.allclose(decode(anchors, encode(anchors, wanted, *coding), *coding), wanted)


def test_sides_are_limited_on_both_ends():
    anchor = torch.tensor([10.0, 10, 26, 26])
    found = decode(anchor, torch.tensor([[0, 0, 5.0, -5], [0, 0, LIMIT, -LIMIT]]))
    assert found[0].tolist() == pytest.approx([18 - 500, 18 - 0.128, 18 + 500, 18 + 0.128], rel=1e-4)
    assert torch.equal(found[0], found[1])
