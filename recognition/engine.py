"""The training of one stage, from its settings to the best epoch and its test. A stage script says WHAT to train: a
`Stage` and its `Settings`."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.charts import optional_picture
from common.files import save_checkpoint, sha256_of
from common.run_folder import RunFolder, check_output, is_finished, run_precision, say_finished
from common.runtime import (
    UserError,
    autocast,
    rank,
    resolve_device,
    run_script,
    say,
    seed_everything,
    start_processes,
    sum_over_processes,
    world_size,
)
from common.training import check_batch_norm_has_pixels, check_common_settings, to_device, train_epochs, trained_form
from dataset import GROUPS, fingerprint, network_input
from recognition import report
from recognition.distillation import imitate, sums_by_class
from recognition.evaluation import TestSet, evaluate, read_checkpoint, test, test_only
from recognition.losses import DRW_START, classification_loss
from recognition.run import Run, describe_run, start_run
from recognition.settings import (
    Settings,
    identity_of_run,
    judged_on,
    parse_settings,
    unused_settings,
    why_epochs_are_fixed,
)
from recognition.stage import Lists, Stage, read_lists, teacher_paths

DROWNED = 10  # times the classification loss: a distillation term above it drowns the labels
LEARNED = 0.3  # a classification loss below it: the labels are learned, whatever is far above it


def run_stage(stage: Stage, settings: Settings, description: str | None, argv: Sequence[str] | None = None) -> None:
    """The main program of a stage script: parse the flags, then train and test, or only test. Exits the process."""
    run_script(lambda: _run(stage, *parse_settings(stage, settings, description, argv)))


def _run(stage: Stage, settings: Settings, given: dict[str, Any]) -> int:
    device = resolve_device(settings.device)
    start_processes(device)
    seed_everything(settings.seed)
    if settings.test_only:
        return test_only(stage, settings, given, device)
    train(stage, settings, device)
    return 0


# ---- training --------------------------------------------------------------------------------------------------------


def train(stage: Stage, settings: Settings, device: torch.device) -> None:
    """Train a stage, write `last.pt` and `best.pt`, then test the best epoch."""
    folder = Path(settings.output)
    precision, lists, identity = check_run(stage, settings, device)
    if is_finished(settings):
        say_finished(settings)
        return
    with RunFolder(settings) as run_folder:
        run = start_run(stage, settings, lists, device, precision)
        run.description = describe_run(run, identity)
        run_folder.record(identity, run.description)
        train_epochs(run, trained_form(run, settings.compile), lambda: run.sampler, train_step, finish_epoch)
        chosen = "last" if settings.select == "last" else "best"
        say(f"{chosen} epoch {run.best_epoch}: {judged_on(settings)} accuracy {run.best_accuracy:.4f}")
        if rank() == 0:
            with optional_picture(folder / "curves.png"):
                report.draw_curves(folder)
        data = run.data
        checkpoint = read_checkpoint(folder / "best.pt", data.info)
        test(stage, settings, checkpoint, TestSet(data.info, data.classes, data.test, data.train.labels), device)


def check_run(stage: Stage, settings: Settings, device: torch.device) -> tuple[str, Lists, dict[str, Any]]:
    """Raise UserError for settings that cannot work, and for an --output that holds another run. Returns the precision,
    the `Lists`, and the `identity_of_run`."""
    check_possible(stage, settings)
    lists, precision = read_lists(stage, settings), run_precision(settings, device)
    # Absent teachers are an error of `start_run`; a finished run needs them no more.
    teachers = {name: sha256_of(path) for name, path in teacher_paths(stage, settings).items() if path.is_file()}
    identity = identity_of_run(stage.name, settings, precision, fingerprint(lists.info, lists.by_split()), teachers)
    if rank() == 0:
        check_output(settings, identity, f"lists, classes or groups than {settings.data_root} has",
                     unused_settings(stage), why_epochs_are_fixed(settings))
    return precision, lists, identity


def check_possible(stage: Stage, settings: Settings) -> None:
    """Raise UserError for settings that cannot work with any data, before data is read."""
    check_common_settings(settings)
    check_batch_norm_has_pixels(settings, settings.image_size)
    if settings.sampler == "self-calibrated" and not settings.distillation:
        raise UserError("--sampler self-calibrated: needs the distillation losses; --no-distillation leaves none; give "
                        "--sampler class-aware")
    if settings.sampler == "self-calibrated" and len(stage.teachers) < len(GROUPS):
        raise UserError(f"--sampler self-calibrated: needs the losses of three teachers; {stage.name} has "
                        f"{len(stage.teachers)}")
    if settings.feature_cache and stage.teachers and settings.teacher_batch_norm in ("train", "own"):
        raise UserError("--feature-cache: teachers that normalise by a batch's statistics give no image the same "
                        "features twice; give --teacher-batch-norm recalibrated")


def train_step(run: Run, trained: torch.nn.Module, indices: list[int]) -> tuple[tuple[str, ...], torch.Tensor]:
    """One step of a stage on training images. Returns the names of the loss terms and their values, (terms,).

    trained: `run.network` in its form for training. indices: this process's share of the batch."""
    settings, device = run.settings, run.device
    if settings.train == "classifier":
        trained.eval()  # frozen is frozen: batch norm too
    images, labels = run.data.train.__getitems__(indices)
    flip, turns = draw_symmetries(run)
    targets = run.features.read(indices, flip, turns) if run.features else {}
    groups = run.group_of_class[labels]
    images, labels, flip, turns, *known = to_device((images, labels, flip, turns, *targets.values()), device)
    run.optimizer.param_groups[0]["lr"] = learning_rate(settings, run.epoch + 1, run.step, len(run.sampler))
    images = network_input(images, flip, turns if settings.augment == "dihedral" else None)
    losses = step_losses(run, trained, images, labels, groups, dict(zip(targets, known, strict=True)))
    weights = {name: 1.0 if name == loss_term(settings) else settings.distillation_weight for name in losses}
    terms = torch.stack([weights[name] * loss.mean() for name, loss in losses.items()])
    run.optimizer.zero_grad(set_to_none=True)
    terms.sum().backward()
    run.optimizer.step()
    if settings.sampler == "self-calibrated":
        by_class = sum_over_processes(sums_by_class(losses["mse_own"], labels, len(run.group_of_class)))
        run.sampler.update(*by_class.cpu())
    return tuple(losses), terms.detach()


