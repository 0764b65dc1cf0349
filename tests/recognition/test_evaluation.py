"""The predictions of a network against its logits one by one; a test whose pictures cannot be drawn."""

import json
import os

import pytest
import torch

import baseline_resnet50
from common.runtime import UserError
from dataset import network_input
from recognition import evaluation
from recognition.settings import Settings
from recognition.stage import load_test_images, read_lists
from resnet50 import ResNet50
from tests.support import TINY_GROUPS, run_main

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return ResNet50(6).eval()


@pytest.fixture(scope="module")
def images(tiny):
    """The 24 test images of the tiny data set."""
    settings = Settings(data_root=str(tiny), image_size=32)
    return load_test_images(read_lists(baseline_resnet50.STAGE, settings, training=False), settings)


@pytest.fixture(scope="module")
def predictions(network, images):
    return evaluation.predict_all(network, images, CPU, "fp32")


def test_predictions_are_the_highest_logit_and_its_softmax(network, images, predictions):
    for i in range(len(images)):
        with torch.no_grad():
            logits = network(network_input(images[i][0][None]))[0][0]
        assert predictions.classes[i] == logits.argmax()
        assert predictions.probabilities[i].item() == pytest.approx((logits - logits.logsumexp(0)).exp().max().item(),
                                                                    rel=1e-4)
    confusion = evaluation.evaluate(network, images, 6, CPU, "fp32")
    pairs = list(zip(images.labels.tolist(), predictions.classes.tolist(), strict=True))
    assert confusion.tolist() == [[pairs.count((true, predicted)) for predicted in range(6)] for true in range(6)]


@pytest.mark.parametrize("processes", [2, 5, 30])
def test_the_shares_of_several_processes_add_up_to_the_whole(network, images, predictions, processes, monkeypatch):
    """With 30 some have no image."""
    shares = []
    monkeypatch.setattr(evaluation, "world_size", lambda: processes)
    for rank in range(processes):
        monkeypatch.setattr(evaluation, "rank", lambda rank=rank: rank)
        shares.append(evaluation.predict_all(network, images, CPU, "fp32"))
    assert torch.equal(sum(share.classes for share in shares), predictions.classes)
    assert torch.allclose(sum(share.probabilities for share in shares), predictions.probabilities, rtol=1e-4)


# ---- pictures that fail ----------------------------------------------------------------------------------------------


@pytest.fixture
def test_weights(network, tiny, tmp_path):
    """A function that runs a test of the network into tmp_path/test and returns its exit status."""
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    return lambda: run_main(baseline_resnet50, "--test-only", "--weights", tmp_path / "weights.pt", "--data-root", tiny,
                            "--output", tmp_path / "test", "--image-size", "32", "--device", "cpu")


def fail(*_):
    raise ValueError("ParseException:\nno such symbol")


def test_pictures_that_fail_are_notes_and_leave_the_numbers(test_weights, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "test"
    assert test_weights() == 0 and {"confusion.png", "mistakes.png"} < set(os.listdir(folder))
    numbers = json.loads((folder / "results.json").read_text())
    (folder / "results.json").unlink()
    capsys.readouterr()
    monkeypatch.setattr(evaluation, "draw_mistakes", fail)
    monkeypatch.setattr(evaluation.report, "draw_confusion", fail)
    assert test_weights() == 0
    # Those of the first test are not left as those of the second.
    assert set(os.listdir(folder)) == {"results.json", "results.txt"}
    assert json.loads((folder / "results.json").read_text())["confusion"] == numbers["confusion"]
    output = capsys.readouterr()
    for name in ("confusion.png", "mistakes.png"):
        assert f"note: {folder / name} was not drawn (ParseException: no such symbol)\n" in output.out
    assert output.err == ""


def test_a_picture_that_cannot_be_written_is_a_note(test_weights, tmp_path, capsys):
    (tmp_path / "test" / "mistakes.png").mkdir(parents=True)
    assert test_weights() == 0
    assert set(os.listdir(tmp_path / "test")) == {"results.json", "results.txt", "confusion.png", "mistakes.png"}
    output = capsys.readouterr().out
    assert "note: " in output and "mistakes.png: could not be written" in output


def test_a_checkpoint_is_tested_with_the_value_range_of_its_training(own_tiny, tmp_path, monkeypatch):
    content = json.loads((own_tiny / "dataset.json").read_text())
    (own_tiny / "dataset.json").write_text(json.dumps({**content, "value_range": [0, 4095]}))
    ranges = []

    def no_images(lists, settings):
        ranges.append(lists.info.value_range)
        raise UserError("seen enough")

    monkeypatch.setattr(evaluation, "load_test_images", no_images)
    for own in ({"value_range": [0, 2047]}, {}):  # the latter: made before value ranges
        torch.save({"model": ResNet50(6).state_dict(), "description": {
            "stage": "baseline", "classes": list("abcdef"), "groups": TINY_GROUPS, "epoch": 1, "selected_on": "val",
            "preprocessing": {"image_size": 32, **own}}}, tmp_path / "best.pt")
        assert run_main(baseline_resnet50, "--test-only", "--weights", tmp_path / "best.pt", "--data-root", own_tiny,
                        "--output", tmp_path / "test", "--device", "cpu") == 2
    assert ranges == [(0, 2047), None]
