"""Stages as programs, several at once: each starts when the stages that it needs are finished, and a failure stops only
the stages that need it."""

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

POLL_EVERY = 0.2  # seconds between two checks of the running stages
PATIENCE = 5.0  # seconds after Ctrl-C, which in a terminal reaches the stages too, before they are sent a signal


@dataclass(frozen=True)
class Job:
    """A stage to run. folder: its --output. script: the module of a stage script. flags: all flags, --output included.
    needs: the folders of the jobs whose checkpoints it reads."""

    folder: Path
    script: ModuleType
    flags: list[str]
    needs: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")


@dataclass(frozen=True)
class Running:
    """A running job. log_start: position in its log at which the output of this process begins. bar: its line on a
    terminal."""

    job: Job
    process: subprocess.Popen
    started: float
    log_start: int
    bar: tqdm


# ---- resources of the stages -----------------------------------------------------------------------------------------


def slots(count: int, device: str) -> list[dict[str, str]]:
    """The environments of `count` stages at once; of fewer stages where there are several GPUs but fewer than `count`,
    as each GPU takes one stage. The machine's threads are divided among the stages, unless OMP_NUM_THREADS sets the
    number of each. A single stage has the whole machine.

    device: the --device of the stages."""
    if count == 1:
        return [dict(os.environ)]
    shared = dict(os.environ)
    if "OMP_NUM_THREADS" not in os.environ:
        threads = str(max(1, torch.get_num_threads() // count))
        shared.update(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads)  # torch follows MKL's number where it is set
    gpus = visible_gpus() if device in ("auto", "cuda") else []
    if len(gpus) < 2:
        return [shared] * count
    return [{**shared, "CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:count]]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, by their names in CUDA_VISIBLE_DEVICES."""
    count = torch.cuda.device_count()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in chosen.split(",")][:count] if chosen else [str(gpu) for gpu in range(count)]


# ---- the queue -------------------------------------------------------------------------------------------------------


def run_jobs(jobs: list[Job], environments: list[dict[str, str]], finished: set[Path]) -> None:
    """Run the jobs, one in each of `environments` at a time, in their order, except that a job waits for those that it
    needs. With a single environment the output of the jobs is shown; with several it goes into their logs.

    finished: the folders of jobs that are finished already. Raises UserError naming the failed jobs, after all jobs
    that do not need them have run; Stopped after a signal, when every running stage has written its checkpoint."""
    queue = JobQueue(jobs, environments, finished)
    with StopSignals() as signals:
        queue.run(signals)
    if signals.received:
        raise Stopped(f"stopped, {len(queue.finished)} of {len(jobs)} stages are finished; the same command with "
                      "--resume goes on", signals.received)
    if queue.failed:
        message = "; ".join(queue.failed)
        if queue.waiting:
            message += f"; not started because of it: {', '.join(job.name for job in queue.waiting)}"
        raise UserError(f"{message}; once that is fixed, go on with --resume")


class JobQueue:
    """The jobs, by their states: waiting, running, finished, failed."""

    def __init__(self, jobs: list[Job], environments: list[dict[str, str]], finished: set[Path]):
        self.environments = environments
        self.waiting = [job for job in jobs if job.folder not in finished]
        self.running: dict[int, Running] = {}  # by the number of the environment
        self.finished = set(finished)  # folders
        self.failed: list[str] = []  # messages
        self.logged = len(environments) > 1  # whether the output of the stages goes into logs
        self.stopped_at: float | None = None  # time at which a signal was first seen
        self.signalled = False  # whether the stages have been sent a signal

    def run(self, signals: StopSignals) -> None:
        """Start and collect jobs until nothing can be started, or a signal has come and all have ended."""
        try:
            while True:
                if signals.received:
                    self.stop(signals.received)
                else:
                    self.start_ready_jobs()
                if not self.running:
                    return
                time.sleep(POLL_EVERY)
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

    def stop(self, number: int) -> None:
        """Pass signal `number` on to the running jobs, once. They write their checkpoints and end."""
        if not self.stopped_at:
            self.stopped_at = time.monotonic()
            if self.logged and self.running:
                say_above("stopping: waiting for the checkpoints of " + ", ".join(
                    running.job.name for running in self.running.values()))
        late = time.monotonic() - self.stopped_at > PATIENCE
        if not self.signalled and (late or number != signal.SIGINT):
            self.signalled = True
            for running in self.running.values():
                running.process.terminate()

    def start_ready_jobs(self) -> None:
        """Start waiting jobs that have what they need, in order, as long as an environment is free."""
        for slot in range(len(self.environments)):
            if slot in self.running:
                continue
            job = next((job for job in self.waiting if self.finished.issuperset(job.needs)), None)
            if job:
                self.running[slot] = self.start(job, slot)
                self.waiting.remove(job)

    def start(self, job: Job, slot: int) -> Running:
        """Start one job."""
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

    def collect(self, signals: StopSignals) -> None:
        """Remove the jobs that have ended from the running ones, and show the progress of the others."""
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


# ---- messages --------------------------------------------------------------------------------------------------------


def say_above(text: str) -> None:
    """Print above the lines of the running jobs."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def show_progress(running: Running) -> None:
    """Update a job's line on the terminal to its last finished epoch."""
    bar, folder = running.bar, running.job.folder
    if bar.disable:
        return
    # Files that are still missing or incomplete must not stop the running jobs.
    with contextlib.suppress(UserError, LookupError, TypeError, ValueError):
        log = read_json_lines(folder / "log.jsonl")
        if len(log) != bar.n:
            accuracy = "".join(f", {key} {value:.4f}" for key, value in log[-1].items() if key.endswith("_accuracy"))
            epochs = read_json(folder / "settings.json")["epochs"]
            bar.n = len(log)
            bar.set_description_str(f"{running.job.name}: epoch {bar.n} of {epochs}{accuracy}")


def accuracy_of(job: Job) -> str:
    """The overall accuracy of a finished job in per cent, for display."""
    with contextlib.suppress(UserError, LookupError, TypeError, ValueError):
        return f"{100 * read_json(job.folder / 'results.json')['overall']:.1f}"
    return "unknown"


def failure(running: Running, status: int, logged: bool) -> str:
    """A message on the failure of a job. logged: whether its output is in its log."""
    job = running.job
    if not logged:
        return f"{job.name} ended with status {status}"
    text = job.log.read_bytes()[running.log_start:].decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it printed nothing"]
    last = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
    return f"{job.name} ended with status {status} ({job.log}: {last.removeprefix('error: ')})"
