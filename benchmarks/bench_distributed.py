"""Several processes on this machine against one: images a second of whole training steps, and what the all-reduce of
the self-calibration costs.

    python -m benchmarks.bench_distributed --processes 1 2

Every process gets an equal share of the machine's cores (or a GPU of its own); the global batch stays the same, so the
comparison is of one process with all cores against several with some. The runs take turns, so that a slow moment of the
machine hits all."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.bench_training import STEPS, draw_data, save_teachers, stage_run
from benchmarks.common import finish, parser, set_up
from common.precision import resolve_precision
from common.runtime import (
    rank,
    resolve_device,
    run_script,
    seed_everything,
    start_processes,
    sum_over_processes,
)
from common.training import trained_form
from dataset import read_info
from recognition.engine import train_step


def work(folder, stage, batch_size, steps, size):
    """One process's part of a run: `steps` training steps after 3 to warm up. The first process prints JSON."""
    device = resolve_device("auto")
    start_processes(device)
    seed_everything(0)
    precision = resolve_precision("auto", device)
    run = stage_run(STEPS[stage][0], folder, read_info(folder / "data"), size, batch_size, precision, device)
    trained = trained_form(run, run.settings.compile).train()
    seconds, reduce_seconds = [], []
    for number, indices in zip(range(steps + 3), run.sampler, strict=False):
        started = time.perf_counter()
        train_step(run, trained, indices)
        if device.type == "cuda":
            torch.cuda.synchronize()
        stepped = time.perf_counter()
        sum_over_processes(torch.zeros(2, len(run.group_of_class), device=device)).cpu()
        if number >= 3:
            seconds.append(stepped - started)
            reduce_seconds.append(time.perf_counter() - stepped)
    if rank() == 0:
        print(json.dumps({"seconds": statistics.median(seconds), "reduce": statistics.median(reduce_seconds)}))


def start(folder, processes, stage, args):
    """The measurement of one run of `work` with several processes."""
    threads = max((os.cpu_count() or 1) // processes, 1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m",
               "benchmarks.bench_distributed", "--work", str(folder), stage, str(args.batch_size), str(args.steps),
               str(args.image_size)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    if sys.argv[1:2] == ["--work"]:
        folder, stage, *numbers = sys.argv[2:]
        return work(Path(folder), stage, *map(int, numbers))
    flags = parser(__doc__, "distributed")
    flags.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    flags.add_argument("--batch-size", type=int, default=16, help="the global batch")
    flags.add_argument("--image-size", type=int, default=224)
    flags.add_argument("--steps", type=int, default=10, help="timed steps of a run")
    flags.set_defaults(repeats=3)
    args = flags.parse_args()
    device = set_up(args)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        save_teachers(folder / "runs", draw_data(folder / "data"), args.image_size)
        for _ in range(args.repeats):
            for stage in ("plain", "student"):
                for processes in args.processes:
                    found.setdefault((stage, processes), []).append(start(folder, processes, stage, args))
    rows = []
    for (stage, processes), runs in found.items():
        step = statistics.median(run["seconds"] for run in runs)
        one = statistics.median(run["seconds"] for run in found[stage, args.processes[0]])
        rows.append({"step": stage, "processes": processes, "batch of each": args.batch_size // processes,
                     "ms a step": round(1000 * step, 1), "images/s": round(args.batch_size / step, 1),
                     f"times {args.processes[0]} process": round(one / step, 2),
                     "all-reduce of class losses, ms": round(1000 * statistics.median(r["reduce"] for r in runs), 2)})
    finish(args, device, f"training with several processes, {args.image_size}x{args.image_size}", rows)


if __name__ == "__main__":
    run_script(main)
