"""The detection scripts on tiny drawn scenes, as a user runs them: teacher, student, resuming, testing, several
processes."""

import json
import os
import re
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from common.runtime import UserError
from demo.draw_scenes import write_demo
from detection import compare, engine, pictures, test, train_gfl, train_ld
from detection.network.detector import Architecture, Detector
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


@pytest.fixture(scope="module")
def runs(flags, tmp_path_factory):
    """A folder with the finished run of a teacher, and of a student that it has taught."""
    folder = tmp_path_factory.mktemp("runs")
    assert run_detector(train_gfl, *flags, "--output", folder / "teacher", "--test-every", "1") == 0
    assert run_detector(train_ld, *flags, *taught(folder), "--output", folder / "ld") == 0
    return folder


def taught(folder):
    return ("--teacher", folder / "teacher" / "final.pt", "--imitation", "gibox", "--lambda-kd-vlr", "1")


# ---- whole runs ------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_files(runs):
    for stage in ("teacher", "ld"):
        assert set(os.listdir(runs / stage)) == {
            "settings.json", "log.jsonl", "last.pt", "final.pt", "results.json", "curves.png", "precision_recall.png",
            "detections.png", "detections.json"}
    results = json.loads((runs / "ld" / "results.json").read_text())
    assert results["stage"] == "ld" and results["epoch"] == 2 and results["images"] == 4
    assert [row["name"] for row in results["per_class"]] == ["plane", "ship", "storage_tank"]
    for key in ("AP", "AP50", "AP75", "weights_sha256", "parameters", "flops", "device", "precision", "versions"):
        assert results[key] is not None, key


def test_an_extended_run_ends_as_one_that_was_as_long_from_the_start(flags, runs, tmp_path):
    assert run_detector(train_gfl, *flags, "--epochs", "1", "--output", tmp_path / "a", "--test-every", "1") == 0
    assert run_detector(train_gfl, *flags, "--epochs", "2", "--output", tmp_path / "a", "--resume", "--test-every",
                        "1") == 0
    assert log_of(tmp_path / "a") == log_of(runs / "teacher")
    extended = weights_of(tmp_path / "a")
    assert all(torch.equal(value, extended[name]) for name, value in weights_of(runs / "teacher").items())
    assert json.loads((tmp_path / "a" / "results.json").read_text())["epoch"] == 2


