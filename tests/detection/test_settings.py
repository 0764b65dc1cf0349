"""The settings of a detector: recipes, flags, and values of another form."""

import dataclasses

import pytest

from detection import train_gfl, train_ld
from detection.settings import RECIPES, parse_settings
from tests.support import run_detector


def test_a_recipe_is_in_place_of_the_script_and_flags_are_in_place_of_it():
    settings = parse_settings("gfl", train_gfl.SETTINGS, "", ["--recipe", "2x", "--epochs", "5", "--train",
                                                               "x/VOC2007/ImageSets/Main/trainval.txt"])
    assert (settings.lr_steps, settings.short, settings.epochs) == (RECIPES["2x"]["lr_steps"], (480, 800), 5)
    assert settings.output == "runs/VOC2007/gfl"
    in_the_script = dataclasses.replace(train_gfl.SETTINGS, recipe="voc")
    assert parse_settings("gfl", in_the_script, "", []).epochs == 4
    assert parse_settings("ld", train_ld.SETTINGS, "", []).teacher == "runs/mine/teacher/final.pt"


@pytest.mark.parametrize("flag, value, expected", [
    ("--short", "480,x", "a side in pixels, or two joined by a comma, such as 480,800"),
    ("--short", "1,2,3", "a side in pixels, or two"), ("--value-range", "9,x", "two whole numbers, the lower first"),
    ("--lambda-kd-main", "much", "auto or a number")])
def test_a_value_of_another_form_is_told_which_was_expected(capsys, flag, value, expected):
    assert run_detector(train_ld, flag, value) == 2
    assert f"error: argument {flag}: {value!r}: expected {expected}" in capsys.readouterr().err
