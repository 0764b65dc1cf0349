"""Errors, files, devices and settings."""

import dataclasses
import importlib
import os

import pytest
import torch

import baseline_cl_s_weight
import baseline_cl_t1
import baseline_cl_t2
import baseline_cl_t3
import baseline_resnet50
from common.files import atomic_path, read_json, save_checkpoint, write_json
from common.run_folder import RunFolder, check_output
from common.runtime import UserError, resolve_device, run_script
from recognition import engine
from recognition.settings import (
    Settings,
    check_ranges,
    identity_of_run,
    parse_settings,
    recipe_of_run,
    unused_settings,
)
from tests.support import run_program


def test_a_user_error_is_one_line_and_status_2(capsys):
    def main():
        raise UserError("wrong:\n  two lines")

    with pytest.raises(SystemExit) as exit_:
        run_script(main)
    assert exit_.value.code == 2 and capsys.readouterr().err == "error: wrong: two lines\n"


@pytest.mark.parametrize("command", ["baseline_cl_t2.py", "run_all.py", "predict.py", "export.py",
                                     "-m detection.train_gfl"])
def test_an_interrupt_while_torch_is_imported_is_one_line(tmp_path, command):
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    done = run_program(*command.split(), env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode in (130, -2) and (done.stdout, done.stderr) == ("", "interrupted\n")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_full_disk_is_one_error_and_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1})

    def full(*arguments):
        raise RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"last\.pt: could not be written"):
        save_checkpoint(path, {"epoch": 2})
    assert torch.load(path, weights_only=True) == {"epoch": 1} and os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", "cuda:99", ""])
def test_an_unknown_device_is_an_error(name):
    with pytest.raises(UserError, match="--device"):
        resolve_device(name)


def test_learning_rate_steps_of_the_paper():
    """The released code cuts the rate after its epochs 32, 62 and 92, counted from 0: from the 33rd, 63rd and 93rd on;
    the student's after 52."""
    for script in (baseline_resnet50, baseline_cl_t1, baseline_cl_t2, baseline_cl_t3):
        epochs = (1, 32, 33, 62, 63, 92, 93, 100)
        rates = {epoch: engine.learning_rate(script.SETTINGS, epoch, 0, 10) for epoch in epochs}
        assert rates == pytest.approx({1: 1e-3, 32: 1e-3, 33: 1e-4, 62: 1e-4, 63: 1e-5, 92: 1e-5, 93: 1e-6, 100: 1e-6})
    rates = [engine.learning_rate(baseline_cl_s_weight.SETTINGS, epoch, 0, 10) for epoch in (1, 52, 53, 100)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])


