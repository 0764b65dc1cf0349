"""Two processes (gloo, on the CPU) against what one process computes, and what becomes of them when one dies."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from dataset import network_input, read_info, read_split
from recognition.distillation import sums_by_class
from recognition.engine import learning_rate, step_losses
from recognition.evaluation import evaluate
from recognition.stage import Lists, load_test_images
from resnet50 import load_network
from tests.support import PROJECT, QUICK, TWO_PROCESSES, draw_tiny, student_flags, student_run

WORKER = '''
"""A student's script that also notes, on each process, what the test wants to know."""
import os, signal, sys, torch
sys.path.insert(0, os.getcwd())
import baseline_cl_s_weight as script
from common import runtime
from recognition import engine
notes, written, folder, rank = [], [], sys.argv.pop(1), int(os.environ["RANK"])
train_step = engine.train_step

def noting(run, trained, indices):
    done = train_step(run, trained, indices)
    notes.append({"indices": indices, "weights": run.sampler.class_weights(), "terms": done[1],
                  "network": [parameter.detach().clone() for parameter in run.network.parameters()]})
    if len(notes) == 3:
        torch.save(notes, f"{folder}/notes{rank}.pt")
    if os.environ.get("DIES") == f"{rank} {len(notes)}":
        os.kill(os.getpid(), signal.SIGKILL)
    return done

def hook(event, arguments):
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+") and (
            "notes" not in str(arguments[0]) and str(arguments[0]) != os.devnull):
        written.append(str(arguments[0]))
    elif event in ("os.rename", "os.mkdir"):
        written.append(str(arguments))

sys.addaudithook(hook)
engine.train_step = noting
try:
    engine.run_stage(script.STAGE, script.SETTINGS, "")
finally:
    open(f"{folder}/notes_written{rank}", "w").write("\\n".join(written))
'''


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A drawn data set of 23 test images."""
    folder = draw_tiny(tmp_path_factory.mktemp("data") / "tiny")
    lines = (folder / "test.txt").read_text().splitlines(keepends=True)
    (folder / "test.txt").write_text("".join(lines[:-1]))
    return folder


def start_two(data, teachers, folder, *flags, **environment):
    """torchrun with two processes of the worker, for FOLDER/student. Returns the Popen."""
    (folder / "worker.py").write_text(WORKER)
    command = [sys.executable, *TWO_PROCESSES, folder / "worker.py", folder, "--data-root", data, "--output",
               folder / "student", *student_flags(teachers), *QUICK, *flags]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([str(word) for word in command], cwd=PROJECT, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def two(data, teachers, tmp_path_factory):
    """(folder of the run, the notes of both processes) of a whole run of two processes."""
    folder = tmp_path_factory.mktemp("two")
    process = start_two(data, teachers, folder)
    said, complaints = process.communicate(timeout=300)
    assert process.returncode == 0, said + complaints
    return folder, [torch.load(folder / f"notes{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture
def one_thread():
    """As each of the two has: sums are rounded in the same order, or chaos makes other networks of the difference."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_processes_compute_what_one_computes_on_the_same_global_batch(data, teachers, two, one_thread):
    """Three steps by one process: each half of the batch through the network by itself, as batch norm averages over
    what a process holds; the losses of both halves by class; the mean of both gradients."""
    run, notes = student_run(data, teachers, "fp32"), two[1]
    network = run.network.train()
    for step in range(3):
        batch = run.sampler.draw()
        flip = torch.rand(8, generator=run.flips) < 0.5
        by_class, total = torch.zeros(2, 6), 0
        for rank in range(2):
            half = batch[rank::2].tolist()
            assert half == notes[rank][step]["indices"]
            images, labels = run.data.train.__getitems__(half)
            losses = step_losses(run, network, network_input(images, flip[rank::2]), labels, run.group_of_class[labels])
            by_class += sums_by_class(losses["mse_own"], labels, 6)
            total = total + sum(loss.mean() for loss in losses.values()) / 2
        run.optimizer.param_groups[0]["lr"] = learning_rate(run.settings, 1, step, len(run.sampler))
        run.optimizer.zero_grad()
        total.backward()
        run.optimizer.step()
        run.sampler.update(*by_class)
        run.sampler.step += 1
        for note in (notes[0][step], notes[1][step]):
            assert torch.allclose(note["weights"], run.sampler.class_weights(), rtol=1e-4)
            for ours, theirs in zip(network.parameters(), note["network"], strict=True):
                assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def test_both_processes_hold_the_same_network_and_class_weights_to_the_bit(two):
    for first, second in zip(*two[1], strict=True):
        assert torch.equal(first["weights"], second["weights"])
        assert all(torch.equal(a, b) for a, b in zip(first["network"], second["network"], strict=True))
        assert set(first["indices"]) != set(second["indices"])


def test_evaluation_by_two_processes_counts_each_image_once(data, teachers, two):
    """23 images: neither process has a half of them, and none is doubled to make one."""
    results = json.loads((two[0] / "student" / "results.json").read_text())
    info = read_info(data)
    network, _ = load_network(two[0] / "student" / "best.pt", 6)
    images = load_test_images(Lists(info, list(range(6)), train=[], select=[], test=read_split(info, "test")),
                              student_run(data, teachers, "fp32").settings)
    confusion = evaluate(network, images, 6, torch.device("cpu"), "fp32")
    assert results["confusion"] == confusion.tolist() and results["images"] == 23


def test_only_the_first_process_writes_and_one_of_them_builds_the_image_cache(two):
    written = [(two[0] / f"notes_written{rank}").read_text() for rank in range(2)]
    assert "last.pt" in written[0] and "log.jsonl" in written[0]
    assert str(two[0]) not in written[1]
    assert sorted(text.count(".npy', -1, -1)") for text in written) == [0, 1]  # renamed into place


def test_a_process_that_dies_ends_the_job_with_a_message(data, teachers, tmp_path):
    started = time.monotonic()
    process = start_two(data, teachers, tmp_path, DIES="1 2")
    said, complaints = process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - started < 100
    assert "exitcode: -9" in complaints.replace(" ", "").replace("exitcode:", "exitcode: ")
    assert "error: another process of this job has ended" in complaints and "--resume" in complaints


def test_a_signal_to_torchrun_leaves_one_checkpoint_of_both(data, teachers, tmp_path):
    process = start_two(data, teachers, tmp_path, "--epochs", "200")
    deadline = time.monotonic() + 120
    while not (tmp_path / "notes0.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, complaints = process.communicate(timeout=120)
    assert process.returncode != 0 and said.count("the same command with --resume goes on from there") == 1
    state = torch.load(tmp_path / "student" / "last.pt", weights_only=True)
    assert state["step"] == state["sampler"]["step"] >= 1
