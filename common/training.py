"""How a network is trained here, whatever it is: step by step and epoch by epoch, with checkpoints from which a run
goes on as if it had never been stopped. What is trained, on what and by which losses is the business of who calls
this."""

import importlib.util
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common.files import (
    append_json_line,
    atomic_path,
    load_checkpoint,
    read_json,
    read_json_lines,
    remove_partials,
    save_checkpoint,
    write_json,
)
from common.precision import PRECISIONS, computes_in, known_precision, resolve_precision
from common.runtime import (
    Stopped,
    StopSignals,
    UserError,
    max_over_processes,
    rank,
    say,
    sum_over_processes,
    wait_for_all,
    world_size,
)

UNCHECKED_STEPS = 50  # steps after which losses are looked at: to look at a value is to wait for the GPU


@dataclass(kw_only=True)
class TrainingRun:
    """What every training run holds. `state` and `restore` are its checkpoint: the parts that change; a kind of run
    that has more of them adds them in `more_state` and `restore_more`.

    settings: at least output, epochs, batch_size, save_steps, resume, tensorboard. sampler: batches by their
    order in an epoch; len() of it is the steps of an epoch."""

    name: str  # of the stage
    settings: object
    device: torch.device
    precision: str
    network: torch.nn.Module
    optimizer: torch.optim.Optimizer
    sampler: object
    check_every: int = UNCHECKED_STEPS
    epoch: int = 0  # epochs finished
    step: int = 0  # steps done of the epoch after them
    loss_sums: torch.Tensor = field(default_factory=lambda: torch.zeros(()))  # (terms,) over these steps
    seconds: float = 0.0  # that these steps have taken
    description: dict = field(default_factory=dict)  # what its checkpoints say of themselves

    def more_state(self):
        """What else changes, a dict of tensors and plain types."""
        return {}

    def restore_more(self, state):
        """Take over what `more_state` gave."""

    def state(self):
        """A dict of tensors and plain types."""
        return {"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict(),
                "torch_random": torch.get_rng_state(), "epoch": self.epoch, "step": self.step,
                "loss_sums": self.loss_sums, "seconds": self.seconds, **self.more_state()}

    def restore(self, state):
        """Go on where the run that gave `state` stood. Raises an exception of any kind for what is no such state."""
        # Network and optimizer look for themselves.
        check_alike(state, {name: value for name, value in self.state().items() if name not in ("model", "optimizer")})
        if not (0 <= state["epoch"] <= self.settings.epochs and 0 <= state["step"] < len(self.sampler)):
            raise ValueError(f"epoch {state['epoch']} and step {state['step']} are not of this run")
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["torch_random"])
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.loss_sums = state["loss_sums"].to(self.device)
        self.restore_more(state)


def check_alike(found, expected, name="the checkpoint"):
    """Raise TypeError where `found` lacks a part of `expected`, or has one of another kind."""
    if type(found) is not type(expected) or getattr(found, "dtype", None) != getattr(expected, "dtype", None):
        raise TypeError(f"{name} is not a {type(expected).__name__} as it should be")
    for key, value in expected.items() if isinstance(expected, dict) else ():
        if key not in found:
            raise TypeError(f"{name} lacks {key!r}")
        check_alike(found[key], value, key)


def progress(run):
    """In words, how far the run has come."""
    steps = f" and {run.step} of {len(run.sampler)} steps" if run.step else ""
    return f"{run.epoch} of {run.settings.epochs} epochs{steps}"


# ---- before training -------------------------------------------------------------------------------------------------


def check_common_settings(settings):
    """Raise UserError for settings that cannot work with these processes, or on this machine."""
    if settings.batch_size % world_size():
        raise UserError(f"--batch-size {settings.batch_size}: not a multiple of the {world_size()} processes")
    if settings.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard: the package is not installed; pip install tensorboard")


def check_batch_norm_has_pixels(settings: Any, side: int) -> None:
    """Raise UserError where batch norm would see a single pixel in training: one image for each process, so small that
    its last features are one pixel. side: of the images, in pixels."""
    if settings.batch_size == world_size() and side <= 32:
        raise UserError(f"--batch-size {settings.batch_size}: leaves each process one image, whose last features are a "
                        "single pixel: nothing for batch norm to average; give a larger one, or larger images")


