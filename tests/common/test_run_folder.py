"""The output folder of a run: one run in it, at one time, and what it may be resumed with."""

import pytest

import baseline_cl_t1
import baseline_cl_t2
from common.files import read_json, write_json
from common.run_folder import RunFolder, check_output
from common.runtime import UserError
from recognition.settings import Settings, identity_of_run, unused_settings
from tests.support import run_program


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
