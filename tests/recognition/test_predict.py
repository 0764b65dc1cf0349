"""predict.py: which images it takes, and that what it has predicted is kept."""

import csv
import json
import os

import pytest
import torch
from PIL import Image

import predict
from common.images import find_images
from dataset import folder_of_list
from recognition.inference import Classifier
from tests.support import error_line
from tests.support import run_tool as run


def by_brightness(images):
    """Logits that are the higher for the first class the darker the image, (B, 2)."""
    bright = images.float().mean((1, 2, 3)) / 255
    return torch.stack([1 - bright, bright], dim=1)


@pytest.fixture
def classifier(monkeypatch):
    """A function that makes predict.py use a function of images as its network, image by image."""
    def use(logits_of):
        monkeypatch.setattr(predict, "open_classifier", lambda *_: Classifier(logits_of, ["dark", "bright"], 32, 1))
    return use


def draw(path, brightness=0):
    Image.new("L", (32, 32), brightness).save(path)
    return path


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_a_name_that_is_no_utf8_costs_no_prediction(classifier, tmp_path):
    classifier(by_brightness)
    odd = os.fsencode(tmp_path) + b"/a\xff.png"
    try:
        draw(odd)
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    draw(tmp_path / "b.png", 255)
    assert run(predict, "--weights", "x", tmp_path, "--csv", tmp_path / "out.csv", "--json", tmp_path / "out.json") == 0
    assert [row[:2] for row in read_csv(tmp_path / "out.csv")] == [
        ["path", "class"], [str(tmp_path / r"a\udcff.png"), "dark"], [str(tmp_path / "b.png"), "bright"]]
    first, second = json.loads((tmp_path / "out.json").read_text())
    assert os.fsencode(first["path"]) == odd and second["predictions"][0]["class"] == "bright"


def test_what_was_predicted_before_an_interruption_is_kept(classifier, tmp_path, capsys):
    seen = []

    def logits_of(images):
        if seen:
            raise KeyboardInterrupt
        seen.append(1)
        return by_brightness(images)

    classifier(logits_of)
    images = [draw(tmp_path / name) for name in ("a.png", "b.png")]
    outputs = ("--csv", tmp_path / "out.csv", "--json", tmp_path / "out.json")
    assert run(predict, "--weights", "x", *images, *outputs, "--top", "1") == 130
    assert read_csv(tmp_path / "out.csv") == [["path", "class", "probability"], [str(images[0]), "dark", "0.731059"]]
    assert [row["path"] for row in json.loads((tmp_path / "out.json").read_text())] == [str(images[0])]
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("flag", ["--csv", "--json"])
def test_an_output_that_cannot_be_written_is_noticed_first(monkeypatch, tmp_path, capsys, flag):
    monkeypatch.setattr(predict, "open_classifier", None)  # not to be reached
    (tmp_path / "file").write_text("")
    for path, complaint in ((tmp_path, "is a folder; expected the name of a file to write"),
                            (tmp_path / "file" / "out", "could not be written (")):
        assert run(predict, "--weights", "x", tmp_path / "a.png", flag, path) == 2
        assert f"{path}: {complaint}" in error_line(capsys)


def test_lists_may_have_labels_after_any_space(tmp_path):
    (tmp_path / "list.txt").write_text("a.png 3\nb.png\t12\nwith space 2.png \t 0\nwith space 2.png\n")
    assert find_images([tmp_path / "list.txt"]) == [
        tmp_path / name for name in ("a.png", "b.png", "with space 2.png", "with space 2.png")]


def test_the_lists_of_a_data_set_are_relative_to_its_images(tiny, tmp_path):
    images = find_images([tiny / "test.txt"], folder_of_list)
    assert len(images) == 24 and all(image.is_file() for image in images)
    (tmp_path / "test.txt").write_text("a.png 0")  # no data set
    assert find_images([tmp_path / "test.txt"], folder_of_list) == [tmp_path / "a.png"]