def sgd(parameters: Iterable[torch.nn.Parameter], settings: Any, device: torch.device) -> torch.optim.SGD:
    """SGD with momentum and weight decay, as the settings have them, over those parameters that are trained."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return torch.optim.SGD(trained, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay,
                           fused=device.type in ("cpu", "cuda"))


def record_settings(settings: Any, identity: dict[str, Any], description: dict[str, Any]) -> None:
    """Write settings.json into a new run's folder, on the first process only, and remove what killed processes have
    left there. identity: the run's `run_identity`. description: the metadata of its checkpoints."""
    folder = Path(settings.output)
    if rank() == 0:
        remove_partials(folder)
        if not (folder / "settings.json").exists():
            machine = {key: description[key] for key in ("dataset", "device", "processes", "versions")}
            write_json(folder / "settings.json", {**identity, **machine})


def is_finished(settings: Any) -> bool:
    """Whether the run to be resumed is finished: it has been tested, which is the last thing that a run does."""
    return settings.resume and (Path(settings.output) / "results.json").exists()


def say_finished(settings: Any) -> None:
    """Print that there is nothing left to do."""
    say(f"{Path(settings.output)}: is finished already, see results.json there")


def run_precision(settings, device):
    """The precision that a run trains in, `fp32` or `bf16`, on every process that of the first: as --precision says. A
    run that is resumed with `auto` keeps the one it was begun in, whatever `auto` may come to now, and says so."""
    if settings.precision != "auto":
        return resolve_precision(settings.precision, device)
    choices = ("auto", *PRECISIONS)
    begun = precision_begun_in(settings, device) if rank() == 0 else "auto"
    kept = choices[max_over_processes(choices.index(begun), device)]
    if kept not in ("auto", known_precision(device)):
        say(f"precision {kept}, in which this run was begun: --precision auto keeps it")
    return resolve_precision(kept, device)


def precision_begun_in(settings, device):
    """The precision that the run to be resumed was begun in; `auto` if there is none, or none that this device has."""
    path = Path(settings.output) / "settings.json"
    record = read_json(path) if settings.resume and path.exists() else {}
    precision = record.get("precision") if isinstance(record, dict) else None
    return precision if precision in PRECISIONS and computes_in(precision, device) else "auto"


def is_resumed(settings):
    """Whether there is a checkpoint to go on from, and it is asked for."""
    return settings.resume and last_checkpoint(settings).exists()


def last_checkpoint(settings):
    """Where a run keeps the checkpoint that it is resumed from."""
    return Path(settings.output) / "last.pt"


def resume(run):
    """Bring a new run to where its last checkpoint stands, and its log to the same epoch."""
    last = last_checkpoint(run.settings)
    if is_resumed(run.settings):
        try:
            run.restore(load_checkpoint(last))
        except UserError:
            raise
        except Exception as error:  # a damaged state can make a load_state_dict raise anything
            raise UserError(f"{last}: not a checkpoint that this run can go on from ({error})") from None
    if run.settings.resume:
        trim_log(last.with_name("log.jsonl"), run.epoch)
    if is_resumed(run.settings):
        say(f"resumed: {last}, {progress(run)} done")


def trim_log(path, epochs):
    """Drop the lines of epochs that the checkpoint to resume from does not hold."""
    if rank() == 0 and path.exists():
        records = read_json_lines(path, epochs)
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def trained_form(run, compiled=False):
    """The network as it is trained: compiled if that is asked for, and wrapped where several processes train it."""
    network = run.network
    if compiled:
        # On a GPU a batch of 8 is bound by the launching of its kernels: a graph of them is launched at once.
        network = torch.compile(network, mode="reduce-overhead" if run.device.type == "cuda" else None)
    if world_size() > 1:
        network = DistributedDataParallel(network, [run.device] if run.device.type == "cuda" else None)
    return network


# ---- training --------------------------------------------------------------------------------------------------------


def train_epochs(run, trained, batches, train_step, finish_epoch):
    """Train until the last epoch is done.

    trained: the `trained_form` of the run. batches(): what is left of the epoch, an iterable. train_step(run, trained,
    batch): does a step and returns the names of the loss terms and their values, (terms,). finish_epoch(run, record):
    called with run.epoch counted up; may add to the epoch's record for the log, and prints it. Raises UserError at a
    loss that is not finite, Stopped when a signal has come."""
    folder = Path(run.settings.output)
    writer = None
    if run.settings.tensorboard and rank() == 0:
        from torch.utils.tensorboard import SummaryWriter  # an optional package

        writer = SummaryWriter(str(folder))
    with StopSignals() as signals:
        while run.epoch < run.settings.epochs:
            record = train_one_epoch(run, trained, batches(), train_step, signals)
            run.epoch += 1
            share_buffers(run.network)
            finish_epoch(run, record)
            append_json_line(folder / "log.jsonl", record)
            save_last(run)
            if writer:
                write_scalars(writer, record)
            received = max_over_processes(signals.received, run.device)
            if received:
                rest = "goes on from there" if run.epoch < run.settings.epochs else "tests what was trained"
                raise Stopped(f"stopped after {progress(run)}, kept in {folder}; the same command with --resume {rest}",
                              received)
    wait_for_all()  # until the first process has written its files


