"""The training loop of any network: steps and epochs, with checkpoints from which a run goes on as if it had never been
stopped. The network, its data and its losses are up to the caller."""

import importlib.util
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common.files import append_json_line, atomic_path, load_checkpoint, read_json_lines, save_checkpoint
from common.run_folder import is_resumed, last_checkpoint
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

UNCHECKED_STEPS = 50  # steps between two checks of the losses: to read a value is to wait for the GPU


AnyRun = TypeVar("AnyRun", bound="TrainingRun")
# (run, network in its form for training, batch) -> (names of the loss terms, their values (terms,)).
TrainStep = Callable[[AnyRun, torch.nn.Module, Any], tuple[tuple[str, ...], torch.Tensor]]


@dataclass(kw_only=True)
class TrainingRun:
    """One training run. Its checkpoint is the parts that change: `state` returns them and `restore` takes them; a kind
    of run with more such parts adds them in `more_state` and `restore_more`.

    settings: a dataclass with at least output, epochs, batch_size, save_steps, resume, tensorboard. sampler: yields the
    batches of an epoch; its len() is the number of steps."""

    name: str  # of the stage
    settings: Any
    device: torch.device
    precision: str
    network: torch.nn.Module
    optimizer: torch.optim.Optimizer
    sampler: Any
    check_every: int = UNCHECKED_STEPS
    epoch: int = 0  # epochs finished
    step: int = 0  # steps done of the epoch after them
    loss_sums: torch.Tensor = field(default_factory=lambda: torch.zeros(()))  # (terms,) over these steps
    seconds: float = 0.0  # that these steps have taken
    description: dict[str, Any] = field(default_factory=dict)  # metadata of its checkpoints

    @property
    def trainee(self) -> torch.nn.Module:
        """The module whose parameters are trained: the network, and in some kinds of run others beside it."""
        return self.network

    def more_state(self) -> dict[str, Any]:
        """Further parts that change, a dict of tensors and plain types."""
        return {}

    def restore_more(self, state: dict[str, Any]) -> None:
        """Take over the parts that `more_state` returned."""

    def state(self) -> dict[str, Any]:
        """The parts that change, a dict of tensors and plain types."""
        return {"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict(),
                "torch_random": torch.get_rng_state(), "epoch": self.epoch, "step": self.step,
                "loss_sums": self.loss_sums, "seconds": self.seconds, **self.more_state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from the `state` of an earlier run. Raises an exception of any kind where it is not such a state."""
        # Network and optimizer check their own parts.
        check_alike(state, {name: value for name, value in self.state().items() if name not in ("model", "optimizer")})
        if not (0 <= state["epoch"] <= self.settings.epochs and 0 <= state["step"] < len(self.sampler)):
            raise ValueError(f"epoch {state['epoch']} and step {state['step']} are not of this run")
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["torch_random"])
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.loss_sums = state["loss_sums"].to(self.device)
        self.restore_more(state)


def check_alike(value: Any, expected: Any, name: str = "the checkpoint") -> None:
    """Raise TypeError where `value` lacks a part of `expected`, or a part has another type."""
    if type(value) is not type(expected) or getattr(value, "dtype", None) != getattr(expected, "dtype", None):
        raise TypeError(f"{name} is not a {type(expected).__name__} as it should be")
    if isinstance(expected, dict):
        for key, part in expected.items():
            if key not in value:
                raise TypeError(f"{name} lacks {key!r}")
            check_alike(value[key], part, key)


def progress(run: TrainingRun) -> str:
    """The epochs and steps done, human-readable."""
    steps = f" and {run.step} of {len(run.sampler)} steps" if run.step else ""
    return f"{run.epoch} of {run.settings.epochs} epochs{steps}"


# ---- before training -------------------------------------------------------------------------------------------------


def check_common_settings(settings: Any) -> None:
    """Raise UserError for settings that cannot work with the number of processes, or the installed packages."""
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


def resume(run: TrainingRun) -> None:
    """With --resume, bring a new run to the state of its last checkpoint, and its log to the same epoch."""
    last = last_checkpoint(run.settings)
    if is_resumed(run.settings):
        try:
            run.restore(load_checkpoint(last))
        except UserError:
            raise
        except Exception as error:  # a damaged state can make load_state_dict raise any exception
            raise UserError(f"{last}: not a checkpoint that this run can go on from ({error})") from None
    if run.settings.resume:
        trim_log(last.with_name("log.jsonl"), run.epoch)
        if last.exists():
            say(f"resumed: {last}, {progress(run)} done")
        else:
            say(f"--resume: no checkpoint in {last.parent} yet; a new run begins")


def trim_log(path: Path, epochs: int) -> None:
    """Drop the lines of epochs after the checkpoint to resume from."""
    if rank() == 0 and path.exists():
        records = read_json_lines(path, epochs)
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def trained_form(run: TrainingRun, compiled: bool = False) -> torch.nn.Module:
    """The trainee in its form for training: compiled on request, and wrapped where several processes train it."""
    network: Any = run.trainee
    if compiled:
        # On a GPU a batch of 8 is bound by kernel launches: a CUDA graph needs only one.
        network = torch.compile(network, mode="reduce-overhead" if run.device.type == "cuda" else None)
    if world_size() > 1:
        network = DistributedDataParallel(network, [run.device] if run.device.type == "cuda" else None)
    return network


# ---- training --------------------------------------------------------------------------------------------------------


def train_epochs(run: AnyRun, trained: torch.nn.Module, batches: Callable[[], Iterable[Any]],
                 train_step: TrainStep[AnyRun], finish_epoch: Callable[[AnyRun, dict[str, Any]], None]) -> None:
    """Train until the last epoch is done.

    trained: the `trained_form` of the run. batches(): the rest of the epoch. train_step(run, trained, batch): does a
    step and returns the names of the loss terms and their values, (terms,). finish_epoch(run, record): called after
    run.epoch is counted up; may add to the epoch's record for the log, and prints it. Raises UserError at a loss that
    is not finite, Stopped after a signal."""
    folder = Path(run.settings.output)
    writer = None
    if run.settings.tensorboard and rank() == 0:
        from torch.utils.tensorboard import SummaryWriter  # an optional package

        writer = SummaryWriter(str(folder))
    with StopSignals() as signals:
        while run.epoch < run.settings.epochs:
            record = train_one_epoch(run, trained, batches(), train_step, signals)
            run.epoch += 1
            share_buffers(run.trainee)
            finish_epoch(run, record)
            append_json_line(folder / "log.jsonl", record)
            save_last(run)
            if writer:
                write_scalars(writer, record)
            received = max_over_processes(signals.received, run.device)
            if received:
                rest = "goes on from there" if run.epoch < run.settings.epochs else "tests the trained network"
                raise Stopped(f"stopped after {progress(run)}, kept in {folder}; the same command with --resume {rest}",
                              received)
    wait_for_all()  # until the first process has written its files


def train_one_epoch(run: AnyRun, trained: torch.nn.Module, batches: Iterable[Any], train_step: TrainStep[AnyRun],
                    signals: StopSignals) -> dict[str, Any]:
    """One pass over the training images, or the rest of one. Returns the epoch's record for the log: losses by name,
    learning rate, time.

    signals: checked after every step."""
    trained.train()
    settings, steps = run.settings, len(run.sampler)
    names: tuple[str, ...] = ()
    unchecked: list[torch.Tensor] = []
    epoch, started = run.epoch + 1, time.perf_counter() - run.seconds
    bar = tqdm(batches, desc=f"{run.name} {epoch}/{settings.epochs}", leave=False, initial=run.step, total=steps,
               disable=rank() > 0 or None)
    for batch in bar:  # drawn only now: the last step may have changed the sampler's weights
        names, terms = train_step(run, trained, batch)
        unchecked.append(terms)
        run.loss_sums = run.loss_sums.to(run.device) + terms
        run.step += 1
        check_progress(run, names, unchecked, signals, started)
    means = (sum_over_processes(run.loss_sums) / world_size() / steps).tolist()
    seconds = time.perf_counter() - started
    run.step, run.loss_sums, run.seconds = 0, torch.zeros(()), 0.0
    return {"epoch": epoch, "lr": run.optimizer.param_groups[0]["lr"], "loss": sum(means),
            **dict(zip(names, means, strict=True)), "seconds": round(seconds, 3),
            "images_per_second": round(steps * settings.batch_size / seconds, 1)}


def to_device(tensors: Iterable[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """CPU tensors, moved to the device; to a GPU from pinned memory, so that the copies do not wait for earlier
    steps."""
    if device.type == "cuda":
        tensors = [tensor.pin_memory() for tensor in tensors]
    return [tensor.to(device, non_blocking=True) for tensor in tensors]


def check_progress(run: TrainingRun, names: Sequence[str], unchecked: list[torch.Tensor], signals: StopSignals,
                   started: float) -> None:
    """After a step: check that the losses are finite, save a checkpoint if one is due, and stop after a signal. Raises
    UserError or Stopped.

    names: of the loss terms. unchecked: [(terms,)] of the steps since the last check; emptied by a check. started: time
    at which the epoch began."""
    last_of_epoch = run.step == len(run.sampler)
    due = run.settings.save_steps and run.step % run.settings.save_steps == 0 and not last_of_epoch
    # Several processes must check at the same steps, and often, as there they also agree to stop.
    distributed = world_size() > 1
    check_every = min(run.check_every, 10) if distributed else run.check_every
    check = due or last_of_epoch or len(unchecked) >= check_every or (signals.received and not distributed)
    if check:
        check_finite(torch.stack(unchecked), names, run.name, run.epoch + 1, run.step)
        unchecked.clear()
    if last_of_epoch:
        return
    # A signal may reach one process a step before the others: they stop together, after a check.
    received = max_over_processes(signals.received, run.device) if check else 0
    if not (due or received):
        return
    run.seconds = time.perf_counter() - started
    save_last(run)
    if received:
        raise Stopped(f"stopped after {progress(run)}, kept in {run.settings.output}; the same command with --resume "
                      "goes on from there", received)


def check_finite(terms: torch.Tensor, names: Sequence[str], stage: str, epoch: int, last_step: int) -> None:
    """Raise UserError naming the first loss term that is not finite, and its step.

    terms: (steps, len(names)), of consecutive steps up to last_step, which is counted from 1."""
    bad = (~terms.isfinite()).nonzero().tolist()
    if bad:
        row, column = bad[0]
        step, value = last_step - len(terms) + 1 + row, terms[row, column].item()
        raise UserError(f"stage {stage}, epoch {epoch}, step {step}: {names[column]} is {value}; the checkpoints "
                        "before it are kept; try a lower --lr or --precision fp32")


def save_last(run: TrainingRun) -> None:
    """Write last.pt, the checkpoint for `--resume`."""
    share_buffers(run.trainee)
    if world_size() > 1:  # the first process writes its own state: the sums must be those of all processes
        run.loss_sums = sum_over_processes(run.loss_sums.to(run.device)) / world_size()
    save_checkpoint(last_checkpoint(run.settings), {
        **run.state(), "description": {**run.description, "epoch": run.epoch}})


def share_buffers(network: torch.nn.Module) -> None:
    """Give every process the batch-norm statistics of the first, so that all have the same network."""
    if world_size() > 1:
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, 0)


def write_scalars(writer: Any, record: dict[str, Any]) -> None:
    """Write the numbers of an epoch to TensorBoard."""
    for name, value in record.items():
        if name != "epoch" and isinstance(value, (int, float)):
            writer.add_scalar(name, value, record["epoch"])
    writer.flush()
