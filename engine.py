"""How one stage trains: from settings to a run, epoch by epoch, with checkpoints from which it goes on as if never
stopped, to the best epoch and its test. A stage script says WHAT (a `Stage` and its `Settings`)."""

import importlib.util
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import report
from dataset import GROUPS, fingerprint, network_input
from distillation import imitate, sums_by_class
from evaluation import evaluate, test, test_only
from files import append_json_line, remove_partials, save_checkpoint, write_json
from runtime import (
    Stopped,
    StopSignals,
    UserError,
    autocast,
    max_over_processes,
    rank,
    resolve_device,
    resolve_precision,
    run_script,
    say,
    seed_everything,
    start_processes,
    sum_over_processes,
    wait_for_all,
    world_size,
)
from settings import check_output, identity, parse_settings
from stage import read_lists
from training_run import describe_run, progress, save_last, share_buffers, start_run


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
    run.description = describe_run(run, mine)
    if rank() == 0:
        remove_partials(folder)
        if not (folder / "settings.json").exists():
            write_json(folder / "settings.json", {
                **mine, **{key: run.description[key] for key in ("dataset", "device", "processes", "versions")}})
    writer = None
    if settings.tensorboard and rank() == 0:
        from torch.utils.tensorboard import SummaryWriter  # an optional package

        writer = SummaryWriter(str(folder))
    trained = trained_form(run)
    with StopSignals() as signals:
        while run.epoch < settings.epochs:
            record = train_one_epoch(run, trained, signals)
            finish_epoch(run, record)
            report.log_epoch(record, settings, run, writer)
            received = max_over_processes(signals.received, device)
            if received:
                rest = "goes on from there" if run.epoch < settings.epochs else "tests the best"
                raise Stopped(f"stopped after {progress(run)}, kept in {folder}; the same command with --resume {rest}",
                              received)
    say(f"best epoch {run.best_epoch}: {settings.select} accuracy {run.best_accuracy:.4f}")
    wait_for_all()  # until the first process has written best.pt
    if rank() == 0:
        report.draw_curves(folder)
    test(stage, settings, run.data.info, run.data.classes, run.data.train.labels, run.data.test, folder / "best.pt",
         device)


def trained_form(run):
    """The network as it is trained: compiled if the settings say so, and wrapped where several processes train it."""
    network = run.network
    if run.settings.compile:
        # On a GPU a batch of 8 is bound by the launching of its kernels: a graph of them is launched at once.
        network = torch.compile(network, mode="reduce-overhead" if run.device.type == "cuda" else None)
    if world_size() > 1:
        network = DistributedDataParallel(network, [run.device] if run.device.type == "cuda" else None)
    return network


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
    if settings.feature_cache and stage.teachers and settings.teacher_batch_norm == "train":
        raise UserError("--feature-cache: teachers whose batch norm is in train mode give no image the same features "
                        "twice; give --teacher-batch-norm eval")
    if settings.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard: the package is not installed; pip install tensorboard")


def train_one_epoch(run, trained, signals):
    """One pass over the training images, or the rest of one. Returns the epoch's record for the log: losses by name,
    learning rate, time.

    trained: `run.network`, or its form for training. signals: StopSignals, heeded after a step. Raises UserError at a
    loss that is not finite, Stopped when a signal has come."""
    trained.train()
    settings, steps, unchecked = run.settings, len(run.sampler), []
    epoch, started = run.epoch + 1, time.perf_counter() - run.seconds
    bar = tqdm(run.sampler, desc=f"{run.stage.name} {epoch}/{settings.epochs}", leave=False, initial=run.step,
               disable=rank() > 0 or None)
    for indices in bar:  # drawn when asked for and not before: the last step may have changed the sampler's weights
        names, terms = train_step(run, trained, indices)
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


