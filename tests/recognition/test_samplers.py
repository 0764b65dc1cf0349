"""The batch samplers: what an epoch holds, the class weights of the paper's formula, the draw, and their state."""

import math
from collections import Counter

import pytest
import torch

from ClassAwareSampler import (
    ClassAwareBatchSampler,
    SelfCalibratedBatchSampler,
    ShuffledBatchSampler,
    calibration_weights,
)

LABELS = [0] * 20 + [1] * 9 + [2] * 3 + [4] * 1  # class 3 has no image


def weights_by_hand(losses_of_images, num_classes):
    """w_c of the paper, as slowly and plainly as it can be written. losses_of_images: [(class, loss)] of one batch."""
    log_losses = {}
    for c in {c for c, _ in losses_of_images}:
        own = [loss for other, loss in losses_of_images if other == c]
        log_losses[c] = math.log(1 + sum(own) / len(own))
    mean = sum(log_losses.values()) / len(log_losses)
    weights = [log_losses.get(c, mean) for c in range(num_classes)]
    return [w / sum(weights) for w in weights]


def sampler_of(kind, seed=0, rank=0, world_size=1, batch_size=8, **more):
    if kind is SelfCalibratedBatchSampler:
        more.setdefault("num_classes", 5)
    return kind(LABELS, batch_size, seed, rank, world_size, **more)


def draw_epochs(sampler, epochs):
    """Batches of some epochs; a self-calibrated sampler gets losses that depend on the batch alone."""
    batches = []
    for _ in range(epochs):
        for batch in sampler:
            batches.append(batch)
            if isinstance(sampler, SelfCalibratedBatchSampler):
                counts = torch.bincount(torch.tensor(LABELS)[batch], minlength=5).float()
                sampler.update(counts * torch.arange(1.0, 6.0), counts)
    return batches


def test_shuffled_epoch_holds_every_image_and_fills_the_last_batch():
    sampler = sampler_of(ShuffledBatchSampler)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 5 and all(len(batch) == 8 for batch in batches)
    drawn = [i for batch in batches for i in batch]
    assert set(drawn) == set(range(33))
    assert drawn[33:] == drawn[:7]
    assert [i for batch in sampler for i in batch] != drawn


def test_class_aware_draws_every_class_equally_and_every_image_of_a_class_in_turn():
    drawn = [i for batch in draw_epochs(sampler_of(ClassAwareBatchSampler), 20) for i in batch]
    by_class = Counter(LABELS[i] for i in drawn)
    assert set(by_class) == {0, 1, 2, 4}
    assert max(by_class.values()) - min(by_class.values()) <= 1
    for c in by_class:
        own = Counter(i for i in drawn if LABELS[i] == c)
        assert len(own) == LABELS.count(c)
        assert max(own.values()) - min(own.values()) <= 1


def test_class_aware_cycles_are_shuffled():
    drawn = [i for batch in draw_epochs(sampler_of(ClassAwareBatchSampler), 20) for i in batch]
    orders = {tuple(LABELS[i] for i in drawn[start:start + 4]) for start in range(0, 160, 4)}
    assert len(orders) > 5
    of_class_0 = [i for i in drawn if LABELS[i] == 0]
    assert of_class_0[:20] != of_class_0[20:40]


def test_calibration_weights_against_the_formula_by_hand():
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        labels = torch.randint(0, 7, (12,), generator=generator)
        losses = torch.rand(12, generator=generator) * 5
        sums = torch.zeros(7).index_add_(0, labels, losses)
        counts = torch.bincount(labels, minlength=7).float()
        known = counts > 0
        weights = calibration_weights(sums / counts.clamp(min=1), known)
        expected = weights_by_hand(list(zip(labels.tolist(), losses.tolist(), strict=True)), 7)
        assert weights.tolist() == pytest.approx(expected, abs=1e-6)


def test_calibration_weights_golden():
    # L = 1, 3 and class 2 absent: log 2, log 4, their mean 1.5 log 2 -> 1, 2, 1.5 over 4.5.
    weights = calibration_weights(torch.tensor([1.0, 3.0, 0.0]), torch.tensor([True, True, False]))
    assert weights.tolist() == pytest.approx([1 / 4.5, 2 / 4.5, 1.5 / 4.5])


@pytest.mark.parametrize("known", [[True, True], [False, False]])
def test_weights_are_equal_where_nothing_tells_the_classes_apart(known):
    assert calibration_weights(torch.zeros(2), torch.tensor(known)).tolist() == [0.5, 0.5]


def test_the_loss_of_a_batch_reaches_the_very_next_draw():
    sampler = sampler_of(SelfCalibratedBatchSampler)
    batches = iter(sampler)
    next(batches)
    # All the loss in class 2, and every class known: the next batch can hold nothing else.
    sampler.update(torch.tensor([0.0, 0.0, 5.0, 0.0, 0.0]), torch.ones(5))
    assert {LABELS[i] for i in next(batches)} == {2}
    sampler.update(torch.tensor([0.0, 7.0, 0.0, 0.0, 0.0]), torch.ones(5))
    assert {LABELS[i] for i in next(batches)} == {1}


