"""Stages as programs, several at once: each starts when what it needs is finished, and fails alone."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from tqdm import tqdm

from common.files import read_json, read_json_lines
from common.runtime import Stopped, StopSignals, UserError

LOOK_EVERY = 0.2  # seconds between two looks at the running stages
PATIENCE = 5.0  # seconds after Ctrl-C, which in a terminal reaches the stages too, before they are told


@dataclass(frozen=True)
class Job:
    """A stage to run. folder: its --output. script: the module of a stage script. flags: all of them, --output too.
    needs: the folders of the jobs whose checkpoints it reads."""

    folder: Path
    script: ModuleType
    flags: list
    needs: tuple = ()

    @property
    def name(self):
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def log(self):
        return self.folder.with_name(f"{self.folder.name}.log")


@dataclass(frozen=True)
class Running:
    """A job at work. log_start: where in its log the output of this process begins. bar: its line on a terminal."""

    job: Job
    process: subprocess.Popen
    started: float
    log_start: int
    bar: tqdm


# ---- what each stage gets --------------------------------------------------------------------------------------------


def slots(count, device):
    """The environments of `count` stages at once, fewer where there are several GPUs but not so many: each GPU takes
    one. The threads of the machine are shared out, unless OMP_NUM_THREADS says how many each stage has. A single stage
    has everything.

    device: the --device of the stages."""
    if count == 1:
        return [dict(os.environ)]
    shared = dict(os.environ)
    if "OMP_NUM_THREADS" not in os.environ:
        threads = str(max(1, torch.get_num_threads() // count))
        shared.update(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads)  # torch heeds MKL's number where that is set
    gpus = visible_gpus() if device in ("auto", "cuda") else []
    if len(gpus) < 2:
        return [shared] * count
    return [{**shared, "CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:count]]


def visible_gpus():
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES gives them."""
    count = torch.cuda.device_count()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in chosen.split(",")][:count] if chosen else [str(gpu) for gpu in range(count)]


# ---- the queue -------------------------------------------------------------------------------------------------------


def run_jobs(jobs, environments, finished):
    """Run the jobs, one in each of `environments` at a time, in their order as far as what they need is finished. What
    a single environment runs is shown; several write each job's output into its log.

    finished: the folders of jobs that are not to run. Raises UserError naming what failed, after all that does not need
    it has run; Stopped when a signal has come and every running stage has written its checkpoint."""
    queue = JobQueue(jobs, environments, finished)
    with StopSignals() as signals:
        queue.run(signals)
    if signals.received:
        raise Stopped(f"stopped, {len(queue.finished)} of {len(jobs)} stages are finished; the same command with "
                      "--resume goes on", signals.received)
    if queue.failed:
        left = ", ".join(job.name for job in queue.waiting)
        raise UserError("; ".join(queue.failed) + (f"; not started for that: {left}" if left else "")
                        + "; once that is mended, go on with --resume")


