"""How one stage trains: from settings to a run, epoch by epoch, with checkpoints from which it goes on as if never
stopped, to the best epoch and its test. A stage script says WHAT (a `Stage` and its `Settings`)."""

import importlib.util
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import report
from ClassAwareSampler import ClassAwareBatchSampler, SelfCalibratedBatchSampler, ShuffledBatchSampler
from dataset import GROUPS, batch_loader, describe, fingerprint, network_input
from distillation import sums_by_class
from evaluation import evaluate, test, test_only
from resnet50 import ResNet50, initialise
from runtime import (
    UserError,
    append_json_line,
    atomic_path,
    autocast,
    device_name,
    library_versions,
    load_checkpoint,
    rank,
    resolve_device,
    resolve_precision,
    run_script,
    save_checkpoint,
    say,
    seed_everything,
    start_processes,
    sum_over_processes,
    wait_for_all,
    world_size,
    write_json,
)
from settings import Settings, check_output, identity, parse_settings
from stage import Data, Stage, check_classes, initial_weights, load_data, load_teacher, read_lists, teacher_weights


def run_stage(stage, settings, description, argv=None):
    """The main program of a stage script: parse the flags, then train and test, or only test. Exits the process."""
    run_script(lambda: _run(stage, *parse_settings(stage.name, settings, description, argv)))


def _run(stage, settings, given):
    device = resolve_device(settings.device)
    start_processes(device)
    seed_everything(settings.seed)
    if settings.test_only:
        return test_only(stage, settings, given, device)
    return train(stage, settings, device)


# ---- a run -----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """Everything that one training run holds. `state` and `restore` are its checkpoint: the parts that change."""

    stage: Stage
    settings: Settings
    data: Data
    device: torch.device
    precision: str
    teachers: dict  # {name: frozen ResNet50}
    network: ResNet50
    optimizer: torch.optim.Optimizer
    sampler: ShuffledBatchSampler
    flips: torch.Generator
    epoch: int = 0  # epochs finished
    best_epoch: int = 0
    best_accuracy: float = -1.0

    def state(self):
        """A dict of tensors and plain types."""
        return {"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict(),
                "sampler": self.sampler.state_dict(), "flips": self.flips.get_state(),
                "torch_random": torch.get_rng_state(), "epoch": self.epoch, "best_epoch": self.best_epoch,
                "best_accuracy": self.best_accuracy}

    def restore(self, state):
        """Go on where the run that gave `state` stood."""
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])
        self.flips.set_state(state["flips"])
        torch.set_rng_state(state["torch_random"])
        self.epoch, self.best_epoch = state["epoch"], state["best_epoch"]
        self.best_accuracy = state["best_accuracy"]


def start_run(stage, settings, lists, device, precision):
    """A Run, new or resumed. What may be missing is looked for before the images are read.

    lists: what `read_lists` returned."""
    init, weights = initial_weights(stage, settings), teacher_weights(stage, settings)
    data = load_data(*lists, settings)
    num_classes = len(data.info.classes)
    teachers = {name: load_teacher(name, path, settings, data.info, device, precision)
                for name, path in weights.items()}
    sampler = make_sampler(stage, settings, data.train, num_classes)
    network = ResNet50(num_classes)
    last = Path(settings.output) / "last.pt"
    resumed = settings.resume and last.exists()
    if not resumed:
        said, description = initialise(network, init)
        if description:
            check_classes(description, data.info, init)
        say(f"initialised: {said}")
    network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=settings.lr, momentum=settings.momentum,
                                weight_decay=settings.weight_decay, fused=device.type in ("cpu", "cuda"))
    flips = torch.Generator().manual_seed(settings.seed + 1)
    run = Run(stage, settings, data, device, precision, teachers, network, optimizer, sampler, flips)
    if resumed:
        try:
            run.restore(load_checkpoint(last))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{last}: not a checkpoint that this run can go on from ({error})") from None
    if settings.resume:
        trim_log(last.with_name("log.jsonl"), run.epoch)
    if resumed:
        say(f"resumed: {last}, {run.epoch} of {settings.epochs} epochs done")
    return run


def make_sampler(stage, settings, dataset, num_classes):
    """The batch sampler that the settings name, over `dataset`."""
    arguments = (dataset.labels, settings.batch_size, settings.seed, rank(), world_size())
    if settings.sampler == "shuffled":
        return ShuffledBatchSampler(*arguments)
    if settings.sampler == "class-aware":
        return ClassAwareBatchSampler(*arguments)
    return SelfCalibratedBatchSampler(*arguments, num_classes=num_classes, momentum=settings.calibration_momentum)


