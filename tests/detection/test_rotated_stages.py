"""The scripts of rotated RetinaNet and Rotated-LD on tiny drawn scenes, as a user runs them, and the tools on what they
leave."""

import dataclasses
import json
import math
import os
import re
import signal
import zipfile

import numpy as np
import pytest
import torch

from benchmarks import bench_detection_inference
from common.runtime import UserError
from demo.draw_scenes import write_demo
from detection import compare, engine, predict, publish, train_gfl, train_rotated, train_rotated_ld
from detection import test as test_script
from detection.checkpoint import load_detector
from detection.data.records import Annotations, Record
from detection.evaluation import by_image
from detection.geometry.oriented import corners
from detection.methods.rotated_ld import ROTATED_LD, RotatedLDSettings
from detection.network.detector import Architecture, Detector
from detection.settings import parse_settings
from tests.support import (
    QUICK_DETECTOR,
    error_line,
    log_of,
    run_detector,
    run_program,
    run_tool,
    stop_at_step,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("without_pictures")  # of the tests: the fixtures' runs draw theirs


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder of oriented scenes: train (8) and test (3), in DOTA's layout."""
    folder = tmp_path_factory.mktemp("scenes") / "tiny"
    write_demo(folder, seed=0, train=8, test=3, size=64, oriented=True)
    return folder


@pytest.fixture(scope="module")
def flags(scenes):
    return ("--train", scenes / "train", "--test", scenes / "test", *QUICK_DETECTOR)


@pytest.fixture(scope="module")
def runs(flags, tmp_path_factory):
    """A folder with the finished runs of a teacher and of a student that it has taught, each a user's command."""
    folder = tmp_path_factory.mktemp("runs")
    for script, *more in (("train_rotated", "--output", folder / "teacher", "--test-every", "1"),
                          ("train_rotated_ld", "--output", folder / "ld", *taught(folder))):
        done = run_program("-m", f"detection.{script}", *flags, *more)
        assert done.returncode == 0, done.stderr
    return folder


def taught(folder):
    return ("--teacher", folder / "teacher" / "final.pt", "--imitation", "finegrained")


def test_runs_leave_their_files_and_log_every_term(runs):
    for stage, terms in (("teacher", {"cls", "box"}), ("ld", {"cls", "box", "ld", "kd", "imitation"})):
        assert set(os.listdir(runs / stage)) == {
            "settings.json", "log.jsonl", "last.pt", "final.pt", "results.json", "curves.png", "precision_recall.png",
            "detections.png", "submission.zip"}
        for record in log_of(runs / stage):
            assert terms == set(record) - {"epoch", "lr", "loss", "AP", "AP50", "AP75"}
    results = json.loads((runs / "ld" / "results.json").read_text())
    assert results["stage"] == "rotated_ld" and results["metric"].startswith("DOTA AP") and results["images"] == 3
    model = torch.load(runs / "ld" / "final.pt", weights_only=True)["description"]["model"]
    assert model["head"] == "rotated" and model["anchor_ratios"] == [1.0, 0.5, 2.0] and model["reg_max"] == 8
    student = Detector(3, Architecture(18, 64, 1, 8, head="rotated"))
    assert set(weights_of(runs / "ld")) == set(student.state_dict())


def test_resuming_ends_with_the_weights_of_a_run_never_stopped(runs, flags, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at_step(patch, engine, 3)
        assert run_detector(train_rotated_ld, *flags, *taught(runs), "--output", tmp_path) == 128 + signal.SIGTERM
    assert run_detector(train_rotated_ld, *flags, *taught(runs), "--output", tmp_path, "--resume") == 0
    whole, parts = weights_of(runs / "ld"), weights_of(tmp_path)
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_the_tools_know_oriented_boxes_without_being_told(runs, scenes, tmp_path, capsys):
    weights, image = runs / "ld" / "last.pt", scenes / "test" / "images" / "test_0000.jpg"
    assert run_tool(publish, "--weights", weights, "--output", tmp_path) == 0
    (published,) = tmp_path.glob("*.pt")
    sure(published, tmp_path / "sure.pt")
    assert run_tool(test_script, "--weights", tmp_path / "sure.pt", "--test", scenes / "test", "--output",
                    tmp_path / "test", "--device", "cpu", "--workers", "0") == 0
    with zipfile.ZipFile(tmp_path / "test" / "submission.zip") as archive:
        assert archive.namelist() == [f"Task1_{name}.txt" for name in ("plane", "ship", "storage_tank")]
        lines = archive.read("Task1_plane.txt").decode().splitlines()
    assert lines and all(len(line.split()) == 10 for line in lines)
    compare.main([f"test={tmp_path / 'test'}", f"run={runs / 'ld'}"])
    assert run_tool(predict, "--weights", tmp_path / "sure.pt", image, "--output", tmp_path / "found", "--json",
                    tmp_path / "found.json", "--least-score", "0.06", "--device", "cpu") == 0
    (row,) = json.loads((tmp_path / "found.json").read_text())
    first = row["detections"][0]
    assert len(first["box"]) == 5 and 0 < first["box"][4] <= math.pi / 2 + 1e-3
    expected = corners(torch.tensor(first["box"]))
    torch.testing.assert_close(torch.tensor(first["corners"]), expected, atol=0.1, rtol=0.01)
    assert run_tool(bench_detection_inference, "--weights", tmp_path / "sure.pt", image, "--batch-sizes", "1",
                    "--repeats", "1", "--precision", "fp32", "--device", "cpu", "--json", tmp_path / "bench.json") == 0
    capsys.readouterr()
    for flag in (("--suppression", "cluster-diou-voting"), ("--metric", "coco")):
        assert run_tool(test_script, "--weights", published, "--test", scenes / "test", "--output", tmp_path / "no",
                        "--device", "cpu", *flag) == 2
        assert f"{' '.join(flag)}: " in error_line(capsys)


def test_detections_in_windows_are_submitted_as_those_of_whole_images(tmp_path):
    def record(name):
        return Record(tmp_path / f"{name}.png", 100, 100, np.zeros((0, 5)), np.zeros(0), np.zeros(0), name, np.zeros(0))

    def found(*box):
        return {"boxes": torch.tensor([box]), "scores": torch.tensor([0.5]), "labels": torch.tensor([0])}

    names = ("P1__1__0___0", "P1__1__80___0", "P2__1__0___0")
    windows = Annotations(["plane"], [record(name) for name in names], tmp_path)
    inside = [found(90.0, 50, 10, 6, 0.3), found(10.0, 50, 10, 6, 0.3), found(5.0, 5, 4, 4, 1.0)]
    merged = by_image(windows, inside)
    assert {name: own["boxes"].tolist() for name, own in merged.items()} == {
        "P1": [pytest.approx([90, 50, 10, 6, 0.3])], "P2": [pytest.approx([5, 5, 4, 4, 1])]}
    whole = Annotations(["plane"], [record("a"), record("P2__1__0___0")], tmp_path)
    horizontal = {**found(0.0, 0, 4, 2), "boxes": torch.tensor([[0.0, 0, 4, 2]])}
    assert by_image(whole, [horizontal, inside[2]])["a"]["boxes"].tolist() == [pytest.approx([2, 1, 2, 4, math.pi / 2])]


def sure(path, to):
    """A checkpoint whose detector finds a hundred planes in any image."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["model"]["head.classify.bias"][::3] += 3
    torch.save(checkpoint, to)


@pytest.mark.parametrize("change, words", [
    ({"reg_max": 6}, "reg_max: 6 in the teacher, 8 in the student"),
    ({"head": "gfl", "reg_max": 8}, "head: 'gfl' in the teacher"),
    ({"channels": 96}, "channels: 96 in the teacher")])
def test_a_teacher_that_does_not_fit_is_named(runs, flags, tmp_path, capsys, change, words):
    content = torch.load(runs / "teacher" / "final.pt", weights_only=True)
    architecture = dataclasses.replace(load_detector(runs / "teacher" / "final.pt")[0].architecture, **change)
    content["description"]["model"] = engine.describe_model(architecture)
    torch.save({**content, "model": Detector(3, architecture).state_dict()}, tmp_path / "teacher.pt")
    assert run_detector(train_rotated_ld, *flags, *taught(runs), "--teacher", tmp_path / "teacher.pt", "--output",
                        tmp_path / "ld") == 2
    assert words in error_line(capsys) and not (tmp_path / "ld").exists()


@pytest.mark.parametrize("change, words", [
    ({"anchor_ratios": [1.0]}, "its anchor_ratios is [1.0]; expected [1.0, 0.5, 2.0]"),
    ({"anchor_scale": 8}, "its anchor_scale is 8; expected [4.0, "),
    ({"head": "gfl", "reg_max": 0}, "not a detector of this project"),
    ({"head": ["rotated"]}, "not a detector of this project")])
def test_a_checkpoint_must_have_the_anchors_and_bins_of_its_head(runs, tmp_path, change, words):
    content = torch.load(runs / "teacher" / "final.pt", weights_only=True)
    content["description"]["model"].update(change)
    torch.save(content, tmp_path / "changed.pt")
    with pytest.raises(UserError, match=re.escape(words)):
        load_detector(tmp_path / "changed.pt")


def test_older_checkpoints_have_square_anchors(tmp_path):
    network = Detector(3, Architecture(18, 64, 0))
    model = engine.describe_model(network.architecture)
    del model["anchor_ratios"], model["head"]
    description = {"stage": "gfl", "classes": ["a", "b", "c"], "model": model, "epoch": 1,
                   "preprocessing": engine.describe_preprocessing(64, 64)}
    torch.save({"model": network.state_dict(), "description": description}, tmp_path / "old.pt")
    loaded, description = load_detector(tmp_path / "old.pt")
    assert loaded.architecture == network.architecture
    assert (description["model"]["head"], description["model"]["anchor_ratios"]) == ("gfl", [1.0])


def test_settings_and_annotations_of_horizontal_boxes_are_refused(flags, tmp_path, capsys):
    write_demo(tmp_path / "flat", train=2, test=1, size=64)
    assert run_detector(train_rotated, *flags, "--train", tmp_path / "flat" / "train.json", "--output",
                        tmp_path / "run") == 2
    assert "segmentation" in error_line(capsys) and not (tmp_path / "run").exists()
    assert run_detector(train_rotated_ld, *flags, "--reg-max", "0", "--output", tmp_path / "run") == 2
    assert "--reg-max 0" in error_line(capsys)
    for flag in (("--suppression", "cluster"), ("--metric", "voc")):  # hours before the test
        assert run_detector(train_rotated, *flags, *flag, "--output", tmp_path / "run") == 2
        assert f"{' '.join(flag)}: " in error_line(capsys) and not (tmp_path / "run").exists()
    assert run_detector(train_rotated_ld, *flags, "--teacher", tmp_path / "no.pt", "--output", tmp_path / "run") == 2
    assert "train one with python -m detection.train_rotated --output" in error_line(capsys)


def test_a_horizontal_detector_can_be_tested_by_dotas_metric(flags, tmp_path):
    assert run_detector(train_gfl, *flags, "--epochs", "1", "--metric", "dota", "--output", tmp_path) == 0
    assert json.loads((tmp_path / "results.json").read_text())["metric"].startswith("DOTA AP")
    assert (tmp_path / "submission.zip").exists()


def test_recipes_are_the_published_settings():
    settings = parse_settings("rotated_ld", train_rotated_ld.SETTINGS, "", ["--recipe", "gwd-r50", "--epochs", "5"])
    assert (settings.lambda_ld, settings.lambda_kd, settings.imitation, settings.epochs) == (30, 30, "finegrained", 5)
    settings = parse_settings("rotated_ld", train_rotated_ld.SETTINGS, "", ["--recipe", "kld-r34"])
    assert (settings.box_loss, settings.lambda_ld, settings.lambda_kd, settings.lr_steps) == ("kld", 15, 15, (9, 12))
    settings = parse_settings("rotated", train_rotated.SETTINGS, "", ["--recipe", "2x"])
    assert (settings.epochs, settings.lr_steps, settings.clip, settings.batch_size) == (24, (17, 23), 35, 2)
    notes = list(ROTATED_LD.notes(RotatedLDSettings(), 3, 2))
    assert notes == ["--lambda-kd 20, for 15 classes, is 4 for 3"]
