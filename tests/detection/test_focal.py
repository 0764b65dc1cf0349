"""Focal loss, against its formula with numbers."""

import math

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from detection.losses.focal import focal_loss, focal_loss_of_probabilities, one_hot

LABELS = torch.tensor([2, 0, 3, 3, 1])  # 3 is the background


def logits(requires_grad=False):
    return (3 * torch.randn(5, 3, generator=torch.Generator().manual_seed(0))).requires_grad_(requires_grad)


def test_it_is_the_formula_summed_over_the_classes():
    losses = focal_loss(logits(), LABELS)
    for row, label, found in zip(logits().tolist(), LABELS.tolist(), losses.tolist(), strict=True):
        expected = 0
        for number, z in enumerate(row):
            p = 1 / (1 + math.exp(-z))
            expected += -0.25 * (1 - p)**2 * math.log(p) if number == label else -0.75 * p**2 * math.log(1 - p)
        assert found == pytest.approx(expected, rel=1e-5)


def test_that_of_probabilities_is_that_of_their_logits_with_its_gradient():
    ours, theirs = logits(True), logits(True)
    found = focal_loss_of_probabilities(ours.sigmoid(), LABELS)
    expected = sigmoid_focal_loss(theirs, one_hot(LABELS, theirs), reduction="none").sum(dim=1)
    assert torch.allclose(found, expected, rtol=1e-5)
    for loss in (found, expected):
        loss.sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_probabilities_of_0_and_1_have_finite_losses_and_gradients():
    p = torch.tensor([[0.0, 1, 0.5]], requires_grad=True)
    loss = focal_loss_of_probabilities(p, torch.tensor([0]))
    loss.sum().backward()
    assert loss.isfinite().all() and p.grad.isfinite().all() and loss.item() > 25  # .25 * 100 and more


def test_probabilities_are_computed_with_in_fp32_under_autocast():
    expected = focal_loss_of_probabilities(logits().sigmoid(), LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        found = focal_loss_of_probabilities(logits().sigmoid(), LABELS)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_no_anchor_is_no_loss():
    empty = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    assert focal_loss(*empty).shape == focal_loss_of_probabilities(*empty).shape == (0,)
