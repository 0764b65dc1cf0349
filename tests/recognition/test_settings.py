"""The settings of a stage: the block at the top of its script, flags, the authors' recipe, and what is refused."""

import dataclasses
import importlib

import pytest

import baseline_cl_s_weight
import baseline_cl_t1
import baseline_cl_t2
import baseline_cl_t3
import baseline_resnet50
import dota_baseline_cl_s_weight
import dota_baseline_cl_t1
import dota_baseline_cl_t2
import dota_baseline_cl_t3
import dota_baseline_resnet50
from common.runtime import UserError
from recognition.settings import Settings, check_ranges, parse_settings, recipe_of_run
from tests.support import run_main


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


def test_the_dota_twins_differ_in_the_data_set_and_the_authors_start():
    for stage, twin in ((baseline_resnet50, dota_baseline_resnet50), (baseline_cl_t1, dota_baseline_cl_t1),
                        (baseline_cl_t2, dota_baseline_cl_t2), (baseline_cl_t3, dota_baseline_cl_t3),
                        (baseline_cl_s_weight, dota_baseline_cl_s_weight)):
        released = {**stage.STAGE.released, "init": twin.STAGE.released["init"]}
        assert dataclasses.replace(stage.STAGE, script_prefix="dota_", released=released) == twin.STAGE
        changed = {name for name, value in vars(twin.SETTINGS).items() if value != vars(stage.SETTINGS)[name]}
        assert changed == {"data_root"}


def test_help_needs_no_data_and_lists_the_settings_that_the_stage_uses(capsys):
    assert run_main(baseline_cl_t2, "--help") == 0
    printed = capsys.readouterr().out
    unused = {"t2", "t3", "calibration_momentum"}
    for field in dataclasses.fields(Settings):
        assert ("  --" + field.name.replace("_", "-") in printed) == (field.name not in unused), field.name
    for default in ("data/FGSC-23", "100", "0.001", "33,63,93", "baseline", "on"):
        assert f"(default: {default})" in " ".join(printed.split())


@pytest.mark.parametrize("script, flag", [
    (baseline_cl_t1, "--t3 nonexistent.pt"), (baseline_cl_t1, "--t1 x.pt"), (baseline_cl_t2, "--t2 x.pt"),
    (baseline_cl_t3, "--t3 x.pt"), (baseline_resnet50, "--no-distillation"), (baseline_cl_t1, "--feature-cache 1"),
    (baseline_resnet50, "--teacher-batch-norm eval"), (baseline_cl_t3, "--calibration-momentum 0.5")])
def test_a_setting_that_a_stage_cannot_use_is_refused(script, flag, tmp_path, capsys):
    assert run_main(script, *flag.split(), "--output", tmp_path / "run") == 2
    assert f"unrecognized arguments: {flag}" in capsys.readouterr().err and not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("flags", [["--weights", "x.pt"], ["--expect-accuracy", "88.73"]])
def test_the_flags_of_a_test_are_refused_in_training(flags):
    with pytest.raises(UserError, match=f"{flags[0]} {flags[1]}: is for a test alone"):
        parse_settings(baseline_cl_s_weight.STAGE, Settings(), "", flags)


@pytest.mark.parametrize("change", [{"epochs": 0}, {"batch_size": 0}, {"image_size": 16}, {"lr": -1.0},
                                    {"lr": float("nan")}, {"calibration_momentum": 1.0}])
def test_settings_out_of_range_are_named(change):
    with pytest.raises(UserError, match="--" + next(iter(change)).replace("_", "-")):
        check_ranges(Settings(**change))
