"""The picture of the most confident mistakes: which images are chosen, and that any names and groups can be drawn."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dataset import GROUPS, DatasetInfo
from recognition.evaluation import Predictions
from recognition.mistakes import draw_mistakes, most_confident_mistakes
from tests.support import ODD_NAMES

GROUP_OF_CLASS = torch.tensor([0, 1, 2, 0])  # head, middle, tail, head


def chosen_slowly(labels, classes, probabilities, count):
    """By a loop that takes the most confident of the remaining images."""
    rows = {}
    for number, group in enumerate(GROUPS):
        left = [i for i in range(len(labels)) if classes[i] != labels[i] and GROUP_OF_CLASS[labels[i]] == number]
        while left and len(rows.get(group, [])) < count:
            best = left[0]
            for i in left:
                if probabilities[i] > probabilities[best]:
                    best = i
            left.remove(best)
            rows.setdefault(group, []).append(best)
    return rows


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from([0.25, 0.5, 0.75, 1.0]))),
       st.integers(1, 4))
def test_the_most_confident_are_chosen_by_group_and_the_first_of_equals(images, count):
    labels, classes, probabilities = zip(*images, strict=True) if images else ((), (), ())
    predictions = Predictions(torch.tensor(classes, dtype=torch.int64), torch.tensor(probabilities))
    found = most_confident_mistakes(torch.tensor(labels, dtype=torch.int64), predictions, GROUP_OF_CLASS, count)
    expected = chosen_slowly(labels, classes, probabilities, count)
    assert found == expected and list(found) == list(expected)


def test_without_mistakes_none_are_chosen():
    labels = torch.tensor([0, 1, 2, 3])
    assert most_confident_mistakes(labels, Predictions(labels, torch.ones(4)), GROUP_OF_CLASS) == {}


class Images:
    """A dataset of noise, which notes what is read of it."""

    def __init__(self, labels, size=24):
        self.labels, self.size, self.read = np.array(labels), size, []

    def __getitems__(self, indices):
        self.read += indices
        generator = np.random.default_rng(0)
        pixels = generator.integers(0, 256, (len(indices), 1, self.size, self.size), dtype=np.uint8)
        return torch.from_numpy(pixels), torch.from_numpy(self.labels[indices])


def drawn(tmp_path, labels, classes, names="abcd"):
    """(size of the picture in pixels, indices of the images read) where `classes` were predicted."""
    info = DatasetInfo(tmp_path, "hand", list(names), {"head": [0, 3], "middle": [1], "tail": [2]}, "", tmp_path)
    images = Images(labels)
    predictions = Predictions(torch.tensor(classes), torch.linspace(0.2, 1, len(labels)))
    draw_mistakes(images, predictions, info, f"{names[0]}, student", tmp_path / "mistakes.png")
    with Image.open(tmp_path / "mistakes.png") as picture:
        return picture.size, images.read


def test_a_row_for_each_group_with_mistakes(tmp_path):
    three, read = drawn(tmp_path, [0, 1, 2, 3, 3], [1, 2, 3, 0, 3])
    assert read == [3, 0, 1, 2]
    two, read = drawn(tmp_path, [0, 1, 2], [1, 1, 0])
    assert read == [0, 2]
    one, read = drawn(tmp_path, [2, 2, 2], [2, 0, 1])
    assert read == [2, 1]
    none, read = drawn(tmp_path, [2, 2, 2], [2, 2, 2])
    assert read == [] and none[0] == one[0] == three[0]
    assert none[1] < one[1] < two[1] < three[1] < 700


def test_no_more_images_are_read_and_shown_than_fit(tmp_path):
    few, many = drawn(tmp_path, [0, 1, 2], [1, 2, 3]), drawn(tmp_path, [0, 1, 2] * 400, [1, 2, 3] * 400)
    assert many[0] == few[0] and sorted(many[1]) == list(range(1170, 1200))


@pytest.mark.parametrize("names", ODD_NAMES)
def test_any_names_are_drawn(tmp_path, names, recwarn):
    assert drawn(tmp_path, [0, 1, 2], [1, 2, 3], names)[0] == drawn(tmp_path, [0, 1, 2], [1, 2, 3])[0]
    assert not recwarn.list
