"""job_queue.py, with small programs in place of stages: order, overlap, failures, signals, what each job is given."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from common.runtime import Stopped, UserError
from recognition import job_queue
from recognition.job_queue import Job, run_jobs, slots

# Each notes when it began and ended in `times`, beside the results that a stage leaves.
STAGE = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def here(name): return folder.with_name(folder.name + "_" + name)
def wait_for(path):
    while not path.exists(): time.sleep(0.01)
started = time.time()
{body}
folder.mkdir()
(folder / "results.json").write_text(json.dumps({{"overall": 0.5}}))
(folder / "times").write_text(json.dumps([started, time.time()]))
"""


@pytest.fixture
def make(tmp_path):
    """make(name, needs, body): a Job whose program does `body`."""

    def job(name, needs=(), body="time.sleep(0.1)"):
        script = tmp_path / f"{name}.py"
        script.write_text(STAGE.format(body=body))
        folder = tmp_path / "seed0" / name
        folder.parent.mkdir(exist_ok=True)
        return Job(folder, SimpleNamespace(__file__=str(script)), [str(folder)],
                   tuple(folder.with_name(need) for need in needs))

    return job


def two():
    return [dict(os.environ), dict(os.environ)]


def times(job):
    return json.loads((job.folder / "times").read_text())


def test_what_waits_for_nothing_runs_at_once_and_the_rest_in_order(make, capfd):
    # Each of the first two ends only when the other has started.
    meet = 'here("up").touch(); wait_for(folder.with_name("{}_up"))'
    jobs = [make("a", (), meet.format("b")), make("b", (), meet.format("a")), make("c", ("a", "b")), make("d", ("c",)),
            make("finished", (), "raise SystemExit(1)"), make("e", ("finished",))]
    run_jobs(jobs, two(), {jobs[4].folder})
    a, b, c, d = (times(job) for job in jobs[:4])
    assert max(a[0], b[0]) < min(a[1], b[1]) and c[0] >= max(a[1], b[1]) and d[0] >= c[1]
    assert jobs[5].folder.exists() and not jobs[4].folder.exists()
    output = capfd.readouterr().out
    assert f"seed0/a: started, output in {jobs[0].log}\n" in output
    assert re.search(r"seed0/d: finished after \d\.\d minutes, accuracy 50\.0; ", output) and "; 0 left\n" in output
    assert output.count("\n") == 2 * 5


def test_one_at_a_time_shows_its_output_and_writes_no_log(make, capfd):
    jobs = [make("a", (), 'print("of a")'), make("b", (), 'print("of b")')]
    run_jobs(jobs, [dict(os.environ)], set())
    assert capfd.readouterr().out == "\n== seed0/a\nof a\n\n== seed0/b\nof b\n"
    assert times(jobs[0])[1] <= times(jobs[1])[0] and not jobs[0].log.exists()


def test_a_failure_stops_what_needs_it_and_nothing_else(make, capfd):
    fails = make("t1", (), 'print("of no interest"); sys.exit("error: t1 has no images")')
    jobs = [fails, make("t2", ("t1",)), make("student", ("t2",)), make("rival"), make("crt", ("rival",)),
            make("broken", (), "raise KeyError(5)")]
    fails.log.write_text("error: of an earlier run\n")
    with pytest.raises(UserError) as error:
        run_jobs(jobs, two(), set())
    assert str(error.value) == (
        f"seed0/t1 ended with status 1 ({fails.log}: t1 has no images); seed0/broken ended with status 1 "
        f"({jobs[5].log}: KeyError: 5); not started because of it: seed0/t2, seed0/student; once that is "
        "fixed, go on with --resume")
    assert jobs[4].folder.exists() and not jobs[2].folder.exists()
    assert fails.log.read_text().startswith("error: of an earlier run\nof no interest\n")
    assert re.search(r"seed0/t1: FAILED after \d\.\d minutes; ", capfd.readouterr().out)


