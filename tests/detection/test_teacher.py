"""Which detectors can teach which: the first difference is named."""

import pytest

from common.runtime import UserError
from detection.distillers.teacher import GRID, check_pair, start_alike

FEATURES = (*GRID, "reg_max", "channels")


def description(**changes):
    model = {"head": "gfl", "strides": [8, 16, 32, 64, 128], "reg_max": 16, "anchor_scale": 8, "anchor_ratios": [1.0],
             "anchor_offset": 0, "channels": 256}
    classes = changes.pop("classes", ["ship", "plane", "tank"])
    return {"classes": classes, "model": {**model, **changes}}


def test_a_teacher_of_another_value_range_does_not_fit():
    student, teacher = ({**description(), "preprocessing": {"value_range": [0, high]}} for high in (2047, 4095))
    check_pair(student, student)
    with pytest.raises(UserError, match=r"the value range: \[0, 4095\] in the teacher, \[0, 2047\] in the student"):
        check_pair(student, teacher)


def test_equal_descriptions_fit():
    check_pair(description(), description())
    check_pair(description(), description(), FEATURES)
    check_pair(description(), description(channels=128, reg_max=8))  # features are not compared


def test_a_teacher_of_the_same_start_is_told_apart():
    settings = {"seed": 0, "init": "none", "init_detector": ""}
    student = {**description(), "settings": settings}
    assert start_alike(student, {**description(), "settings": {**settings, "epochs": 24}})
    for teacher in ({**description(), "settings": {**settings, "seed": 1}},
                    {**description(), "settings": {**settings, "init": "imagenet"}},
                    {**description(channels=128), "settings": settings}, description()):
        assert not start_alike(student, teacher)
    assert not start_alike(description(), description())  # converted ones do not say


@pytest.mark.parametrize("changes, words", [
    ({"classes": ["ship", "plane"]}, ["number of classes", "2 in the teacher", "3 in the student"]),
    ({"classes": ["ship", "tank", "plane"]}, ["class 1", "'tank' in the teacher", "'plane' in the student"]),
    ({"strides": [4, 8, 16, 32, 64]}, ["strides", "[4, 8, 16, 32, 64] in the teacher", "[8, 16, 32, 64, 128]"]),
    ({"reg_max": 8}, ["reg_max", "8 in the teacher", "16 in the student"]),
    ({"anchor_scale": 4}, ["anchor_scale", "4 in the teacher", "8 in the student"]),
    ({"anchor_offset": 0.5}, ["anchor_offset", "0.5 in the teacher", "0 in the student"]),
    ({"channels": 128}, ["channels", "128 in the teacher", "256 in the student"]),
    ({"channels": 128, "reg_max": 8}, ["reg_max"]),
])
def test_the_first_difference_is_named(changes, words):
    with pytest.raises(UserError) as raised:
        check_pair(description(), description(**changes), FEATURES)
    assert "\n" not in str(raised.value) and all(word in str(raised.value) for word in words)