def test_an_image_is_drawn_with_probability_w_c_over_n_c():
    sampler = sampler_of(SelfCalibratedBatchSampler, batch_size=20_000)
    sampler.step = 1  # past the class-aware batch
    sampler.update(torch.tensor([1.0, 3.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]))
    # Classes 0, 1, 2: log 2, log 4, log 2; class 4 absent: their mean; class 3 has no image to draw.
    weights = [1.0, 2.0, 1.0, 0.0, 4 / 3]
    drawn = Counter(sampler.draw().tolist())
    for i, label in enumerate(LABELS):
        expected = weights[label] / sum(weights) / LABELS.count(label)
        deviation = (expected * (1 - expected) / 20_000) ** 0.5
        assert abs(drawn[i] / 20_000 - expected) < 5 * deviation


def test_the_first_batch_of_every_epoch_is_class_aware():
    sampler = sampler_of(SelfCalibratedBatchSampler)
    for _ in range(4):
        for number, batch in enumerate(sampler):
            if number == 0:
                assert sorted(Counter(LABELS[i] for i in batch).values()) == [2, 2, 2, 2]
            sampler.update(torch.tensor([9.0, 0.0, 0.0, 0.0, 0.0]), torch.ones(5))


def test_momentum_keeps_a_running_loss_of_each_class():
    sampler = sampler_of(SelfCalibratedBatchSampler, momentum=0.9)
    sampler.update(torch.tensor([2.0, 0.0, 0.0, 0.0, 0.0]), torch.tensor([2.0, 0.0, 0.0, 0.0, 0.0]))
    assert sampler.class_loss[0] == 1.0 and sampler.known.tolist() == [True] + [False] * 4
    sampler.update(torch.tensor([3.0, 4.0, 0.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]))
    assert sampler.class_loss[:2].tolist() == pytest.approx([0.9 * 1 + 0.1 * 3, 4.0])
    sampler.update(torch.tensor([0.0, 0.0, 6.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 2.0, 0.0, 0.0]))
    assert sampler.class_loss[:3].tolist() == pytest.approx([1.2, 4.0, 3.0])


KINDS = [ShuffledBatchSampler, ClassAwareBatchSampler, SelfCalibratedBatchSampler]


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_fixes_every_batch(kind):
    assert draw_epochs(sampler_of(kind, seed=3), 3) == draw_epochs(sampler_of(kind, seed=3), 3)
    assert draw_epochs(sampler_of(kind, seed=3), 3) != draw_epochs(sampler_of(kind, seed=4), 3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_slices_of_two_processes_are_one_global_batch(kind):
    whole = draw_epochs(sampler_of(kind), 2)
    # Each process must be told the losses of the GLOBAL batch, as the engine's all-reduce does.
    parts = [sampler_of(kind, rank=rank, world_size=2) for rank in range(2)]
    for batch in whole:
        shares = []
        for part in parts:
            if part.step == part.steps:
                part.step = 0
            shares.append(part.draw()[part.slice].tolist())
            part.step += 1
            if kind is SelfCalibratedBatchSampler:
                counts = torch.bincount(torch.tensor(LABELS)[batch], minlength=5).float()
                part.update(counts * torch.arange(1.0, 6.0), counts)
        assert shares[0] == batch[0::2] and shares[1] == batch[1::2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [0, 1, 3, 5, 7])
def test_a_restored_sampler_goes_on_where_the_saved_one_stood(kind, stop, tmp_path):
    def batches(sampler, total):
        drawn = []
        while len(drawn) < total:
            for batch in sampler:
                drawn.append(batch)
                if kind is SelfCalibratedBatchSampler:
                    counts = torch.bincount(torch.tensor(LABELS)[batch], minlength=5).float()
                    sampler.update(counts * torch.arange(1.0, 6.0), counts)
                if len(drawn) == total:
                    break
        return drawn

    whole = batches(sampler_of(kind), 13)
    first = sampler_of(kind)
    begun = batches(first, stop) if stop else []
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = sampler_of(kind, seed=99)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert begun + batches(second, 13 - stop) == whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps, passes", [(0, 1), (10, 1), (11, 2), (29, 3), (31, 4)])
def test_few_images_are_passed_over_until_the_steps_are_reached(kind, steps, passes):
    sampler = sampler_of(kind)
    once = len(sampler)
    sampler.train_at_least(steps * once, epochs=10)
    assert len(sampler) == passes * once and len(draw_epochs(sampler, 1)) == passes * once


def test_every_pass_of_a_shuffled_epoch_is_an_order_of_its_own():
    sampler = sampler_of(ShuffledBatchSampler)
    once = len(sampler)
    sampler.train_at_least(2 * once, epochs=1)
    drawn = draw_epochs(sampler, 1)
    assert drawn == draw_epochs(sampler_of(ShuffledBatchSampler), 2)  # as two epochs of one pass
    for half in (drawn[:once], drawn[once:]):
        assert set(sum(half, [])) == set(range(len(LABELS)))
