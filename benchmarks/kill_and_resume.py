"""Kill a training run with SIGKILL at random moments, resume it each time, and compare it with a run never killed: the
weights to the bit, and the log line by line but for its times.

    python -m benchmarks.kill_and_resume --kills 20

The run is a student on drawn noise with teachers of random weights, in fp32 on the CPU, writing a checkpoint every 3
steps. Exit status 1 if any resumed run ends otherwise."""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.bench_training import draw_data, save_teachers
from common.runtime import run_script

PROJECT = Path(__file__).resolve().parent.parent


def command(data, output, runs, size, epochs):
    """The command of a student that writes to `output`, with its start and its teachers from the folder `runs`."""
    origins = [part for flag, name in (("--init", "baseline"), ("--t1", "t1"), ("--t2", "t2"), ("--t3", "t3"))
               for part in (flag, str(runs / name / "best.pt"))]
    return [sys.executable, str(PROJECT / "baseline_cl_s_weight.py"), "--data-root", str(data), "--output", str(output),
            *origins, "--image-size", str(size), "--epochs", str(epochs), "--batch-size", "8", "--lr", "0.01",
            "--schedule", "one-cycle", "--device", "cpu", "--precision", "fp32", "--save-steps", "3",
            "--teacher-batch-norm", "recalibrated", "--feature-cache", "1", "--resume"]


def run_until(program, seconds):
    """Run a stage script and kill it `seconds` after it has said what it trains (None: let it end). Returns whether it
    was killed. Raises RuntimeError if it fails by itself."""
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("device ") and seconds is not None:
                time.sleep(seconds)
                process.kill()
        status = process.wait()
    if status not in (0, -9):
        raise RuntimeError("".join(said))
    return status == -9


def outcome(folder):
    """(weights, log without its times) of a finished run."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    records = [{key: value for key, value in json.loads(line).items() if key not in ("seconds", "images_per_second")}
               for line in lines]
    return torch.load(folder / "last.pt", weights_only=True)["model"], records


def same(folder, other):
    """Do two finished runs have the same weights, to the bit, and the same log?"""
    (weights, log), (other_weights, other_log) = outcome(folder), outcome(other)
    return log == other_log and all(torch.equal(value, other_weights[name]) for name, value in weights.items())


def kill_and_resume(folder, data, runs, kills, size=32, epochs=3, seed=0, say=print):
    """Kill runs `kills` times in all; a run that ends before is compared, and another begun. Returns (runs compared,
    runs that were the same)."""
    moments = random.Random(seed)
    whole = folder / "whole"
    run_until(command(data, whole, runs, size, epochs), None)
    duration = sum(json.loads(line)["seconds"] for line in (whole / "log.jsonl").read_text().splitlines())
    killed, compared, identical = 0, 0, 0
    while killed < kills or compared == 0:
        compared += 1
        output, times = folder / f"killed{compared}", 0
        program = command(data, output, runs, size, epochs)
        while killed < kills and run_until(program, moments.uniform(0, duration / 4)):
            killed, times = killed + 1, times + 1
        run_until(program, None)
        identical += same(output, whole)
        say(f"run {compared}, killed {times} times: {'the same' if same(output, whole) else 'NOT THE SAME'}")
    return compared, identical


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--kills", type=int, default=20)
    flags.add_argument("--seed", type=int, default=0, help="of the moments")
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        info = draw_data(folder / "data", images_per_class=4, size=40)
        save_teachers(folder / "runs", info, size=32)
        compared, identical = kill_and_resume(folder, info.root, folder / "runs", args.kills, seed=args.seed)
    print(f"{args.kills} kills, {compared} runs compared with one never killed, {identical} the same to the bit")
    return int(identical < compared)


if __name__ == "__main__":
    run_script(main)
