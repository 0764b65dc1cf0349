"""The long tail, the held-out part, and head, middle and tail, as functions of counts."""

import numpy as np
import pytest

from preparation.division import choose, groups_by_thirds, groups_by_threshold, held_out_counts, long_tail_counts
from recognition.published import DOTA, FGSC23


def test_the_profile_is_exponential():
    counts = [300, 500, 450, 10, 120]
    kept = long_tail_counts(counts, imbalance=16, max_per_class=400)
    # Ranks 1, 0, 2, 4, 3: 400 * 16 ** -(rank / 4) = 400, 200, 100, 50, 25 by rank; class 3 has only 10.
    assert kept.tolist() == [100, 400, 200, 10, 50]
    assert long_tail_counts(counts, max_per_class=400).tolist() == [300, 400, 400, 10, 120]
    assert long_tail_counts(counts).tolist() == counts
    assert long_tail_counts([7, 0, 7], imbalance=7).tolist() == [7, 0, 1]  # a class without images has no rank
    assert long_tail_counts([5], imbalance=9).tolist() == [5]


def test_every_class_gives_one_image_to_validation_but_never_its_last():
    assert held_out_counts([1, 2, 3, 14, 16, 100, 0], 0.1).tolist() == [0, 1, 1, 1, 2, 10, 0]
    assert held_out_counts([1, 2, 3], 0.99).tolist() == [0, 1, 2]
    assert held_out_counts([1, 2, 3], 0).tolist() == [0, 0, 0]


def test_choice_is_by_class_and_repeatable():
    labels = [0, 1, 0, 1, 0, 2]
    chosen = choose(labels, [2, 1, 0], np.random.default_rng(3))
    assert sorted(labels[i] for i in chosen) == [0, 0, 1] and (np.diff(chosen) > 0).all()
    assert (chosen == choose(labels, [2, 1, 0], np.random.default_rng(3))).all()


@pytest.mark.parametrize("counts, head, middle, tail", [
    ([9, 8, 7, 6, 5, 4, 3], [0, 1], [2, 3, 4], [5, 6]),
    ([3, 9, 5], [1], [2], [0]),
    ([100, 100, 100, 50, 20, 10], [0, 1, 2], [3], [4, 5]),
    ([100, 50, 50, 50, 50, 10], [0], [1, 2, 3, 4], [5]),
    ([9, 9, 9, 1, 1, 1], [0, 1, 2], [], [3, 4, 5]),
    ([4, 4, 4], [], [0, 1, 2], []),
    ([5, 2], [0], [], [1]),
])
def test_thirds_never_divide_equal_counts(counts, head, middle, tail):
    groups, rule = groups_by_thirds(counts)
    assert groups == {"head": head, "middle": middle, "tail": tail}
    if head:
        assert f"head has at least {min(counts[c] for c in head)} images" in rule
    if tail:
        assert f"tail has at most {max(counts[c] for c in tail)}" in rule


def test_thresholds_include_their_own_value_and_give_the_published_groups():
    assert groups_by_threshold([10, 5, 4, 9], 9, 4) == {"head": [0, 3], "middle": [1], "tail": [2]}
    assert groups_by_threshold(FGSC23["train"], 200, 99) == FGSC23["groups"]
    assert groups_by_threshold(DOTA["train"], 10000, 999) == DOTA["groups"]
