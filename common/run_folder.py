"""The output folder of a run: it holds one run, is locked while that is at work, and its files say how to resume it."""

import contextlib
import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from common.files import locked, read_json, remove_partials, write_json
from common.precision import PRECISIONS, computes_in, known_precision, resolve_precision
from common.runtime import UserError, max_over_processes, rank, say


def run_identity(stage: str, settings: Any, not_part: Collection[str], **more: Any) -> dict[str, Any]:
    """The plain values that identify a run: two runs with equal ones compute the same on the same device.

    not_part: names of settings that may differ within a run. more: values in place of settings (the precision that
    `auto` has become), or besides them (a fingerprint of the data, as `data`)."""
    values = {key: list(value) if isinstance(value, tuple) else value
              for key, value in dataclasses.asdict(settings).items() if key not in not_part}
    return {"stage": stage, **values, **more}


def was_trained(folder: Path) -> bool:
    """Whether the run in a folder has written anything but its settings: one that was killed before its first
    checkpoint has not."""
    return any((folder / name).exists() for name in ("last.pt", "log.jsonl", "results.json"))


def check_output(settings: Any, identity: dict[str, Any], data: str, unused: Collection[str] = (),
                 fixed_epochs: str = "") -> None:
    """Raise UserError if `settings.output` holds another run than that of `identity` (a `run_identity`), or this run
    and --resume is not given, or the results of a test.

    A folder with settings.json alone, of a run that was killed before it had trained, is free. A setting that
    settings.json lacks, being younger than the run, counts as its default. data: human-readable name of what
    identity["data"] tells apart. unused: names of settings that the stage does not use. fixed_epochs: why the run
    cannot go on for more --epochs than it was started with, "" where it can."""
    folder = Path(settings.output)
    path = folder / "settings.json"
    if not path.exists() and (folder / "results.json").exists():
        raise UserError(f"{folder}: holds the results of a test; give another --output")
    if not path.exists() or not was_trained(folder):
        return
    if not settings.resume:
        raise UserError(f"{folder}: holds a run already; go on with it by --resume, or give another --output")
    recorded = read_json(path)
    recorded = recorded if isinstance(recorded, dict) else {}
    if recorded.get("data") != identity["data"]:
        raise UserError(f"{folder}: holds a run on other {data} now; give another --output")
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    for name, value in identity.items():
        if name in unused or name not in recorded and name not in defaults:  # the latter: not recorded at that time
            continue
        before = recorded.get(name, defaults.get(name))
        longer = name == "epochs" and isinstance(before, int) and value > before
        if before != value and not (longer and not fixed_epochs):
            reason = f" and cannot be extended, as {fixed_epochs}" if longer else ""
            raise UserError(f"{folder}: holds a run with {name.replace('_', '-')} {before}, not {value}{reason}; "
                            "give the settings it was started with, or another --output")


def check_test_output(settings: Any, weights: Path) -> None:
    """Raise UserError if `settings.output` holds another run than that of the weights to be tested."""
    folder = Path(settings.output)
    if weights.resolve().parent != folder.resolve() and (folder / "settings.json").exists():
        raise UserError(f"{folder}: holds a run of its own; give another --output for the test of {weights}")


class RunFolder:
    """The folder of a run, which is this run's alone while entered: its settings.json is locked. Entered before the run
    is read from there; `record` then writes settings.json for a new or extended run, and removes what killed processes
    have left.
    Both act on the first process only, and raise UserError where another run is at work in the folder."""

    def __init__(self, settings: Any):
        self.settings = settings
        self.path = Path(settings.output) / "settings.json"
        self.locks = contextlib.ExitStack()

    def __enter__(self) -> "RunFolder":
        self._lock()
        return self

    def __exit__(self, *_: object) -> None:
        self.locks.close()

    def record(self, identity: dict[str, Any], description: dict[str, Any]) -> None:
        """identity: the run's `run_identity`. description: the metadata of its checkpoints."""
        if rank() != 0:
            return
        if not self.is_locked:  # another run may have begun since
            self._lock()
        remove_partials(self.path.parent)
        extended = is_extended(self.settings)
        if extended:
            self.path.with_name("results.json").unlink(missing_ok=True)  # of fewer epochs
        if extended or not was_trained(self.path.parent):
            machine = {key: description[key] for key in ("dataset", "device", "processes", "versions")}
            write_json(self.path, {**identity, **machine})
            self._lock()  # this file has taken the place of the one that was locked

    def _lock(self) -> None:
        self.is_locked = rank() == 0 and self.path.is_file()
        if self.is_locked:
            self.locks.enter_context(locked(self.path))


def settings_begun_with(settings: Any) -> dict[str, Any]:
    """What settings.json holds of the run to be resumed; nothing if there is no such run."""
    path = Path(settings.output) / "settings.json"
    record = read_json(path) if settings.resume and path.exists() else {}
    return record if isinstance(record, dict) else {}


def is_extended(settings: Any) -> bool:
    """Whether the run to be resumed was begun with fewer --epochs."""
    epochs = settings_begun_with(settings).get("epochs")
    return isinstance(epochs, int) and epochs < settings.epochs and was_trained(Path(settings.output))


def is_finished(settings: Any) -> bool:
    """Whether the run to be resumed is finished: it has been tested, which is the last thing that a run does."""
    return settings.resume and (Path(settings.output) / "results.json").exists() and not is_extended(settings)


def say_finished(settings: Any) -> None:
    """Print that there is nothing left to do."""
    say(f"{Path(settings.output)}: is finished already, see results.json there")


def run_precision(settings: Any, device: torch.device) -> str:
    """The precision that a run trains in, `fp32` or `bf16`, the first process's on all of them: that of --precision. A
    run resumed with `auto` keeps the precision it was begun in, whatever `auto` would be now, and says so."""
    if settings.precision != "auto":
        return resolve_precision(settings.precision, device)
    choices = ("auto", *PRECISIONS)
    begun = precision_begun_in(settings, device) if rank() == 0 else "auto"
    kept = choices[max_over_processes(choices.index(begun), device)]
    if kept not in ("auto", known_precision(device)):
        say(f"precision {kept}, in which this run was begun: --precision auto keeps it")
    return resolve_precision(kept, device)


def precision_begun_in(settings: Any, device: torch.device) -> str:
    """The precision that the run to be resumed was begun in; `auto` if there is no such run, or the device does not
    support it."""
    precision = settings_begun_with(settings).get("precision")
    return precision if precision in PRECISIONS and computes_in(precision, device) else "auto"


def is_resumed(settings: Any) -> bool:
    """Whether --resume is given and there is a checkpoint to go on from."""
    return settings.resume and last_checkpoint(settings).exists()


def last_checkpoint(settings: Any) -> Path:
    """The file of the checkpoint that a run is resumed from."""
    return Path(settings.output) / "last.pt"