def test_one_cycle_is_that_of_torch():
    settings = Settings(lr=0.02, schedule="one-cycle", epochs=5)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.02)
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=35, cycle_momentum=False)
    for step in range(35):
        # torch places the peak at 0.3 * total - 1 steps, here it is at 0.3 * (total - 1): at most a step apart.
        found = engine.learning_rate(settings, step // 7 + 1, step % 7, 7)
        assert found == pytest.approx(reference.get_last_lr()[0], abs=0.02 * 0.11)
        optimizer.step()
        reference.step()
    assert engine.learning_rate(settings, 1, 0, 7) == pytest.approx(0.02 / 25)
    assert engine.learning_rate(settings, 5, 6, 7) == pytest.approx(0.02 / 25e4)


def test_flags_change_the_block_and_fill_the_folder():
    flags = ["--data-root", "x/mine", "--lr-steps", "3,5"]
    settings, given = parse_settings(baseline_cl_t2.STAGE, Settings(epochs=7), "", flags)
    assert settings.output == "runs/mine/t2" and settings.epochs == 7 and settings.lr_steps == (3, 5)
    assert given == {"data_root": "x/mine", "lr_steps": (3, 5)}


@pytest.mark.parametrize("script, init, dota_init", [
    ("baseline_resnet50", "imagenet", "none"), ("baseline_cl_t1", "none", "baseline"),
    ("baseline_cl_t2", "none", "baseline"), ("baseline_cl_t3", "none", "baseline"),
    ("baseline_cl_s_weight", "none", "imagenet")])
def test_the_authors_protocol_in_one_word(script, init, dota_init):
    student = script == "baseline_cl_s_weight"
    expected = {"epochs": 100, "batch_size": 8, "lr": 1e-3, "schedule": "steps", "momentum": 0.9, "weight_decay": 1e-4,
                "lr_steps": (53,) if student else (33, 63, 93), "image_size": 224, "teacher_batch_norm": "train",
                "sampler": "self-calibrated" if student else "shuffled", "select": "test", "augment": "flip"}
    for prefix, start in (("", init), ("dota_", dota_init)):
        module = importlib.import_module(prefix + script)
        edited = dataclasses.replace(module.SETTINGS, epochs=3, lr=0.5, lr_steps=(), select="last", init="x.pt")
        settings, _ = parse_settings(module.STAGE, edited, "", ["--recipe", "released"])
        assert {name: getattr(settings, name) for name in expected} == expected and settings.init == start
        assert recipe_of_run(module.STAGE, settings) == "released" and not recipe_of_run(module.STAGE, edited)
        settings, _ = parse_settings(module.STAGE, edited, "", ["--recipe", "released", "--epochs", "5"])
        assert settings.epochs == 5 and recipe_of_run(module.STAGE, settings) == "released but for epochs"


@pytest.mark.parametrize("flag, value, expected", [
    ("--lr-steps", "3,x", "epochs joined by commas, such as 33,63,93"), ("--epochs", "ten", "a whole number"),
    ("--lr", "fast", "a number"), ("--feature-cache", "1GB", "a number")])
def test_a_value_of_another_form_is_told_which_was_expected(capsys, flag, value, expected):
    with pytest.raises(SystemExit):
        parse_settings(baseline_cl_t2.STAGE, Settings(), "", [flag, value])
    assert capsys.readouterr().err.endswith(f": error: argument {flag}: {value!r}: expected {expected}\n")


def test_a_test_of_weights_has_a_folder_of_its_own():
    flags = ["--test-only", "--weights", "runs/mine/student/best.pt", "--data-root", "x/mine"]
    student = baseline_cl_s_weight.STAGE
    assert parse_settings(student, Settings(), "", flags)[0].output == "runs/mine/test_student_best"
    assert parse_settings(student, Settings(), "", [*flags, "--output", "here"])[0].output == "here"
    assert parse_settings(student, Settings(), "", flags[:1])[0].output == "runs/FGSC-23/student"


def test_a_folder_is_resumed_whatever_it_recorded_of_settings_that_its_stage_does_not_use(tmp_path):
    settings = Settings(output=str(tmp_path), resume=True)
    identity = identity_of_run("t1", settings, "fp32", "data", {})
    (tmp_path / "last.pt").touch()
    younger = {name: value for name, value in identity.items() if name != "logit_adjustment"}
    write_json(tmp_path / "settings.json", {**younger, "feature_cache": 5.0, "t3": "elsewhere/best.pt"})
    check_output(settings, identity, "lists", unused_settings(baseline_cl_t1.STAGE))
    with pytest.raises(UserError, match="holds a run with feature-cache 5.0, not 0.0"):
        check_output(settings, identity, "lists", unused_settings(baseline_cl_t2.STAGE))


def test_a_folder_in_which_nothing_was_trained_is_free(tmp_path):
    write_json(tmp_path / "settings.json", {"stage": "t1", "epochs": 7})
    settings = Settings(output=str(tmp_path))
    check_output(settings, identity_of_run("t1", settings, "fp32", "data", {}), "lists")
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(UserError, match="holds a run already"):
        check_output(settings, identity_of_run("t1", settings, "fp32", "data", {}), "lists")


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    settings, machine = Settings(output=str(tmp_path)), dict.fromkeys(("dataset", "device", "processes", "versions"))
    with RunFolder(settings) as ours, RunFolder(settings) as theirs:  # both find an empty folder
        ours.record({"stage": "t1"}, machine)
        program = f"""
from pathlib import Path
from common.files import locked
from common.runtime import run_script
run_script(lambda: locked(Path({str(tmp_path)!r}) / "settings.json").__enter__())"""
        done = run_program("-c", program)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and "another run is at work" in done.stderr
        with pytest.raises(UserError, match="another run is at work here"):
            theirs.record({"stage": "t2"}, machine)
        with pytest.raises(UserError, match="another run is at work here"), RunFolder(settings):
            pass
        assert read_json(tmp_path / "settings.json")["stage"] == "t1"
    with RunFolder(settings) as free:  # nothing was trained there
        free.record({"stage": "t2"}, machine)
        assert read_json(tmp_path / "settings.json")["stage"] == "t2"
        with pytest.raises(UserError, match="another run is at work here"), RunFolder(settings):
            pass


def test_a_run_does_not_go_on_with_other_teachers_in_the_same_files(tmp_path):
    settings = Settings(output=str(tmp_path), resume=True)
    (tmp_path / "last.pt").touch()
    identity = identity_of_run("t2", settings, "fp32", "data", {"t1": "0123"})
    write_json(tmp_path / "settings.json", identity)
    check_output(settings, identity, "lists")
    with pytest.raises(UserError, match="holds a run with t1-sha256 0123, not 4567"):
        check_output(settings, {**identity, "t1_sha256": "4567"}, "lists")
    write_json(tmp_path / "settings.json", {name: value for name, value in identity.items() if name != "t1_sha256"})
    check_output(settings, identity, "lists")  # of a version that did not record it


@pytest.mark.parametrize("flags", [["--weights", "x.pt"], ["--expect-accuracy", "88.73"]])
def test_the_flags_of_a_test_are_refused_in_training(flags):
    with pytest.raises(UserError, match=f"{flags[0]} {flags[1]}: is for a test alone"):
        parse_settings(baseline_cl_s_weight.STAGE, Settings(), "", flags)


@pytest.mark.parametrize("change", [{"epochs": 0}, {"batch_size": 0}, {"image_size": 16}, {"lr": -1.0},
                                    {"lr": float("nan")}, {"calibration_momentum": 1.0}])
def test_settings_out_of_range_are_named(change):
    with pytest.raises(UserError, match="--" + next(iter(change)).replace("_", "-")):
        check_ranges(Settings(**change))
