"""The scripts of PAA, LAD and CoLAD on tiny drawn scenes, as a user runs them, and the tools on what they leave."""

import json
import os
import signal

import pytest
import torch
from PIL import Image

from common.files import save_checkpoint
from common.runtime import UserError
from demo.draw_scenes import write_demo
from detection import compare, engine, predict, publish, show_assignment, train_colad, train_gfl, train_lad, train_paa
from detection.checkpoint import describe_model, load_detector
from detection.methods.paa import RECIPES
from detection.network.detector import Architecture, Detector
from detection.settings import parse_settings
from tests.support import (
    QUICK_DETECTOR,
    error_line,
    log_of,
    run_detector,
    run_program,
    run_tool,
    run_two_processes,
    stop_at_step,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("without_pictures")  # of the tests: the fixtures' runs draw theirs
PEER = ("--peer-depth", "18", "--auxiliary", "iou+iop")
TESTED = {"final.pt", "results.json", "precision_recall.png", "detections.png", "detections.json"}
FILES = {"settings.json", "log.jsonl", "last.pt", "curves.png", *TESTED}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder with train.json (10 scenes, one of them without objects), test.json (3 scenes) and their images."""
    folder = tmp_path_factory.mktemp("scenes") / "tiny"
    write_demo(folder, seed=0, train=10, test=3, size=64)
    content = json.loads((folder / "train.json").read_text())
    empty = content["images"][0]["id"]
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] != empty]
    (folder / "train.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def flags(scenes):
    return ("--train", scenes / "train.json", "--test", scenes / "test.json", *QUICK_DETECTOR, "--epochs", "1")


@pytest.fixture(scope="module")
def runs(flags, tmp_path_factory):
    """A folder with the finished runs of a PAA detector, of one that it has taught, and of two together."""
    folder = tmp_path_factory.mktemp("runs")
    for stage, more in (("paa", ()), ("lad", ("--teacher", folder / "paa" / "final.pt", "--auxiliary", "iou+cop"))):
        done = run_program("-m", f"detection.train_{stage}", *flags, *more, "--output", folder / stage)
        assert done.returncode == 0, done.stderr
    assert run_detector(train_colad, *flags, *PEER, "--output", folder / "colad") == 0  # below by torchrun
    return folder


# ---- whole runs ------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_files(runs):
    for stage in ("paa", "lad", "colad"):
        assert set(os.listdir(runs / stage)) == FILES | ({"peer"} if stage == "colad" else set())
        results = json.loads((runs / stage / "results.json").read_text())
        assert results["stage"] == stage and results["images"] == 3 and results["AP50"] is not None
        assert (results["settings"]["suppression"], results["suppression"]) == ("auto", "nms-voting")
    terms = {"cls", "box", "iou"}
    for stage, expected in (("paa", terms), ("lad", terms), ("colad", {
            f"{term}_{network}" for term in terms for network in ("student", "peer")})):
        (record,) = log_of(runs / stage)
        assert set(record) == expected | {"epoch", "lr", "loss"}
        assert record["loss"] == pytest.approx(sum(record[term] for term in expected))


def test_lad_with_ltds_calibration_of_the_pyramid(runs, flags, tmp_path):
    assert run_detector(train_lad, *flags, "--teacher", runs / "paa" / "final.pt", "--ccd", "--output",
                        tmp_path / "ccd") == 0
    (record,) = log_of(tmp_path / "ccd")
    assert {"cls", "box", "iou", "ccd_fused", "ccd_pooled", "ccd_attention"} < set(record)
    assert torch.load(tmp_path / "ccd" / "last.pt", weights_only=True)["companions"]
    assert load_detector(tmp_path / "ccd" / "final.pt")[0].architecture == Architecture(18, 64, 1, head="paa")


def test_checkpoints_say_what_they_are_and_hold_no_teacher(runs):
    for stage, auxiliary in (("paa", "iou"), ("lad", "iou+cop"), ("colad", "iou+iop"), ("colad/peer", "iou")):
        network, description = load_detector(runs / stage / "final.pt")
        assert network.architecture == Architecture(18, 64, 1, head="paa", auxiliary=auxiliary)
        assert description["stage"] == stage.split("/")[0] and description["epoch"] == 1
        assert set(weights_of(runs / stage)) == set(network.state_dict())


def test_both_networks_of_colad_are_tested_and_trained_further(runs):
    assert set(os.listdir(runs / "colad" / "peer")) == TESTED
    last = torch.load(runs / "colad" / "last.pt", weights_only=True)
    peer = weights_of(runs / "colad" / "peer")
    assert {name.removeprefix("peer.") for name in last["companions"]} == set(peer)
    assert all(torch.equal(value, last["companions"][f"peer.{name}"]) for name, value in peer.items())
    digests = {json.loads((runs / run / "results.json").read_text())["weights_sha256"] for run in (
        "colad", "colad/peer")}
    assert len(digests) == 2


def test_colad_stopped_and_resumed_ends_with_the_networks_of_a_run_never_stopped(flags, tmp_path, monkeypatch):
    more = (*flags, *PEER, "--short", "48,64")
    assert run_detector(train_colad, *more, "--output", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        stop_at_step(patch, engine, 2)
        assert run_detector(train_colad, *more, "--output", tmp_path / "parts") == 128 + signal.SIGTERM
    assert run_detector(train_colad, *more, "--output", tmp_path / "parts", "--resume") == 0
    for network in (".", "peer"):
        whole, parts = (weights_of(tmp_path / run / network) for run in ("whole", "parts"))
        assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")


def test_two_processes_take_the_step_of_one(flags, runs, tmp_path):
    """Both networks of CoLAD with frozen batch norms: the assignment is that of each image, the divisors of all."""
    torch.save(Detector(3, Architecture(18, 64, 1)).backbone.state_dict(), tmp_path / "resnet18.pt")
    more = [str(flag) for flag in (*flags, *PEER, "--init", tmp_path / "resnet18.pt")]
    assert run_detector(train_colad, *more, "--output", tmp_path / "one") == 0
    done = run_two_processes("-m", "detection.train_colad", *more, "--output", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    for network in (".", "peer"):
        one, two = (weights_of(tmp_path / run / network) for run in ("one", "two"))
        assert max((value.float() - two[name]).abs().max().item() for name, value in one.items()) < 1e-4
    first, second = (log_of(tmp_path / run)[0] for run in ("one", "two"))
    assert first == pytest.approx(second, rel=1e-3)


@pytest.mark.parametrize("distill", ["soft-label", "solad"])
def test_soft_labels_train(flags, runs, tmp_path, distill):
    """A teacher of one epoch knows nothing: a small weight keeps its student in bounds."""
    assert run_detector(train_lad, *flags, "--teacher", runs / "paa" / "final.pt", "--distill", distill,
                        "--lambda-kd-cls", "1e-4", "--kd-min-iou", "0.01", "--output", tmp_path / "run") == 0
    (record,) = log_of(tmp_path / "run")
    assert {"kd_cls", "kd_iou", "kd_box"} <= set(record) and ("cls" in record) == (distill == "solad")
    assert record["kd_box"] > 0


# ---- tools -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["lad", "colad/peer"])
def test_the_tools_need_not_be_told_the_method(runs, scenes, tmp_path, stage):
    weights = runs / stage / "final.pt"
    trained = json.loads((runs / stage / "results.json").read_text())
    assert run_tool(publish, "--weights", weights, "--output", tmp_path) == 0
    (published,) = tmp_path.glob("final-*.pt")
    assert run_detector(train_gfl, "--test-only", "--weights", published, "--test", scenes / "test.json", "--output",
                        tmp_path / "test", "--device", "cpu", "--workers", "0") == 0
    again = json.loads((tmp_path / "test" / "results.json").read_text())
    assert again["per_class"] == trained["per_class"] and again["suppression"] == "nms-voting"
    image = sorted((scenes / "images").glob("*"))[0]
    assert run_tool(predict, "--weights", published, image, "--output", tmp_path / "found", "--json",
                    tmp_path / "found.json", "--device", "cpu") == 0
    assert (tmp_path / "found" / image.name).exists() and json.loads((tmp_path / "found.json").read_text())


def test_runs_of_all_methods_are_compared(runs, tmp_path, capsys):
    """Each tested as published: PAA by nms-voting, and a GFL detector before there was a choice by nms."""
    before = json.loads((runs / "paa" / "results.json").read_text())
    before["settings"]["suppression"] = "nms"
    for results in (before, {name: value for name, value in before.items() if name != "suppression"}):
        (tmp_path / "results.json").write_text(json.dumps(results))
        rows = [f"{stage}={runs / stage}" for stage in ("paa", "lad", "colad", "colad/peer")] + [f"GFL={tmp_path}"]
        if "suppression" in results:
            with pytest.raises(UserError, match="not tested alike: .*with auto .*; GFL .*with nms on"):
                compare.main(rows)
        else:
            compare.main(rows)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == [
        "paa", "lad", "colad", "colad/peer", "GFL"]


def test_the_positive_anchors_of_two_detectors_are_drawn_side_by_side(runs, scenes, tmp_path, capsys):
    picture, both = tmp_path / "assignment.png", [runs / stage / "final.pt" for stage in ("paa", "lad")]
    assert run_tool(show_assignment, scenes / "test.json", "--weights", *both, "--output", picture, "--device",
                    "cpu") == 0
    with Image.open(picture) as sheet:
        assert sheet.size == (show_assignment.GAP * 3 + 2 * show_assignment.WIDTH, show_assignment.GAP + 3 * (
            show_assignment.GAP + show_assignment.CAPTION + show_assignment.WIDTH))
        left, right = (sheet.crop((x, 0, x + 568, sheet.height)) for x in (8, 576))
        assert left.tobytes() != right.tobytes()
    capsys.readouterr()
    assert run_tool(show_assignment, scenes / "test.json", "--weights", *both, "--names", "no.png") == 2
    assert "--names no.png" in error_line(capsys)
    oriented = Architecture(18, 64, 1, 0, head="rotated")
    save_checkpoint(tmp_path / "oriented.pt", {"model": Detector(3, oriented).state_dict(), "description": {
        **load_detector(both[0])[1], "model": describe_model(oriented)}})
    assert run_tool(show_assignment, scenes / "test.json", "--weights", both[0], tmp_path / "oriented.pt") == 2
    assert "oriented.pt: a rotated detector; expected gfl or paa" in error_line(capsys)


# ---- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "more", "words"), [
    (train_lad, ("--teacher", "no.pt"), "no such checkpoint; train one with python -m detection.train_paa"),
    (train_colad, ("--init-peer", "no.pt"), "no.pt"),
    (train_lad, ("--teacher", "{gfl}"), "differ in head: 'gfl' in the teacher, 'paa' in the student"),
    (train_colad, ("--init-peer", "{gfl}"), "a gfl detector of 3 classes with anchors of size 1; expected paa, 3 "
     "and 1"),
    (train_lad, ("--teacher", "{paa}", "--anchor-size", "0.5"), "differ in anchor_scale: 8 in the teacher, 4.0 in"),
    (train_colad, ("--init-peer", "{paa}", "--anchor-size", "0.5"), "expected paa, 3 and 0.5"),
    (train_lad, ("--teacher", "no.pt", "--kd-min-iou", "2"), "--kd-min-iou 2.0: expected 0 to 1"),
])
def test_what_does_not_fit_is_one_line(flags, runs, tmp_path, capsys, script, more, words):
    checkpoint = torch.load(runs / "paa" / "final.pt", weights_only=True)
    gfl = Detector(3, Architecture(18, 64, 1))
    description = {**checkpoint["description"], "model": {
        name: value for name, value in {**checkpoint["description"]["model"], "head": "gfl"}.items()
        if name not in ("auxiliary", "cop_padding")}}  # as it was before there were others
    torch.save({"model": gfl.state_dict(), "description": description}, tmp_path / "gfl.pt")
    more = [flag.format(gfl=tmp_path / "gfl.pt", paa=runs / "paa" / "final.pt") for flag in more]
    assert run_detector(script, *flags, *more, "--output", tmp_path / "run") == 2
    error = error_line(capsys)
    assert words in error and not (tmp_path / "run" / "last.pt").exists()


def test_recipes_are_those_of_the_paper():
    settings = parse_settings("paa", train_paa.SETTINGS, "", ["--recipe", "2x"])
    assert (settings.epochs, settings.lr_steps, settings.short) == (24, (17, 23), (640, 800))
    assert parse_settings("lad", train_lad.SETTINGS, "", ["--recipe", "1x"]).epochs == RECIPES["1x"]["epochs"] == 12
    with pytest.raises(SystemExit):
        parse_settings("paa", train_paa.SETTINGS, "", ["--recipe", "voc"])
