"""The seam between engine and method: one that assigns by its outputs and trains two networks together runs, resumes
and is published, without a word about it in the engine."""

import pytest
import torch

from common.runtime import Stopped
from common.training import train_one_epoch
from demo.draw_scenes import write_demo
from detection import engine, train_gfl
from detection.checkpoint import load_detector
from detection.losses.gfl import gfl_losses
from detection.methods import gfl
from detection.methods.ld import LD, LDSettings
from detection.methods.method import Method
from detection.network.detector import Detector
from tests.support import QUICK_DETECTOR

pytestmark = pytest.mark.usefixtures("without_pictures")


def forward(student, companions, images, teacher):
    return {"student": student(images), "peer": companions["peer"](images)}


def assign(step):
    assert step.outputs["peer"].logits.requires_grad  # the networks have answered
    return gfl.assign(step)


def losses(step, settings):
    return {f"{name}_{network}": loss for network, outputs in step.outputs.items()
            for name, loss in gfl_losses(outputs, step.targets, step.anchors).items()}


def weights(settings, num_classes):
    return {f"{name}_{network}": weight for network in ("student", "peer") for name, weight in gfl.WEIGHTS.items()}


PAIR = Method(name="pair", architecture=gfl.architecture, assign=assign, losses=losses, weights=weights,
              assigns_by_outputs=True, forward=forward,
              companions=lambda num_classes, settings: {"peer": Detector(num_classes, gfl.architecture(settings))})


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "tiny"
    write_demo(folder, seed=0, train=10, test=2, size=64)
    return ["--train", str(folder / "train.json"), "--test", str(folder / "test.json"), *QUICK_DETECTOR]


def train(*arguments):
    """Run the method's script. Returns its exit status."""
    with pytest.raises(SystemExit) as exit_:
        engine.run_stage(PAIR, train_gfl.SETTINGS, "", [str(argument) for argument in arguments])
    return exit_.value.code or 0


def test_two_networks_are_trained_together_resumed_together_and_one_is_published(flags, tmp_path, monkeypatch):
    assert train(*flags, "--output", tmp_path / "whole") == 0
    whole = torch.load(tmp_path / "whole" / "last.pt", weights_only=True)
    network, _ = load_detector(tmp_path / "whole" / "final.pt")
    assert set(whole["model"]) == set(network.state_dict()) and set(whole["companions"]) == {
        f"peer.{name}" for name in whole["model"]}
    assert not torch.equal(whole["companions"]["peer.head.classify.bias"], whole["model"]["head.classify.bias"])

    def stop_after_the_first(run, *arguments):
        if run.epoch == 1:
            raise Stopped("stopped by the test", 15)
        return train_one_epoch(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr("common.training.train_one_epoch", stop_after_the_first)
        assert train(*flags, "--output", tmp_path / "resumed") == 128 + 15
    assert train(*flags, "--output", tmp_path / "resumed", "--resume") == 0
    resumed = torch.load(tmp_path / "resumed" / "last.pt", weights_only=True)
    for part in ("model", "companions"):
        assert all(torch.equal(value, resumed[part][name]) for name, value in whole[part].items())


def test_a_companion_that_is_missing_in_the_checkpoint_is_one_line(flags, tmp_path, capsys):
    assert train(*flags, "--output", tmp_path / "run", "--epochs", "1") == 0
    (tmp_path / "run" / "results.json").unlink()
    checkpoint = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    del checkpoint["companions"]["peer.head.classify.bias"]
    torch.save(checkpoint, tmp_path / "run" / "last.pt")
    capsys.readouterr()
    assert train(*flags, "--output", tmp_path / "run", "--epochs", "1", "--resume") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "last.pt: not a checkpoint" in error


def test_the_weights_of_ld_are_its_settings():
    weights = {name: 7.0 + place for place, name in enumerate(("ld_main", "ld_vlr", "kd_main", "kd_vlr", "imitation"))}
    settings = LDSettings(**{f"lambda_{name}": weight for name, weight in weights.items()})
    assert LD.weights(settings, 3) == {**gfl.WEIGHTS, **weights}
    assert LD.weights(LDSettings(), 80)["kd_main"] == 10 and LD.weights(LDSettings(), 10)["kd_main"] == 1.25