class JobQueue:
    """The jobs that wait, run, are finished and have failed."""

    def __init__(self, jobs, environments, finished):
        self.environments = environments
        self.waiting = [job for job in jobs if job.folder not in finished]
        self.running = {}  # {number of its environment: Running}
        self.finished = set(finished)  # folders
        self.failed = []  # in words
        self.logged = len(environments) > 1  # whether the stages write into logs, or here
        self.stopped_at = None  # when a signal was first seen
        self.told = False  # whether the stages have been sent one

    def run(self, signals):
        """Start and collect jobs until nothing can be started, or a signal has come and all have ended."""
        try:
            while True:
                if signals.received:
                    self.stop(signals.received)
                else:
                    self.start_what_is_ready()
                if not self.running:
                    return
                time.sleep(LOOK_EVERY)
                self.collect(signals)
        except BaseException as error:
            second_interrupt = isinstance(error, KeyboardInterrupt)
            for running in self.running.values():
                running.process.kill() if second_interrupt else running.process.terminate()
            raise
        finally:
            for running in self.running.values():
                running.process.wait()
                running.bar.close()

    def stop(self, number):
        """Tell the running jobs once of signal `number`. They answer it by their checkpoint, and end."""
        if not self.stopped_at:
            self.stopped_at = time.monotonic()
            if self.logged and self.running:
                say_above("stopping: waiting for the checkpoints of " + ", ".join(
                    running.job.name for running in self.running.values()))
        late = time.monotonic() - self.stopped_at > PATIENCE
        if not self.told and (late or number != signal.SIGINT):
            self.told = True
            for running in self.running.values():
                running.process.terminate()

    def start_what_is_ready(self):
        """Start waiting jobs, the first that can start first, as long as an environment is free."""
        for slot in range(len(self.environments)):
            ready = (job for job in self.waiting if self.finished.issuperset(job.needs))
            job = next(ready, None) if slot not in self.running else None
            if job:
                self.running[slot] = self.start(job, slot)
                self.waiting.remove(job)

    def start(self, job, slot):
        """Start one job. Returns it as Running."""
        command, log_start = [sys.executable, job.script.__file__, *job.flags], 0
        if self.logged:
            say_above(f"{job.name}: started, output in {job.log}")
            job.log.parent.mkdir(parents=True, exist_ok=True)
            with open(job.log, "ab") as log:
                log_start = log.tell()
                process = subprocess.Popen(command, env=self.environments[slot], stdout=log, stderr=subprocess.STDOUT)
        else:
            say_above(f"\n== {job.name}")
            process = subprocess.Popen(command, env=self.environments[slot])
        bar = tqdm(desc=job.name, position=slot, leave=False, disable=None if self.logged else True,
                   bar_format="{desc}")
        return Running(job, process, time.monotonic(), log_start, bar)

    def collect(self, signals):
        """Take the jobs that have ended off the running ones, and show how far the others are."""
        for slot, running in list(self.running.items()):
            status, job = running.process.poll(), running.job
            if status is None:
                show_progress(running)
                continue
            del self.running[slot]
            running.bar.close()
            minutes = f"after {(time.monotonic() - running.started) / 60:.1f} minutes"
            if status == 0:
                self.finished.add(job.folder)
                message = f"finished {minutes}, accuracy {accuracy_of(job)}"
            elif signals.received:
                message = f"stopped {minutes}"
            else:
                self.failed.append(failure(running, status, self.logged))
                message = f"FAILED {minutes}"
            if self.logged:
                say_above(f"{job.name}: {message}; {len(self.waiting) + len(self.running)} left")


# ---- what is told ----------------------------------------------------------------------------------------------------


def say_above(text):
    """Print above the lines of the running jobs."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def show_progress(running):
    """Bring a job's line on the terminal to its last finished epoch."""
    bar, folder = running.bar, running.job.folder
    if bar.disable:
        return
    # Files that are not there yet, or not whole, are no reason to stop what runs.
    with contextlib.suppress(UserError, LookupError, TypeError, ValueError):
        log = read_json_lines(folder / "log.jsonl")
        if len(log) != bar.n:
            accuracy = "".join(f", {key} {value:.4f}" for key, value in log[-1].items() if key.endswith("_accuracy"))
            epochs = read_json(folder / "settings.json")["epochs"]
            bar.n = len(log)
            bar.set_description_str(f"{running.job.name}: epoch {bar.n} of {epochs}{accuracy}")


def accuracy_of(job):
    """The overall accuracy that a finished job found, in per cent, for the eye."""
    with contextlib.suppress(UserError, LookupError, TypeError, ValueError):
        return f"{100 * read_json(job.folder / 'results.json')['overall']:.1f}"
    return "unknown"


def failure(running, status, logged):
    """In words, how a job failed. logged: whether its output is in its log."""
    job = running.job
    if not logged:
        return f"{job.name} ended with status {status}"
    text = job.log.read_bytes()[running.log_start:].decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it printed nothing"]
    last = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
    return f"{job.name} ended with status {status} ({job.log}: {last.removeprefix('error: ')})"
