"""What happens in real labs: a job is killed, pre-empted, or interrupted, and goes on as if nothing had been."""

import os
import shutil
import signal
import time

import pytest
import torch

import baseline_resnet50
from benchmarks.bench_training import save_teachers
from benchmarks.kill_and_resume import kill_and_resume, same
from common import files
from common.runtime import StopSignals
from dataset import read_info
from recognition import engine
from resnet50 import read_weights
from tests.support import QUICK, log_of, run_main, stop_at_step, student_run

pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The folder of a baseline of two epochs that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "b"
    assert run_main(baseline_resnet50, "--data-root", tiny, "--init", "none", *QUICK, "--output", folder) == 0
    return folder


def test_a_student_killed_at_random_moments_ends_as_one_never_killed(tiny, teachers, tmp_path):
    kills = 3
    compared, identical = kill_and_resume(tmp_path, tiny, teachers, kills)
    assert compared >= 1 and identical == compared
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])  # SIGTERM: below
def test_a_signal_leaves_a_checkpoint_from_which_the_very_step_goes_on(tiny, whole, tmp_path, monkeypatch, capsys,
                                                                              number):
    flags = ("--data-root", tiny, "--init", "none", *QUICK)
    stop_at_step(monkeypatch, engine, 3, number)
    assert run_main(baseline_resnet50, *flags, "--output", tmp_path / "b") == 128 + number
    monkeypatch.undo()
    said = capsys.readouterr().out
    assert "stopped after 0 of 2 epochs and 3 of 7 steps" in said and "the same command with --resume goes on" in said
    state = torch.load(tmp_path / "b" / "last.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (0, 3) and not (tmp_path / "b" / "best.pt").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    steps, step_losses = [], engine.step_losses
    monkeypatch.setattr(engine, "step_losses", lambda *given: steps.append(1) or step_losses(*given))
    assert run_main(baseline_resnet50, *flags, "--output", tmp_path / "b", "--resume") == 0
    assert len(steps) == 14 - 3
    assert same(tmp_path / "b", whole)


def test_a_signal_in_the_last_step_leaves_the_test_to_the_resumed_run(tiny, tmp_path, monkeypatch, capsys):
    flags = ("--data-root", tiny, "--init", "none", *QUICK, "--output", tmp_path / "b")
    stop_at_step(monkeypatch, engine, 14)
    assert run_main(baseline_resnet50, *flags) == 128 + signal.SIGTERM
    assert "stopped after 2 of 2 epochs" in capsys.readouterr().out
    assert len(log_of(tmp_path / "b")) == 2 and not (tmp_path / "b" / "results.json").exists()
    assert run_main(baseline_resnet50, *flags, "--resume") == 0
    assert (tmp_path / "b" / "results.json").exists()


def test_a_second_interrupt_is_obeyed_at_once():
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


def test_checkpoints_are_written_every_so_many_steps(tiny, tmp_path, monkeypatch):
    written, save_checkpoint = [], files.save_checkpoint

    def note(path, checkpoint):
        if path.name == "last.pt":
            written.append((checkpoint["epoch"], checkpoint["step"]))
        save_checkpoint(path, checkpoint)

    monkeypatch.setattr("common.training.save_checkpoint", note)
    assert run_main(baseline_resnet50, "--data-root", tiny, "--init", "none", *QUICK, "--save-steps", "3", "--output",
                    tmp_path / "b") == 0
    assert written == [(0, 3), (0, 6), (1, 0), (1, 3), (1, 6), (2, 0)]


# ---- numerics --------------------------------------------------------------------------------------------------------


def test_bf16_and_fp32_agree_on_the_losses_of_a_step(tiny, tmp_path):
    """Within 2 per cent for the terms of a student's step on the same batch; bf16 itself keeps 8 bits, 0.4 per cent. At
    128 pixels: at 32 the last batch norm averages over 8 numbers, and magnifies what is rounded."""
    torch.manual_seed(0)
    save_teachers(tmp_path, read_info(tiny), 128)
    losses = {}
    for precision in ("fp32", "bf16"):
        run = student_run(tiny, tmp_path, precision, "--image-size", "128")
        names, terms = engine.train_step(run, run.network.train(), next(iter(run.sampler)))
        losses[precision] = dict(zip(names, terms.tolist(), strict=True))
    for name, exact in losses["fp32"].items():
        assert losses["bf16"][name] == pytest.approx(exact, rel=0.02), name
    assert losses["fp32"] != losses["bf16"]


# ---- damaged things to resume from -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tiny, tmp_path_factory):
    """(flags, folder) of a baseline of two epochs that stopped after one."""
    folder = tmp_path_factory.mktemp("stopped") / "b"
    flags = ["--data-root", tiny, "--output", folder, "--init", "none", *QUICK]
    with pytest.MonkeyPatch.context() as patch:
        stop_at_step(patch, engine, 8)
        assert run_main(baseline_resnet50, *flags) == 128 + signal.SIGTERM
    return [*flags, "--resume"], folder


@pytest.mark.parametrize("part, value", [
    ("epoch", "x"), ("epoch", 3), ("step", -1), ("seconds", None), ("best_accuracy", []), ("loss_sums", 5),
    ("optimizer", {"state": 1, "param_groups": []}), ("model", {}), ("sampler", {"step": 1}), ("flips", torch.zeros(3)),
    ("torch_random", torch.zeros(8, dtype=torch.uint8))])
def test_a_checkpoint_of_something_else_is_not_gone_on_from(stopped, tmp_path, capsys, part, value):
    flags, folder = stopped
    shutil.copytree(folder, tmp_path / "b")
    state = torch.load(folder / "last.pt", weights_only=True)
    torch.save({**state, part: value}, tmp_path / "b" / "last.pt")
    assert run_main(baseline_resnet50, *flags, "--output", tmp_path / "b") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "last.pt: not a checkpoint that this run can go on from (" in error


def test_resuming_a_run_that_is_at_work_touches_nothing(stopped, tmp_path, capsys):
    flags, folder = stopped
    shutil.copytree(folder, tmp_path / "b")
    with open(tmp_path / "b" / "log.jsonl", "a") as log:
        log.write('{"epoch": 2}\n')  # the other has come further than the checkpoint, and --resume would trim this
    before = {path: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    with files.locked(tmp_path / "b" / "settings.json"):
        assert run_main(baseline_resnet50, *flags, "--output", tmp_path / "b") == 2
    assert "another run is at work here" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "b").iterdir()} == before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_work_under_nohup_outlives_the_connection():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("line", ["{", "5", "\udcff"])
def test_a_damaged_log_is_one_line_and_can_be_removed(stopped, tmp_path, capsys, line):
    flags, folder = stopped
    shutil.copytree(folder, tmp_path / "b")
    (tmp_path / "b" / "log.jsonl").write_bytes(line.encode(errors="surrogateescape") + b"\n")
    assert run_main(baseline_resnet50, *flags, "--output", tmp_path / "b") == 2
    assert "log.jsonl:1: not a JSON object; remove the file to go on" in capsys.readouterr().err
    if line == "{":
        (tmp_path / "b" / "log.jsonl").unlink()
        assert run_main(baseline_resnet50, *flags, "--output", tmp_path / "b") == 0
        assert [record["epoch"] for record in log_of(tmp_path / "b")] == [2]


def test_a_checkpoint_within_an_epoch_describes_itself(stopped, tiny):
    _, folder = stopped
    state, description = read_weights(folder / "last.pt")
    assert description["epoch"] == 1 and description["stage"] == "baseline" and "fc.weight" in state
