"""The divergence of distillation: numbers known by heart, and loops over bins."""

import math

import pytest
import torch

from detection.distillers.divergence import mean_kl


def softmax(logits):
    exponentials = [math.exp(z) for z in logits]
    return [value / sum(exponentials) for value in exponentials]


def test_the_golden_divergence():
    found = mean_kl(torch.zeros(2), torch.tensor([10 * math.log(3), 0]), 10)
    assert found.item() == pytest.approx(6.540602, abs=1e-5)  # the sum over the bins would be twice that


@pytest.mark.parametrize("temperature", [0.5, 1, 2, 10])
def test_the_divergence_and_its_gradient_against_a_loop(temperature):
    generator = torch.Generator().manual_seed(4)
    student, teacher = (3 * torch.randn(3, 4, 7, generator=generator) for _ in range(2))
    student.requires_grad_()
    found = mean_kl(student, teacher, temperature)
    assert found.shape == (3, 4)
    gradient = torch.autograd.grad(found.sum(), student)[0].flatten(0, 1).tolist()
    rows = zip(found.flatten().tolist(), student.flatten(0, 1).tolist(), teacher.flatten(0, 1).tolist(), gradient,
               strict=True)
    for value, z, t, slope in rows:
        q, p = (softmax([each / temperature for each in row]) for row in (z, t))
        expected = sum(pk * math.log(pk / qk) for pk, qk in zip(p, q, strict=True))
        assert value == pytest.approx(temperature**2 / 7 * expected, rel=1e-4, abs=1e-5)
        assert slope == pytest.approx([temperature / 7 * (qk - pk) for pk, qk in zip(p, q, strict=True)], abs=1e-5)


def test_a_constant_more_makes_no_difference():
    generator = torch.Generator().manual_seed(5)
    student, teacher = torch.randn(5, 17, generator=generator), torch.randn(5, 17, generator=generator)
    assert torch.allclose(mean_kl(student + torch.arange(5.0)[:, None], teacher - 3, 10),
                          mean_kl(student, teacher, 10), atol=1e-5)
    assert mean_kl(student, student + 4, 10).abs().max() < 1e-5
    assert mean_kl(student, teacher, 10).min() > 0


def test_at_a_high_temperature_it_is_half_the_variance_of_the_difference_a_bin():
    generator = torch.Generator().manual_seed(6)
    student, teacher = torch.randn(5, 17, generator=generator), torch.randn(5, 17, generator=generator)
    difference = teacher - student
    expected = ((difference - difference.mean(1, keepdim=True)) ** 2).sum(1) / (2 * 17**2)
    assert torch.allclose(mean_kl(student, teacher, 100), expected, rtol=0.05)


def test_no_gradient_reaches_the_teacher():
    student, teacher = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    mean_kl(student, teacher, 2).sum().backward()
    assert student.grad.abs().max() > 0 and teacher.grad is None


def test_far_logits_are_finite_and_bf16_is_computed_in_fp32():
    far = torch.tensor([[1000.0, 0, -1000]])
    assert mean_kl(far.flip(1), far, 1).isfinite().all()
    student, teacher = torch.randn(3, 5).bfloat16(), torch.randn(3, 5).bfloat16()
    found = mean_kl(student, teacher, 10)
    assert found.dtype == torch.float32 and torch.equal(found, mean_kl(student.float(), teacher.float(), 10))