def train_one_epoch(run, trained, batches, train_step, signals):
    """One pass over the training images, or the rest of one. Returns the epoch's record for the log: losses by name,
    learning rate, time.

    trained: `run.network`, or its form for training. signals: StopSignals, heeded after a step."""
    trained.train()
    settings, steps, unchecked = run.settings, len(run.sampler), []
    epoch, started = run.epoch + 1, time.perf_counter() - run.seconds
    bar = tqdm(batches, desc=f"{run.name} {epoch}/{settings.epochs}", leave=False, initial=run.step, total=steps,
               disable=rank() > 0 or None)
    for batch in bar:  # drawn when asked for and not before: the last step may have changed the sampler's weights
        names, terms = train_step(run, trained, batch)
        unchecked.append(terms)
        run.loss_sums = run.loss_sums.to(run.device) + terms
        run.step += 1
        look_around(run, names, unchecked, signals, started)
    means = (sum_over_processes(run.loss_sums) / world_size() / steps).tolist()
    seconds = time.perf_counter() - started
    run.step, run.loss_sums, run.seconds = 0, torch.zeros(()), 0.0
    return {"epoch": epoch, "lr": run.optimizer.param_groups[0]["lr"], "loss": sum(means),
            **dict(zip(names, means, strict=True)), "seconds": round(seconds, 3),
            "images_per_second": round(steps * settings.batch_size / seconds, 1)}


def to_device(tensors, device):
    """CPU tensors on the device; to a GPU from pinned memory, so that the copies do not wait for the steps before."""
    if device.type == "cuda":
        tensors = [tensor.pin_memory() for tensor in tensors]
    return [tensor.to(device, non_blocking=True) for tensor in tensors]


def look_around(run, names, unchecked, signals, started):
    """After a step: are the losses finite, is a checkpoint due, has a signal come? Raises UserError or Stopped.

    names: of the loss terms. unchecked: [(terms,)] of the steps since the last look at them; emptied. started: when the
    epoch began."""
    last_of_epoch = run.step == len(run.sampler)
    due = run.settings.save_steps and run.step % run.settings.save_steps == 0 and not last_of_epoch
    # Several processes must look at the same steps, and often, as that is also where they agree to stop.
    together = world_size() > 1
    look = (due or last_of_epoch or len(unchecked) >= (min(run.check_every, 10) if together else run.check_every)
            or (signals.received and not together))
    if look:
        check_finite(torch.stack(unchecked), names, run.name, run.epoch + 1, run.step)
        unchecked.clear()
    if last_of_epoch:
        return
    # A signal may reach one process a step before the others: they stop together, after a look.
    received = max_over_processes(signals.received, run.device) if look else 0
    if not (due or received):
        return
    run.seconds = time.perf_counter() - started
    save_last(run)
    if received:
        raise Stopped(f"stopped after {progress(run)}, kept in {run.settings.output}; the same command with --resume "
                      "goes on from there", received)


def check_finite(terms, names, name, epoch, last_step):
    """Raise UserError naming the first loss term that is not finite, and its step.

    terms: (steps, len(names)), of consecutive steps up to last_step, which is counted from 1. name: of the stage."""
    bad = (~terms.isfinite()).nonzero().tolist()
    if bad:
        row, column = bad[0]
        step, value = last_step - len(terms) + 1 + row, terms[row, column].item()
        raise UserError(f"stage {name}, epoch {epoch}, step {step}: {names[column]} is {value}; the checkpoints "
                        "of before are kept; try a lower --lr or --precision fp32")


def save_last(run):
    """Write last.pt, from which `--resume` goes on."""
    share_buffers(run.network)
    if world_size() > 1:  # the checkpoint is the first process's: what it holds must be that of all
        run.loss_sums = sum_over_processes(run.loss_sums.to(run.device)) / world_size()
    save_checkpoint(last_checkpoint(run.settings), {
        **run.state(), "description": {**run.description, "epoch": run.epoch}})


def share_buffers(network):
    """Give every process the batch-norm statistics of the first, so that all hold one network."""
    if world_size() > 1:
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, 0)


def write_scalars(writer, record):
    """Give the numbers of an epoch to TensorBoard."""
    for name, value in record.items():
        if name != "epoch" and isinstance(value, (int, float)):
            writer.add_scalar(name, value, record["epoch"])
    writer.flush()