def test_without_a_log_the_failure_is_named_all_the_same(make):
    with pytest.raises(UserError, match="^seed0/t1 ended with status 3; not started because of it: seed0/t2; once"):
        run_jobs([make("t1", (), "sys.exit(3)"), make("t2", ("t1",))], [dict(os.environ)], set())


# ---- signals ---------------------------------------------------------------------------------------------------------

# A stage that counts the signals it gets and needs a moment for its checkpoint.
KEEPS = """
got = []
def note(number, frame):
    got.append(signal.Signals(number).name)
signal.signal(signal.SIGTERM, note)
signal.signal(signal.SIGINT, note)
here("up").touch()
{then}
while not got: time.sleep(0.01)
time.sleep(0.6)
here("kept").write_text(" ".join(got))
sys.exit(130)
"""
BOTH_UP = 'wait_for(folder.with_name("a_up")); wait_for(folder.with_name("b_up"))\n'


@pytest.mark.parametrize("number, reaches_stages, patience, got", [
    (signal.SIGTERM, False, 5, "SIGTERM"),
    (signal.SIGINT, True, 5, "SIGINT"),  # Ctrl-C in a terminal: the kernel tells all
    (signal.SIGINT, False, 0.1, "SIGTERM"),  # kill -INT of this process alone
])
def test_all_that_run_are_told_once_and_waited_for(make, monkeypatch, number, reaches_stages, patience, got):
    monkeypatch.setattr(job_queue, "PATIENCE", patience)
    each = BOTH_UP + (f"os.kill(os.getpid(), {int(number)})" if reaches_stages else "")
    jobs = [make("a", (), KEEPS.format(then=BOTH_UP + f"os.kill(os.getppid(), {int(number)})\n" + each)),
            make("b", (), KEEPS.format(then=each)), make("c")]
    with pytest.raises(Stopped, match="0 of 3 stages are finished; the same command with --resume goes on") as stopped:
        run_jobs(jobs, two(), set())
    assert stopped.value.status == 128 + number
    for job in jobs[:2]:
        assert job.folder.with_name(f"{job.folder.name}_kept").read_text() == got
    assert not jobs[2].log.exists()


def test_a_second_ctrl_c_ends_everything_at_once(make):
    body = "os.kill(os.getppid(), signal.SIGINT); time.sleep(0.5); os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"
    started, job = time.monotonic(), make("a", (), body)
    with pytest.raises(KeyboardInterrupt):
        run_jobs([job], two(), set())
    assert time.monotonic() - started < 20 and not job.folder.exists()


# ---- threads and GPUs ------------------------------------------------------------------------------------------------


def test_threads_are_shared_out_and_torch_heeds_them(monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "OMP_NUM_THREADS" not in slots(1, "auto")[0]
    assert [environment["OMP_NUM_THREADS"] for environment in slots(2, "auto")] == ["3", "3"]
    assert slots(9, "cpu")[0]["OMP_NUM_THREADS"] == "1" and len(slots(9, "cpu")) == 9
    monkeypatch.setenv("MKL_NUM_THREADS", "5")  # torch would take this one
    done = subprocess.run([sys.executable, "-c", "import torch; print(torch.get_num_threads())"], text=True,
                          capture_output=True, env=slots(3, "cpu")[0])
    assert done.stdout == "2\n"
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert slots(1, "cpu")[0]["OMP_NUM_THREADS"] == slots(3, "cpu")[0]["OMP_NUM_THREADS"] == "4"


def test_each_has_a_gpu_of_its_own_where_there_are_several(monkeypatch):
    def given(count, device="auto"):
        return [environment.get("CUDA_VISIBLE_DEVICES") for environment in slots(count, device)]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert given(2) == ["0", "1"] and given(5, "cuda") == ["0", "1", "2"]
    assert given(2, "cpu") == given(2, "cuda:1") == [None, None] and given(1) == [None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5,7")
    assert given(4) == ["2", "5", "7"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert given(2) == ["5", "5"]
