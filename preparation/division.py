"""The division of images: the long tail, the held-out parts, and head, middle and tail. Pure functions of labels,
counts and a seeded generator."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dataset import GROUPS

Counts = Sequence[int] | np.ndarray
Groups = dict[str, list[int]]  # class ids


def long_tail_counts(counts: Counts, imbalance: float | None = None, max_per_class: int | None = None) -> np.ndarray:
    """The number of training images that each class keeps, an int64 array like `counts`.

    The classes that have images are ranked by descending count (equal counts by id); rank i of C keeps
    n_i = N * imbalance ** (-i / (C - 1)), rounded, N = min(largest count, max_per_class), but at least 1 and at most
    all of its images. Without `imbalance` the counts are only capped."""
    counts = np.asarray(counts, dtype=np.int64)
    largest = min(counts.max(), max_per_class or counts.max())
    if imbalance is None:
        return np.minimum(counts, largest)
    ranked = [class_id for class_id in np.argsort(-counts, kind="stable") if counts[class_id]]
    ranks = np.arange(len(ranked))
    profile = np.rint(largest * float(imbalance) ** (-ranks / max(len(ranked) - 1, 1))).astype(np.int64)
    kept = np.zeros_like(counts)
    kept[ranked] = np.minimum(np.maximum(profile, 1), counts[ranked])
    return kept


def choose(labels: Counts, wanted: Counts, generator: np.random.Generator) -> np.ndarray:
    """Indices, ascending, of a random choice of `wanted[c]` of the samples of each class c."""
    labels = np.asarray(labels, dtype=np.int64)
    chosen = [generator.permutation(np.flatnonzero(labels == c))[:count] for c, count in enumerate(wanted)]
    return np.sort(np.concatenate(chosen))


def held_out_counts(counts: Counts, fraction: float) -> np.ndarray:
    """The number of samples of each class in a held-out part: round(fraction * n), at least 1, never all n.

    A class with one sample therefore has none held out. `fraction` 0 holds nothing out."""
    counts = np.asarray(counts, dtype=np.int64)
    if fraction == 0:
        return np.zeros_like(counts)
    wanted = np.maximum(np.rint(fraction * counts).astype(np.int64), 1)
    return np.minimum(wanted, np.maximum(counts - 1, 0))


def groups_by_threshold(counts: Counts, head_min: int, tail_max: int) -> Groups:
    """{"head": [ids with count >= head_min], "tail": [ids with count <= tail_max], "middle": [the others]}."""
    head = [c for c, count in enumerate(counts) if count >= head_min]
    tail = [c for c, count in enumerate(counts) if count <= tail_max and count < head_min]
    middle = [c for c in range(len(counts)) if c not in set(head) | set(tail)]
    return dict(zip(GROUPS, (head, middle, tail), strict=True))


def groups_by_thirds(counts: Counts) -> tuple[Groups, str]:
    """Cut the classes, ranked by count, into n // 3 head and n // 3 tail classes with the middle between.

    Classes with equal counts are in the same group. Of the pairs of cuts for which that holds, the one is taken that
    leaves the fewest groups empty (never head alone or tail alone) and then lies nearest to the thirds. Returns
    (groups, human-readable rule)."""
    ranked = sorted((int(count) for count in counts), reverse=True)
    classes, third = len(ranked), len(ranked) // 3
    cuts = [0, *(i for i in range(1, classes) if ranked[i - 1] > ranked[i]), classes]

    def cost(pair: tuple[int, int]) -> tuple[Any, ...]:
        first, second = pair
        empty = (first == 0) + (first == second) + (second == classes)
        lopsided = (first == 0) != (second == classes)
        return empty, lopsided, abs(first - third) + abs(second - (classes - third)), pair

    first, second = min(((a, b) for a in cuts for b in cuts if a <= b), key=cost)
    head_min = ranked[first - 1] if first else ranked[0] + 1
    tail_max = ranked[second] if second < classes else ranked[-1] - 1
    head_words = f"head has at least {head_min} images" if first else "no class is head"
    tail_words = f"tail has at most {tail_max}" if second < classes else "no class is tail"
    rule = f"classes ranked by training count (train and val together) and cut into thirds: {head_words}, {tail_words}"
    return groups_by_threshold(counts, head_min, tail_max), rule