def describe_run(run, mine):
    """Print what is about to run. Returns the description that its checkpoints carry, of plain values.

    mine: the run's `settings.identity`."""
    stage, settings, data = run.stage, run.settings, run.data
    say(f"stage {stage.name} on {data.info.name}: {len(data.classes)} classes ({stage.group}), {len(data.train)} "
        f"images to train on, {len(data.select)} to select on ({settings.select}), {len(data.test)} to test")
    say(f"device {device_name(run.device)}; precision {run.precision}; seed {settings.seed}; batch "
        f"{settings.batch_size} ({settings.batch_size // world_size()} on each of {world_size()} processes); lr "
        f"{settings.lr:g}, {settings.schedule}")
    if settings.schedule == "steps" and settings.lr_steps and min(settings.lr_steps) > settings.epochs:
        say(f"note: none of --lr-steps {','.join(map(str, settings.lr_steps))} falls within {settings.epochs} epochs; "
            "for a short run consider --schedule one-cycle")
    preprocessing = {"channels": 1, "image_size": settings.image_size, "resize": "bicubic", "mean": 0.5, "std": 0.5}
    return {"stage": stage.name, **describe(data.info), "preprocessing": preprocessing, "selected_on": settings.select,
            "settings": mine, "device": device_name(run.device), "processes": world_size(),
            "versions": library_versions()}


def trim_log(path, epochs):
    """Drop the lines of epochs that the checkpoint to resume from does not hold."""
    if rank() == 0 and path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        with atomic_path(path) as temporary:
            temporary.write_text("".join(lines[:epochs]), encoding="utf-8")


# ---- training --------------------------------------------------------------------------------------------------------


def train(stage, settings, device):
    """Train a stage, keep `last.pt` and `best.pt`, then test the best."""
    folder = Path(settings.output)
    check_possible(stage, settings)
    precision, lists = resolve_precision(settings.precision, device), read_lists(stage, settings)
    mine = identity(stage.name, settings, precision, fingerprint(lists[0], lists[2]))
    if rank() == 0:
        check_output(settings, mine)
    if settings.resume and (folder / "results.json").exists():
        say(f"{folder}: is finished already, see results.json there")
        return
    run = start_run(stage, settings, lists, device, precision)
    description = describe_run(run, mine)
    if rank() == 0 and not (folder / "settings.json").exists():
        write_json(folder / "settings.json", {
            **mine, **{key: description[key] for key in ("dataset", "device", "processes", "versions")}})
    writer = None
    if settings.tensorboard and rank() == 0:
        from torch.utils.tensorboard import SummaryWriter  # an optional package

        writer = SummaryWriter(str(folder))
    trained = run.network
    if world_size() > 1:
        trained = DistributedDataParallel(run.network, [device] if device.type == "cuda" else None)
    try:
        while run.epoch < settings.epochs:
            record = train_one_epoch(run, trained)
            finish_epoch(run, record, description)
            report.log_epoch(record, settings, run, writer)
    except KeyboardInterrupt:
        say(f"\n{run.epoch} of {settings.epochs} epochs are kept in {folder}; the same command with --resume goes on")
        raise
    say(f"best epoch {run.best_epoch}: {settings.select} accuracy {run.best_accuracy:.4f}")
    wait_for_all()  # until the first process has written best.pt
    if rank() == 0:
        report.draw_curves(folder)
    test(stage, settings, run.data.info, run.data.classes, run.data.train.labels, run.data.test, folder / "best.pt",
         device)


def check_possible(stage, settings):
    """Raise UserError for settings that no data could make work, before any data is read."""
    share = settings.batch_size / world_size()
    if share != int(share):
        raise UserError(f"--batch-size {settings.batch_size}: not a multiple of the {world_size()} processes")
    if share == 1 and settings.image_size <= 32:
        raise UserError(f"--batch-size {settings.batch_size}: leaves each process one image, whose last features are a "
                        "single pixel: nothing for batch norm to average; give a larger one, or larger images")
    if settings.sampler == "self-calibrated" and len(stage.teachers) < len(GROUPS):
        raise UserError(f"--sampler self-calibrated: needs the losses of three teachers; {stage.name} has "
                        f"{len(stage.teachers)}")
    if settings.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard: the package is not installed; pip install tensorboard")