def test_pictures_that_fail_are_notes_and_leave_the_numbers(runs, scenes, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise ValueError("no such symbol")

    for name in ("draw_precision_recall", "draw_sheet"):
        monkeypatch.setattr(pictures, name, fail)
    assert run_tool(test, "--weights", runs / "teacher" / "final.pt", "--test", scenes / "test.json", "--output",
                    tmp_path, "--device", "cpu", "--workers", "0") == 0
    assert sorted(os.listdir(tmp_path)) == ["detections.json", "results.json"]
    output = capsys.readouterr().out
    for name in ("precision_recall.png", "detections.png"):
        assert f"note: {tmp_path / name} was not drawn (no such symbol)\n" in output
    assert output.endswith(f"written: {tmp_path / 'results.json'}, detections.json\n")


def test_the_log_has_every_loss_term_and_their_sum(runs):
    gfl, distilled = {"qfl", "box", "dfl"}, {"ld_main", "ld_vlr", "kd_main", "kd_vlr", "imitation"}
    for stage, terms in (("teacher", gfl), ("ld", gfl | distilled)):
        assert [record["epoch"] for record in log_of(runs / stage)] == [1, 2]
        for record in log_of(runs / stage):
            assert terms == set(record) - {"epoch", "lr", "loss", "AP", "AP50", "AP75"}
            assert record["loss"] == pytest.approx(sum(record[term] for term in terms))
    assert all(0 <= record["AP50"] <= 1 for record in log_of(runs / "teacher"))


def test_checkpoints_say_what_they_are_and_hold_no_teacher(runs):
    final = torch.load(runs / "ld" / "final.pt", weights_only=True)
    assert final["description"]["classes"] == ["plane", "ship", "storage_tank"]
    assert final["description"]["model"]["reg_max"] == 16 and final["description"]["preprocessing"]["short"] == 64
    assert set(final["model"]) == set(Detector(3, Architecture(18, 64, 1)).state_dict())


def write_grey_scenes(folder, pixels_of):
    """Tiny grey scenes as PNG files. pixels_of: function from 8-bit grey pixels to those to be written."""
    write_demo(folder, seed=0, train=4, test=2, size=64)
    for path in (folder / "images").iterdir():
        with Image.open(path) as image:
            grey = np.array(image.convert("L"))
        grey[0, :2] = 0, 255
        Image.fromarray(pixels_of(grey)).save(path.with_suffix(".png"))
    for name in ("train.json", "test.json"):
        (folder / name).write_text((folder / name).read_text().replace(".jpg", ".png"))


def test_eleven_bits_train_as_eight(tmp_path, capsys):
    """The same scenes in 8 bits, and in 16 bits with values to 255 * 8: bit for bit the same weights."""
    write_grey_scenes(tmp_path / "eight", lambda grey: grey)
    write_grey_scenes(tmp_path / "eleven", lambda grey: grey.astype(np.uint16) * 8)
    runs = {}
    for name in ("eight", "eleven"):
        flags = ("--train", tmp_path / name / "train.json", "--test", tmp_path / name / "test.json")
        flags = (*flags, *QUICK_DETECTOR, "--epochs", "1", "--output", tmp_path / "run" / name)
        assert run_detector(train_gfl, *flags) == 0
        runs[name] = torch.load(tmp_path / "run" / name / "final.pt", weights_only=True)
    eight, eleven = runs.values()
    assert all(torch.equal(value, eleven["model"][name]) for name, value in eight["model"].items())
    preprocessing = eight["description"]["preprocessing"]
    assert eleven["description"]["preprocessing"] == {**preprocessing, "value_range": [0, 2040]} != preprocessing
    assert "the values 0 to 2040 become 0 to 255; where only a few" in capsys.readouterr().out
    assert run_detector(train_gfl, *flags, "--resume", "--value-range", "0,4095") == 2
    assert "holds a run with value-range [0, 2040], not [0, 4095]" in capsys.readouterr().err


def test_a_student_starts_alike_with_a_teacher_and_without(runs, flags, tmp_path):
    standing = ("--epochs", "1", "--lr", "1e-12")
    assert run_detector(train_gfl, *flags, *standing, "--output", tmp_path / "gfl") == 0
    assert run_detector(train_ld, *flags, *standing, *taught(runs), "--output", tmp_path / "ld") == 0
    alone, with_teacher = weights_of(tmp_path / "gfl"), weights_of(tmp_path / "ld")
    assert all(torch.allclose(value, with_teacher[name], atol=1e-6) for name, value in alone.items())


def test_another_teacher_is_another_run(runs, flags, tmp_path, capsys):
    teacher = torch.load(runs / "teacher" / "final.pt", weights_only=True)
    teacher["model"]["head.scales"] += 1
    torch.save(teacher, tmp_path / "other.pt")
    assert run_detector(train_ld, *flags, *taught(runs), "--teacher", tmp_path / "other.pt", "--output",
                        runs / "ld", "--resume") == 2
    assert "holds a run with teacher-sha256" in capsys.readouterr().err


def test_a_run_starts_from_a_detector(runs, scenes, flags, tmp_path, capsys):
    standing = ("--epochs", "1", "--lr", "1e-12", "--init-detector", runs / "teacher" / "final.pt", "--output")
    assert run_detector(train_gfl, *flags, *standing, tmp_path / "same") == 0
    before, after = weights_of(runs / "teacher"), weights_of(tmp_path / "same")
    assert all(torch.allclose(value, after[name], atol=1e-6) for name, value in before.items())
    content = json.loads((scenes / "train.json").read_text())
    content["categories"].append({"id": 99, "name": "zeppelin"})
    (tmp_path / "train.json").write_text(json.dumps(content))
    capsys.readouterr()
    other = ("--train", tmp_path / "train.json", "--images", scenes / "images", "--quality", "--augment", "dihedral")
    assert run_detector(train_gfl, *flags, *other, *standing, tmp_path / "more") == 0
    line, = re.findall(r"initialised: (.*)\n", capsys.readouterr().out)
    after = weights_of(tmp_path / "more")
    quality = [name for name in after if name.startswith("head.quality.")]
    anew = ["head.classify.weight", "head.classify.bias", *quality]
    assert line == (f"{len(after) - 6} of {len(after)} entries from {runs / 'teacher' / 'final.pt'}; anew: "
                    f"{', '.join(anew)}")
    assert set(after) - set(before) == set(quality) and after["head.classify.bias"].shape == (4,)
    assert all(torch.allclose(value, after[name], atol=1e-6) for name, value in before.items() if name not in anew)
    assert run_detector(train_gfl, *flags, "--tower-convs", "2", *standing, tmp_path / "other") == 2
    assert error_line(capsys).endswith("final.pt: has backbone resnet, depth 18, channels 64, tower-convs 1; expected "
                                       "backbone resnet, depth 18, channels 64, tower-convs 2\n")


def test_a_second_run_needs_another_folder_or_resume(runs, flags, capsys):
    assert run_detector(train_gfl, *flags, "--output", runs / "teacher") == 2
    assert "holds a run already; go on with it by --resume" in capsys.readouterr().err
    assert run_detector(train_gfl, *flags, "--output", runs / "teacher", "--resume", "--clip", "1") == 2
    assert "holds a run with clip 0.0, not 1.0" in capsys.readouterr().err
    assert run_detector(train_gfl, *flags, "--output", runs / "teacher", "--resume") == 0
    assert "is finished already" in capsys.readouterr().out


def test_resuming_ends_with_the_weights_of_a_run_never_stopped(runs, flags, tmp_path, monkeypatch, capsys):
    more = (*flags, *taught(runs), "--short", "48,64", "--workers", "1")  # prefetched batches must not be lost
    assert run_detector(train_ld, *more, "--output", tmp_path / "whole") == 0
    stop_at_step(monkeypatch, engine, 4)
    assert run_detector(train_ld, *more, "--output", tmp_path / "parts") == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert "stopped after 1 of 2 epochs and 1 of 3 steps, kept in" in capsys.readouterr().out
    assert run_detector(train_ld, *more, "--output", tmp_path / "parts", "--resume") == 0
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")


def test_the_test_programs_repeat_the_numbers_of_training(runs, scenes, tmp_path):
    trained = json.loads((runs / "teacher" / "results.json").read_text())
    done = run_program("-m", "detection.test", "--weights", runs / "teacher" / "last.pt", "--test",
                       scenes / "test.json", "--output", tmp_path / "test", "--device", "cpu", "--workers", "0")
    assert done.returncode == 0, done.stderr
    assert run_detector(train_gfl, "--test-only", "--weights", runs / "teacher" / "final.pt", "--test",
                    scenes / "test.json", "--output", tmp_path / "only", "--device", "cpu", "--workers", "0") == 0
    for folder in ("test", "only"):
        again = json.loads((tmp_path / folder / "results.json").read_text())
        assert again["per_class"] == trained["per_class"] and again["AP"] == trained["AP"]


@pytest.mark.parametrize("flag", [("--metric", "voc07"), ("--suppression", "cluster-diou-voting")])
def test_other_metrics_and_suppressions(runs, scenes, tmp_path, flag):
    assert run_detector(train_gfl, "--test-only", "--weights", runs / "teacher" / "final.pt", "--test",
                    scenes / "test.json", "--output", tmp_path / "test", "--device", "cpu", *flag) == 0
    results = json.loads((tmp_path / "test" / "results.json").read_text())
    assert ("per_iou" in results) == (flag[1] == "voc07") and results["AP50"] is not None


def test_runs_are_compared_by_mean_and_deviation(runs, tmp_path, capsys):
    results = json.loads((runs / "ld" / "results.json").read_text())
    for name, ap in (("a", 0.30), ("b", 0.32)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({**results, "AP": ap, "AP_large": None}))
    compare.main([f"LD={tmp_path / 'a'},{tmp_path / 'b'}", f"teacher={runs / 'teacher'}"])
    header, ld, teacher = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["runs", "AP", "AP50"] and "large" in header
    assert ld.split()[:5] == ["LD", "2", "31.0", "±", "1.4"] and teacher.split()[:2] == ["teacher", "1"]
    (tmp_path / "b" / "results.json").write_text(json.dumps({**results, "metric": "another"}))
    with pytest.raises(UserError, match="not tested alike: LD by COCO AP with auto on 4 images .*; LD by another with"):
        compare.main([f"LD={tmp_path / 'a'},{tmp_path / 'b'}"])
    for change in ({"test_images": "0123"}, {"settings": {**results["settings"], "suppression": "cluster"}}):
        (tmp_path / "b" / "results.json").write_text(json.dumps({**results, **change}))
        with pytest.raises(UserError, match="not tested alike: LD by COCO AP with auto on 4 images .*(0123|cluster)"):
            compare.main([f"LD={tmp_path / 'a'},{tmp_path / 'b'}"])
    for row, words in ((f"{tmp_path}", "expected NAME=FOLDER"), (f"x={tmp_path}", "results.json: could not be read")):
        with pytest.raises(UserError, match=words):
            compare.main([row])


def test_two_processes_take_the_step_of_one(flags, runs, tmp_path):
    """With frozen batch norms the steps of two processes are those of the global batch, up to rounding: all normalisers
    are those of all images."""
    backbone = Detector(3, Architecture(18, 64, 1)).backbone
    torch.save(backbone.state_dict(), tmp_path / "resnet18.pt")
    more = [str(flag) for flag in (*flags, "--init", tmp_path / "resnet18.pt", "--epochs", "1")]
    assert run_detector(train_gfl, *more, "--output", tmp_path / "one") == 0
    done = run_two_processes("-m", "detection.train_gfl", *more, "--output", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert max((value.float() - two[name]).abs().max().item() for name, value in one.items()) < 1e-4
    first, second = log_of(tmp_path / "one")[0], log_of(tmp_path / "two")[0]
    assert first["qfl"] == pytest.approx(second["qfl"], rel=1e-3)
    trained, again = (json.loads((tmp_path / run / "results.json").read_text()) for run in ("one", "two"))
    assert trained["images"] == again["images"] == 4


def test_the_frozen_part_of_the_resnet_stays(flags, tmp_path):
    backbone = Detector(3, Architecture(18, 64, 1)).backbone
    torch.save(backbone.state_dict(), tmp_path / "resnet18.pt")
    assert run_detector(train_gfl, *flags, "--init", tmp_path / "resnet18.pt", "--epochs", "1", "--output",
                    tmp_path / "run") == 0
    after = weights_of(tmp_path / "run")
    for name, value in backbone.state_dict().items():
        fixed = name.startswith(("conv1", "bn1", "layer1")) or "running" in name or "num_batches" in name
        assert torch.equal(after[f"backbone.{name}"], value) == fixed, name


# ---- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "words"), [
    ({"classes": ["plane", "ship"]}, "the number of classes"),
    ({"classes": ["ship", "plane", "storage_tank"]}, "the name of class 0"),
    ({"reg_max": 8}, "reg_max"),
])
def test_a_teacher_that_does_not_fit_is_named(flags, runs, tmp_path, capsys, change, words):
    checkpoint = torch.load(runs / "teacher" / "final.pt", weights_only=True)
    description = checkpoint["description"]
    description["classes"] = change.get("classes", description["classes"])
    description["model"]["reg_max"] = change.get("reg_max", 16)
    fitting = Detector(len(description["classes"]), Architecture(18, 64, 1, description["model"]["reg_max"]))
    torch.save({"model": fitting.state_dict(), "description": description}, tmp_path / "teacher.pt")
    assert run_detector(train_ld, *flags, "--teacher", tmp_path / "teacher.pt", "--output", tmp_path / "ld") == 2
    message = capsys.readouterr().err
    assert words in message and "teacher.pt" in message and message.count("\n") == 1
    assert not (tmp_path / "ld").exists()


def test_another_test_does_not_replace_the_results(runs, scenes, tmp_path, capsys):
    again = ("--test-only", "--weights", runs / "teacher" / "final.pt", "--test", scenes / "test.json", "--output",
             tmp_path / "test", "--device", "cpu", "--workers", "0")
    assert run_detector(train_gfl, *again) == 0
    assert run_detector(train_gfl, *again) == 0
    assert run_detector(train_gfl, *again, "--metric", "voc") == 2
    assert "is of other weights than" in capsys.readouterr().err


def test_what_a_user_may_not_expect_is_said(runs, flags, tmp_path, capsys):
    assert run_detector(train_ld, *flags, *taught(runs), "--epochs", "1", "--warmup-steps", "50", "--lambda-kd-main",
                        "10", "--output", tmp_path / "ld") == 0
    said = capsys.readouterr().out
    for note in ("--warmup-steps 50 are most of the 3 steps", "--lr-steps 9,12 never come",
                 "LD's terms are sums over the 4 images", "the classification's distillation is a mean over"):
        assert f"note: {note}" in said
