"""What is wrong with the data or the settings of a detector's run is one line, and nothing is left behind."""

import json
import os

import pytest

from detection import train_gfl, train_ld
from tests.support import QUICK_DETECTOR, error_line, log_of, run_detector

pytestmark = pytest.mark.usefixtures("without_pictures")


def test_a_loss_that_is_not_finite_stops_the_run(flags, tmp_path, capsys):
    assert run_detector(train_gfl, *flags, "--lr", "1000", "--warmup-steps", "0", "--output",
                        tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert "error: stage gfl, epoch" in message and "is nan" in message and message.count("\n") == 1
    assert not (tmp_path / "run" / "final.pt").exists()


def test_test_images_that_are_trained_on_or_of_another_size_stop_a_run_before_it_begins(scenes, tmp_path, capsys):
    flags = ("--train", scenes / "train.json", *QUICK_DETECTOR, "--output", tmp_path / "run", "--test")
    assert run_detector(train_gfl, *flags, os.path.relpath(scenes / "train.json")) == 2
    assert "10 of its 10 images are trained on too" in error_line(capsys)
    content = json.loads((scenes / "test.json").read_text())
    content["images"][3]["width"] += 1
    (tmp_path / "test.json").write_text(json.dumps(content))
    assert run_detector(train_gfl, *flags, tmp_path / "test.json", "--test-images", scenes / "images") == 2
    assert "is 64 x 64 pixels; expected 65 x 64" in error_line(capsys) and not (tmp_path / "run").exists()


def test_no_teacher_is_one_line(flags, tmp_path, capsys):
    assert run_detector(train_ld, *flags, "--teacher", tmp_path / "no.pt", "--output", tmp_path / "ld") == 2
    message = capsys.readouterr().err
    assert "no such checkpoint; train one with python -m detection.train_gfl" in message and message.count("\n") == 1


def broken(scenes, tmp_path, damage):
    """A copy of train.json, changed by damage(content) or replaced by the text that it returns."""
    content = json.loads((scenes / "train.json").read_text())
    text = damage(content) or json.dumps(content)
    (tmp_path / "train.json").write_text(text)
    return tmp_path / "train.json"


def without_area(content):
    content["annotations"][0]["bbox"][2] = 0


def outside(content):
    content["annotations"][0]["bbox"][0] = 5000


def unknown_category(content):
    content["annotations"][0]["category_id"] = 77


def missing_image(content):
    content["images"][0]["file_name"] = "gone.png"


@pytest.mark.parametrize(("damage", "words"), [
    (lambda content: "{\n broken", "train.json:2: not valid JSON"), (without_area, "annotation"),
    (outside, "annotation"), (unknown_category, "77"), (missing_image, "gone.png")])
def test_bad_annotations_are_one_line(flags, scenes, tmp_path, capsys, damage, words):
    source = broken(scenes, tmp_path, damage)
    assert run_detector(train_gfl, *flags, "--train", source, "--images", scenes / "images", "--output",
                    tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_category_that_only_the_test_part_has_is_named(flags, scenes, tmp_path, capsys):
    content = json.loads((scenes / "test.json").read_text())
    content["categories"][1]["name"] = "submarine"
    content["annotations"][0]["category_id"] = content["categories"][1]["id"]
    (tmp_path / "test.json").write_text(json.dumps(content))
    assert run_detector(train_gfl, *flags, "--test", tmp_path / "test.json", "--images", scenes / "images",
                    "--output", tmp_path / "run") == 2
    assert "submarine" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [("--short", "20"), ("--short", "64,48"), ("--channels", "72"), ("--epochs", "0")])
def test_settings_out_of_range_are_one_line(flags, tmp_path, capsys, flag):
    assert run_detector(train_gfl, *flags, *flag, "--output", tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert flag[0] in message and message.count("\n") == 1


def test_no_object_to_learn_from_is_named(flags, scenes, tmp_path, capsys):
    source = broken(scenes, tmp_path, lambda content: content["annotations"].clear())
    assert run_detector(train_gfl, *flags, "--train", source, "--images", scenes / "images", "--output",
                    tmp_path / "run") == 2
    assert "train.json: no object that can be trained on" in capsys.readouterr().err


def test_images_to_test_on_may_lie_elsewhere_and_hold_nothing_to_find(flags, scenes, tmp_path):
    """All AP are None then, in the log as well."""
    content = json.loads((scenes / "test.json").read_text())
    (scenes / "images").rename(scenes / "pictures")
    try:
        (tmp_path / "test.json").write_text(json.dumps({**content, "annotations": []}))
        assert run_detector(train_gfl, *flags, "--epochs", "1", "--images", scenes / "pictures", "--test",
                        tmp_path / "test.json", "--test-images", scenes / "pictures", "--test-every", "1", "--output",
                        tmp_path / "run") == 0
    finally:
        (scenes / "pictures").rename(scenes / "images")
    (record,) = log_of(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["AP"] is record["AP"] is None
