"""Parts of a training step: the learning rate, the symmetries of images, adjusted logits, a warning."""

from types import SimpleNamespace

import pytest
import torch

import baseline_cl_s_weight
import baseline_cl_t1
import baseline_cl_t2
import baseline_cl_t3
import baseline_resnet50
from recognition import engine
from recognition.run import Run
from recognition.settings import Settings
from resnet50 import ResNet50


def test_learning_rate_steps_of_the_paper():
    """The released code cuts the rate after its epochs 32, 62 and 92, counted from 0: from the 33rd, 63rd and 93rd on;
    the student's after 52."""
    for script in (baseline_resnet50, baseline_cl_t1, baseline_cl_t2, baseline_cl_t3):
        epochs = (1, 32, 33, 62, 63, 92, 93, 100)
        rates = {epoch: engine.learning_rate(script.SETTINGS, epoch, 0, 10) for epoch in epochs}
        assert rates == pytest.approx({1: 1e-3, 32: 1e-3, 33: 1e-4, 62: 1e-4, 63: 1e-5, 92: 1e-5, 93: 1e-6, 100: 1e-6})
    rates = [engine.learning_rate(baseline_cl_s_weight.SETTINGS, epoch, 0, 10) for epoch in (1, 52, 53, 100)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])


def test_one_cycle_is_that_of_torch():
    settings = Settings(lr=0.02, schedule="one-cycle", epochs=5)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.02)
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=35, cycle_momentum=False)
    for step in range(35):
        # torch places the peak at 0.3 * total - 1 steps, here it is at 0.3 * (total - 1): at most a step apart.
        found = engine.learning_rate(settings, step // 7 + 1, step % 7, 7)
        assert found == pytest.approx(reference.get_last_lr()[0], abs=0.02 * 0.11)
        optimizer.step()
        reference.step()
    assert engine.learning_rate(settings, 1, 0, 7) == pytest.approx(0.02 / 25)
    assert engine.learning_rate(settings, 5, 6, 7) == pytest.approx(0.02 / 25e4)


def test_dihedral_draws_quarter_turns_beside_the_same_flips():
    run = SimpleNamespace(settings=Settings(batch_size=4000), flips=torch.Generator().manual_seed(1))
    flips = torch.rand(4000, generator=torch.Generator().manual_seed(1)) < 0.5
    flip, turns = engine.draw_symmetries(run)
    assert torch.equal(flip, flips) and not turns.any()
    run.settings = Settings(batch_size=4000, augment="dihedral")
    run.flips.manual_seed(1)
    flip, turns = engine.draw_symmetries(run)
    assert torch.equal(flip, flips)
    assert (2 * turns + flip).bincount(minlength=8).tolist() == pytest.approx([500] * 8, abs=100)


def test_adjusted_logits_are_those_of_the_network_that_is_tested_and_kept():
    torch.manual_seed(0)
    counts, network = torch.tensor([90, 9, 1]), ResNet50(3).eval()
    run = SimpleNamespace(settings=Settings(logit_adjustment=1.0), network=network, class_counts=counts)
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        found, trained = Run.published_network(run)(images)[0], network(images)[0]
    assert torch.allclose(found, trained - (counts / 100).log(), atol=1e-5)
    run.settings = Settings()
    assert Run.published_network(run) is network


def test_labels_drowned_by_imitation_are_said_once(capsys):
    run = SimpleNamespace(settings=Settings(), warned=False)
    engine.warn_of_drowned_labels(run, {"epoch": 1, "cross_entropy": 2.0, "mse_t1": 19.9, "mse_t2": 3.0})
    engine.warn_of_drowned_labels(run, {"epoch": 9, "cross_entropy": 0.001, "mse_t1": 0.2})  # the labels are learned
    assert not capsys.readouterr().out
    for _ in range(2):
        engine.warn_of_drowned_labels(run, {"epoch": 2, "cross_entropy": 2.0, "mse_t1": 3.0, "mse_t2": 60.0})
    output = capsys.readouterr().out
    assert output.startswith("note: mse_t2 is 30 times the classification loss") and output.count("\n") == 1
    assert "--teacher-batch-norm train" in output
