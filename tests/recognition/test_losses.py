"""Losses of the rivals: golden values worked out by hand from the papers' formulas, and slow references."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recognition import losses
from recognition.losses import (
    CosineClassifier,
    adjust_logits,
    balanced_softmax,
    classification_loss,
    effective_number_weights,
    ldam,
)

COUNTS = torch.tensor([90, 9, 1])


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, generator=generator), torch.tensor([0, 1, 2, 2, 1, 0])


def test_cross_entropy_is_torchs(batch):
    assert torch.equal(classification_loss("cross-entropy", *batch, COUNTS), F.cross_entropy(*batch, reduction="none"))


def test_balanced_softmax_golden():
    """Equal logits: an image of class c costs -log of its share of the training images."""
    found = balanced_softmax(torch.zeros(3, 3), torch.tensor([0, 1, 2]), COUNTS)
    assert found.tolist() == pytest.approx([-math.log(0.9), -math.log(0.09), -math.log(0.01)], rel=1e-5)


def test_balanced_softmax_against_the_formula(batch):
    logits, labels = batch
    found = classification_loss("balanced-softmax", logits, labels, COUNTS)
    for i, y in enumerate(labels.tolist()):
        terms = [n * math.exp(z) for n, z in zip(COUNTS.tolist(), logits[i].tolist(), strict=True)]
        assert found[i].item() == pytest.approx(-math.log(terms[y] / sum(terms)), rel=1e-5)


def test_ldam_golden():
    """Margins 0.5 (n / n_min)^(-1/4): 16 times the images, half the margin; a logit that is just its margin short."""
    counts = torch.tensor([16, 1])
    logits = torch.tensor([[30 * 0.25, 0.0], [0.0, 30 * 0.5]])  # after the margins both are 0
    assert ldam(logits, torch.tensor([0, 1]), counts).tolist() == pytest.approx([math.log(2)] * 2, rel=1e-5)


def test_ldam_against_the_formula(batch):
    logits, labels = batch
    found = classification_loss("ldam-drw", logits, labels, COUNTS)
    for i, y in enumerate(labels.tolist()):
        margin = 0.5 * COUNTS[y].item() ** -0.25 / COUNTS.min().item() ** -0.25
        z = logits[i].tolist()
        z[y] -= 30 * margin
        assert found[i].item() == pytest.approx(math.log(sum(map(math.exp, z))) - z[y], rel=1e-4)


def test_deferred_weights_golden():
    """Effective numbers (1 - beta^n) / (1 - beta) of 1 and 2 images are 1 and 1 + beta."""
    beta = 0.9999
    weights = effective_number_weights(torch.tensor([1, 2]))
    assert (weights[0] / weights[1]).item() == pytest.approx(1 + beta, rel=1e-6)
    assert weights.mean().item() == pytest.approx(1, rel=1e-6)


def test_the_deferred_mean_is_torchs_weighted_mean(batch):
    logits, labels = batch
    found = classification_loss("ldam-drw", logits, labels, COUNTS, reweighted=True).mean()
    margins = 0.5 * (COUNTS / COUNTS.min()).pow(-0.25)
    shifted = logits - 30 * margins * F.one_hot(labels, 3)
    expected = F.cross_entropy(shifted, labels, weight=effective_number_weights(COUNTS))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["balanced-softmax", "ldam-drw"])
def test_a_class_without_images_costs_nothing_infinite(name, batch):
    found = classification_loss(name, *batch, torch.tensor([0, 9, 1]), reweighted=True)
    assert found.isfinite().all()


def test_a_cosine_classifier_and_its_linear_form_choose_alike():
    torch.manual_seed(0)
    classifier, features = CosineClassifier(8, 5), torch.randn(40, 8)
    logits = classifier(features)
    for i in range(40):
        cosines = [F.cosine_similarity(features[i], weight, dim=0).item() for weight in classifier.weight]
        assert logits[i].tolist() == pytest.approx([losses.LDAM_SCALE * cosine for cosine in cosines], abs=1e-4)
    linear = classifier.as_linear()
    assert type(linear) is nn.Linear and torch.equal(linear(features).argmax(1), logits.argmax(1))


def test_logit_adjustment_is_in_the_bias():
    torch.manual_seed(0)
    classifier, features = nn.Linear(4, 3), torch.randn(5, 4)
    before = classifier(features)
    adjust_logits(classifier, COUNTS, tau=2.0)
    expected = before - 2.0 * torch.tensor([0.9, 0.09, 0.01]).log()
    assert torch.allclose(classifier(features), expected, atol=1e-5)


def test_logit_adjustment_turns_a_network_trained_with_plain_cross_entropy_into_a_balanced_one():
    """Logits that are the logarithms of p(x | c) p(c) become, up to a constant, those of p(x | c)."""
    likelihood = torch.rand(7, 3, dtype=torch.float64)
    share = COUNTS / COUNTS.sum()
    classifier = nn.Linear(3, 3).double()
    classifier.weight.data, classifier.bias.data = torch.eye(3, dtype=torch.float64), share.double().log()
    adjust_logits(classifier, COUNTS, tau=1.0)
    assert torch.equal(classifier(likelihood.log()).argmax(1), likelihood.argmax(1))