def draw_symmetries(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """How this process's share of a batch is augmented: (B,) bool, mirrored or not, and (B,) int64, quarter turns."""
    # Drawn for the whole batch and then cut, so that the number of processes does not change what is drawn.
    count = run.settings.batch_size
    flip, turns = torch.rand(count, generator=run.flips) < 0.5, torch.zeros(count, dtype=torch.int64)
    if run.settings.augment == "dihedral":
        turns = torch.randint(4, (count,), generator=run.flips)
    return flip[rank()::world_size()], turns[rank()::world_size()]


def step_losses(run: Run, trained: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, groups: torch.Tensor,
                targets: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The losses of a batch by name, (B,) each: the classification loss, and those of distillation.

    images: (B, 1, H, W) float. labels: (B,) class ids. groups: (B,) on the CPU, 0 head, 1 middle, 2 tail. targets: the
    teachers' features by name; None or empty to compute them."""
    with autocast(run.device, run.precision):
        logits, features = trained(images)  # (B, classes), (B, 1024, H/16, W/16)
        reweighted = run.epoch >= DRW_START * run.settings.epochs
        losses = {loss_term(run.settings): classification_loss(run.settings.loss, logits, labels, run.class_counts,
                                                               reweighted)}
        if run.teachers:
            whole_batch = run.settings.teacher_batch_norm == "train"
            losses.update(imitate(features, targets or run.stage.targets(run.teachers, images, groups, whole_batch)))
    return losses


def loss_term(settings: Settings) -> str:
    """The name of the classification loss in logs."""
    return settings.loss.replace("-", "_")


def learning_rate(settings: Settings, epoch: int, step: int, steps_per_epoch: int) -> float:
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


def finish_epoch(run: Run, record: dict[str, Any]) -> None:
    """Choose the best epoch so far. Adds the accuracy to the epoch's record, and prints the record."""
    folder, select = Path(run.settings.output), run.settings.select
    network = run.published_network()
    confusion = evaluate(network, run.data.select, len(run.data.info.classes), run.device, run.precision)
    accuracy = record[f"{judged_on(run.settings)}_accuracy"] = confusion.diag().sum().item() / confusion.sum().item()
    run.description.update(epoch=run.epoch, accuracy=accuracy)
    # Of equal epochs the later one: it has seen more, at a lower learning rate.
    if accuracy >= run.best_accuracy or select == "last":
        run.best_accuracy, run.best_epoch = accuracy, run.epoch
        save_checkpoint(folder / "best.pt", {"model": network.state_dict(), "description": run.description})
    report.log_epoch(record, run)
    warn_of_drowned_labels(run, record)


def warn_of_drowned_labels(run: Run, record: dict[str, Any]) -> None:
    """Print one line, once a run, if a distillation term of an epoch is far above the classification loss."""
    labels = record[loss_term(run.settings)]
    for name, value in record.items():
        if name.startswith("mse_") and value > DROWNED * labels > DROWNED * LEARNED and not run.warned:
            run.warned = True
            say(f"note: {name} is {value / labels:.0f} times the classification loss, so this stage learns "
                "to imitate and hardly from the labels; usual reasons: teachers that normalise by other statistics "
                "than this network (give --teacher-batch-norm train), or started from another --init")