def train_one_epoch(run, trained):
    """One pass over the training images. Returns the epoch's record for the log: losses by name, learning rate, time.

    trained: `run.network`, or its wrapper for several processes. Raises UserError at a loss that is not finite."""
    trained.train()
    settings, device, steps = run.settings, run.device, len(run.sampler)
    epoch, started = run.epoch + 1, time.perf_counter()
    group_of_class = run.data.info.group_of_class()
    self_calibrated = settings.sampler == "self-calibrated"
    sums, unchecked, names = 0, [], ()
    loader = batch_loader(run.data.train, run.sampler, device)
    bar = tqdm(loader, desc=f"{run.stage.name} {epoch}/{settings.epochs}", leave=False, disable=rank() > 0 or None)
    for step, (images, labels) in enumerate(bar):
        # Drawn for the whole batch and then cut, so that the number of processes does not change what is flipped.
        flip = torch.rand(settings.batch_size, generator=run.flips)[rank()::world_size()] < 0.5
        groups = group_of_class[labels]
        images, labels, flip = (part.to(device, non_blocking=True) for part in (images, labels, flip))
        run.optimizer.param_groups[0]["lr"] = learning_rate(settings, epoch, step, steps)
        losses = step_losses(run, trained, network_input(images, flip), labels, groups)
        terms = torch.stack([loss.mean() for loss in losses.values()])  # all weights are 1
        names, sums = tuple(losses), sums + terms.detach()
        unchecked.append(terms.detach())
        # To look at a value is to wait for the GPU: only where the sampler waits for it anyway, or now and then.
        if self_calibrated or len(unchecked) == 50 or step == steps - 1:
            check_finite(torch.stack(unchecked), names, run.stage, epoch, step + 1)
            unchecked.clear()
        run.optimizer.zero_grad(set_to_none=True)
        terms.sum().backward()
        run.optimizer.step()
        if self_calibrated:
            by_class = sum_over_processes(sums_by_class(losses["mse_own"], labels, len(run.data.info.classes)))
            run.sampler.update(*by_class.cpu())
    means = (sum_over_processes(sums) / world_size() / steps).tolist()
    seconds = time.perf_counter() - started
    return {"epoch": epoch, "lr": run.optimizer.param_groups[0]["lr"], "loss": sum(means),
            **dict(zip(names, means, strict=True)), "seconds": round(seconds, 3),
            "images_per_second": round(steps * settings.batch_size / seconds, 1)}


def step_losses(run, trained, images, labels, groups):
    """The losses of a batch by name, (B,) each: cross-entropy and those towards the teachers.

    images: (B, 1, H, W) float. labels: (B,) class ids. groups: (B,) on the CPU, 0 head, 1 middle, 2 tail."""
    with autocast(run.device, run.precision):
        logits, features = trained(images)  # (B, classes), (B, 1024, H/16, W/16)
        losses = {"cross_entropy": F.cross_entropy(logits.float(), labels, reduction="none")}
        if run.stage.imitate:
            losses.update(run.stage.imitate(run.teachers, images, groups, features))
    return losses


def learning_rate(settings, epoch, step, steps_per_epoch):
    """The learning rate of a step. epoch counts from 1, step (in the epoch) from 0.

    `steps`: lr / 10 for each of lr_steps that has begun. `one-cycle`: a cosine from lr / 25 up to lr over the first 30
    per cent of all steps, then a cosine down to lr / 25e4 (Smith and Topin, Super-Convergence, 2019)."""
    if settings.schedule == "steps":
        return settings.lr * 0.1 ** sum(epoch >= start for start in settings.lr_steps)
    done = ((epoch - 1) * steps_per_epoch + step) / max(settings.epochs * steps_per_epoch - 1, 1)  # 0..1
    low, start, end = settings.lr / 25, 0.3, settings.lr / 25e4
    if done < start:
        return low + (settings.lr - low) * (1 - math.cos(math.pi * done / start)) / 2
    return end + (settings.lr - end) * (1 + math.cos(math.pi * (done - start) / (1 - start))) / 2


def check_finite(terms, names, stage, epoch, last_step):
    """Raise UserError naming the first loss term that is not finite, and its step.

    terms: (steps, len(names)), of consecutive steps up to last_step, which is counted from 1."""
    bad = (~terms.isfinite()).nonzero().tolist()
    if bad:
        row, column = bad[0]
        step, value = last_step - len(terms) + 1 + row, terms[row, column].item()
        raise UserError(f"stage {stage.name}, epoch {epoch}, step {step}: {names[column]} is {value}; the checkpoints "
                        "of the last good epoch are kept; try a lower --lr or --precision fp32")


def finish_epoch(run, record, description):
    """Choose the best epoch so far, and write log and checkpoints. Adds the accuracy to the epoch's record."""
    folder, select = Path(run.settings.output), run.settings.select
    run.epoch += 1
    share_buffers(run.network)
    confusion = evaluate(run.network, run.data.select, len(run.data.info.classes), run.device, run.precision)
    accuracy = record[f"{select}_accuracy"] = confusion.diag().sum().item() / confusion.sum().item()
    description = {**description, "epoch": run.epoch, "accuracy": accuracy}
    # Of equal epochs the later one: it has seen more, at a lower learning rate.
    if accuracy >= run.best_accuracy:
        run.best_accuracy, run.best_epoch = accuracy, run.epoch
        save_checkpoint(folder / "best.pt", {"model": run.network.state_dict(), "description": description})
    append_json_line(folder / "log.jsonl", record)
    save_checkpoint(folder / "last.pt", {**run.state(), "description": description})


def share_buffers(network):
    """Give every process the batch-norm statistics of the first, so that all hold one network."""
    if world_size() > 1:
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, 0)