def train_step(run, trained, indices):
    """One step of a stage on training images. Returns the names of the loss terms and their values, (terms,).

    trained: `run.network`, or its form for training. indices: this process's share of the batch."""
    settings, device = run.settings, run.device
    images, labels = run.data.train.__getitems__(indices)
    # Drawn for the whole batch and then cut, so that the number of processes does not change what is flipped.
    flip = torch.rand(settings.batch_size, generator=run.flips)[rank()::world_size()] < 0.5
    targets = run.features.read(indices, flip) if run.features else {}
    groups = run.group_of_class[labels]
    images, labels, flip, *known = to_device((images, labels, flip, *targets.values()), device)
    run.optimizer.param_groups[0]["lr"] = learning_rate(settings, run.epoch + 1, run.step, len(run.sampler))
    losses = step_losses(run, trained, network_input(images, flip), labels, groups,
                         dict(zip(targets, known, strict=True)))
    terms = torch.stack([loss.mean() for loss in losses.values()])  # all weights are 1
    run.optimizer.zero_grad(set_to_none=True)
    terms.sum().backward()
    run.optimizer.step()
    if settings.sampler == "self-calibrated":
        by_class = sum_over_processes(sums_by_class(losses["mse_own"], labels, len(run.group_of_class)))
        run.sampler.update(*by_class.cpu())
    return tuple(losses), terms.detach()


def to_device(tensors, device):
    """CPU tensors on the device; to a GPU from pinned memory, so that the copies do not wait for the steps before."""
    if device.type == "cuda":
        tensors = [tensor.pin_memory() for tensor in tensors]
    return [tensor.to(device, non_blocking=True) for tensor in tensors]


def step_losses(run, trained, images, labels, groups, targets=None):
    """The losses of a batch by name, (B,) each: cross-entropy and those towards the teachers.

    images: (B, 1, H, W) float. labels: (B,) class ids. groups: (B,) on the CPU, 0 head, 1 middle, 2 tail. targets: the
    teachers' features by name, where they are known; else the teachers are asked."""
    with autocast(run.device, run.precision):
        logits, features = trained(images)  # (B, classes), (B, 1024, H/16, W/16)
        losses = {"cross_entropy": F.cross_entropy(logits.float(), labels, reduction="none")}
        if run.stage.targets:
            losses.update(imitate(features, targets or run.stage.targets(run.teachers, images, groups)))
    return losses


def look_around(run, names, unchecked, signals, started):
    """After a step: are the losses finite, is a checkpoint due, has a signal come? Raises UserError or Stopped.

    names: of the loss terms. unchecked: [(terms,)] of the steps since the last look at them; emptied. started: when the
    epoch began."""
    last_of_epoch = run.step == len(run.sampler)
    due = run.settings.save_steps and run.step % run.settings.save_steps == 0 and not last_of_epoch
    # To look at a value is to wait for the GPU: only where the sampler waits for it anyway, or now and then.
    # Several processes must look at the same steps, and often, as that is also where they agree to stop.
    together = world_size() > 1
    look = (due or last_of_epoch or run.settings.sampler == "self-calibrated"
            or len(unchecked) == (10 if together else 50) or (signals.received and not together))
    if look:
        check_finite(torch.stack(unchecked), names, run.stage, run.epoch + 1, run.step)
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
                        "of before are kept; try a lower --lr or --precision fp32")


def finish_epoch(run, record):
    """Choose the best epoch so far, and write log and checkpoints. Adds the accuracy to the epoch's record."""
    folder, select = Path(run.settings.output), run.settings.select
    run.epoch += 1
    share_buffers(run.network)
    confusion = evaluate(run.network, run.data.select, len(run.data.info.classes), run.device, run.precision)
    accuracy = record[f"{select}_accuracy"] = confusion.diag().sum().item() / confusion.sum().item()
    run.description.update(epoch=run.epoch, accuracy=accuracy)
    # Of equal epochs the later one: it has seen more, at a lower learning rate.
    if accuracy >= run.best_accuracy:
        run.best_accuracy, run.best_epoch = accuracy, run.epoch
        save_checkpoint(folder / "best.pt", {"model": run.network.state_dict(), "description": run.description})
    append_json_line(folder / "log.jsonl", record)
    save_last(run)
