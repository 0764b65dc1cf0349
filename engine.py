"""How one stage runs: data, network, teachers, training with checkpoints, selection of the best epoch, and the test.

A stage script says WHAT (a `Stage` and its `Settings`); everything here is the same for all of them."""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import report
from ClassAwareSampler import ClassAwareBatchSampler, SelfCalibratedBatchSampler, ShuffledBatchSampler
from dataset import (
    GROUPS,
    ImageCache,
    ImageDataset,
    batch_loader,
    class_counts,
    describe,
    network_input,
    read_info,
    read_split,
)
from distillation import freeze, sums_by_class
from resnet50 import ResNet50, initialise, load_network
from runtime import (
    UserError,
    append_json_line,
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
    sha256_of,
    start_processes,
    sum_over_processes,
    world_size,
    write_json,
)
from settings import check_output, identity, parse_settings

SCRIPTS = {"baseline": "baseline_resnet50.py", "t1": "baseline_cl_t1.py", "t2": "baseline_cl_t2.py",
           "t3": "baseline_cl_t3.py", "student": "baseline_cl_s_weight.py"}


@dataclass(frozen=True)
class Stage:
    """What a stage is.

    name: also the name of its folder. group: the classes it is trained and tested on: `head`, `middle`, `tail`, `all`.
    teachers: the stages that teach it. imitate: the function of `distillation` that gives the losses towards them."""

    name: str
    group: str
    teachers: tuple = ()
    imitate: Callable | None = None


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


# ---- data and networks -----------------------------------------------------------------------------------------------


@dataclass
class Data:
    """A stage's data sets: `train` to learn from, `select` to choose the epoch on, `test` to report on."""

    info: object
    classes: list
    train: ImageDataset
    select: ImageDataset
    test: ImageDataset


def load_data(stage, settings, training=True):
    """Read the lists, build or open the cache, keep the stage's classes.

    Raises UserError for what would make training wrong: a group without classes, a class without training images, fewer
    images than a batch, no held-out part to select on."""
    info = read_info(settings.data_root)
    group = list(range(len(info.classes))) if stage.group == "all" else sorted(info.groups[stage.group])
    path = info.root / "dataset.json"
    for needed in GROUPS if stage.name == "student" else (stage.group,):
        if needed != "all" and not info.groups[needed]:
            raise UserError(f"{path}: the group '{needed}' holds no class, and stage {stage.name} needs one; make the "
                            "data set with other --head-min and --tail-max")
    splits = {split: read_split(info, split) for split in ("train", "val", "test")}
    if training and settings.select == "val" and not splits["val"]:
        raise UserError(f"{info.root / 'val.txt'}: no held-out part to choose the best epoch on; make the data set "
                        "with --val-fraction, or give --select test (the authors' protocol)")
    if settings.select == "test":
        splits["train"], splits["val"] = splits["train"] + splits["val"], splits["test"]
    everything = [sample for split in splits.values() for sample in split]
    cache = ImageCache(info.images, everything, settings.image_size, info.root / "cache")
    parts = [ImageDataset(cache, [sample for sample in splits[split] if sample.label in set(group)])
             for split in ("train", "val", "test")]
    data = Data(info, group, *parts)
    counts = class_counts(data.train.labels, len(info.classes))
    if training:
        for class_id in group:
            if counts[class_id] == 0:
                raise UserError(f"{info.root / 'train.txt'}: class {class_id} ({info.classes[class_id]}) has no "
                                "training image; add some, or take the class out of the data set")
        if len(data.train) < settings.batch_size:
            raise UserError(f"{info.root / 'train.txt'}: stage {stage.name} has {len(data.train)} training images, "
                            f"fewer than a batch of {settings.batch_size}; give a smaller --batch-size")
        if not len(data.select):
            raise UserError(f"{info.root}: no image of the classes of {stage.name} to choose the best epoch on")
    if not len(data.test):
        raise UserError(f"{info.root / 'test.txt'}: no image of the classes of stage {stage.name}")
    return data


def checkpoint_beside(settings, name):
    """Where the stage scripts put the best checkpoint of stage `name` of the same run."""
    return Path(settings.output).parent / name / "best.pt"


def require(path, name, flag):
    """Raise UserError saying how to get the checkpoint of stage `name` if `path` is absent."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no checkpoint of {name} here; run {SCRIPTS[name]} first, or say where it is with "
                        f"{flag}")


def check_classes(description, info, path):
    """Raise UserError where a checkpoint was trained for other classes, or the same in another order."""
    for class_id, (theirs, ours) in enumerate(zip(description["classes"], info.classes, strict=True)):
        if theirs != ours:
            raise UserError(f"{path}: its class {class_id} is {theirs!r}, that of {info.root / 'dataset.json'} is "
                            f"{ours!r}; expected the same classes in the same order")


def load_teacher(name, settings, info, device):
    """The frozen teacher of stage `name`, from its flag or from the folder beside this stage's output."""
    path = getattr(settings, name) or checkpoint_beside(settings, name)
    require(path, name, f"--{name}")
    teacher, description = load_network(path, len(info.classes))
    if description:
        check_classes(description, info, path)
    say(f"teacher {name}: {path}" + (f", epoch {description['epoch']}" if description else ""))
    teacher = freeze(teacher, settings.teacher_batch_norm)
    return teacher.to(device, memory_format=torch.channels_last)


def make_sampler(stage, settings, dataset, num_classes):
    """The batch sampler that the settings name, over `dataset`."""
    arguments = (dataset.labels, settings.batch_size, settings.seed, rank(), world_size())
    if settings.sampler == "shuffled":
        return ShuffledBatchSampler(*arguments)
    if settings.sampler == "class-aware":
        return ClassAwareBatchSampler(*arguments)
    if len(stage.teachers) < 3:
        raise UserError(f"--sampler self-calibrated: needs the losses of three teachers; {stage.name} has "
                        f"{len(stage.teachers)}")
    return SelfCalibratedBatchSampler(*arguments, num_classes=num_classes, momentum=settings.calibration_momentum)


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


# ---- training --------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a training run carries from step to step; `state` and `restore` are its checkpoint."""

    network: ResNet50
    optimizer: torch.optim.Optimizer
    sampler: object
    flips: torch.Generator
    epoch: int = 0  # epochs finished
    best_epoch: int = 0
    best_accuracy: float = -1.0

    def state(self):
        return {"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict(),
                "sampler": self.sampler.state_dict(), "flips": self.flips.get_state(),
                "torch_random": torch.get_rng_state(), "epoch": self.epoch, "best_epoch": self.best_epoch,
                "best_accuracy": self.best_accuracy}

    def restore(self, state):
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])
        self.flips.set_state(state["flips"])
        torch.set_rng_state(state["torch_random"])
        self.epoch, self.best_epoch = state["epoch"], state["best_epoch"]
        self.best_accuracy = state["best_accuracy"]


def train(stage, settings, device):
    """Train a stage, keep `last.pt` and `best.pt`, then test the best. Returns None (exit status 0)."""
    folder = Path(settings.output)
    precision = resolve_precision(settings.precision, device)
    if settings.batch_size % world_size():
        raise UserError(f"--batch-size {settings.batch_size}: not a multiple of the {world_size()} processes")
    if rank() == 0:
        check_output(stage.name, settings)
    if settings.resume and (folder / "results.json").exists():
        say(f"{folder}: is finished already, see results.json there")
        return
    data = load_data(stage, settings)
    num_classes = len(data.info.classes)
    teachers = {name: load_teacher(name, settings, data.info, device) for name in stage.teachers}
    sampler = make_sampler(stage, settings, data.train, num_classes)
    network = ResNet50(num_classes)
    init = settings.init
    if init == "baseline":
        init = str(checkpoint_beside(settings, "baseline"))
        require(init, "baseline", "--init (none, imagenet or a file)")
    if not (settings.resume and (folder / "last.pt").exists()):
        say(f"initialised: {initialise(network, init)}")
    network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=settings.lr, momentum=settings.momentum,
                                weight_decay=settings.weight_decay, fused=device.type in ("cpu", "cuda"))
    run = Run(network, optimizer, sampler, torch.Generator().manual_seed(settings.seed + 1))
    if rank() == 0 and not (folder / "settings.json").exists():
        write_json(folder / "settings.json", identity(stage.name, settings))
    if settings.resume and (folder / "last.pt").exists():
        run.restore(load_checkpoint(folder / "last.pt"))
        trim_log(folder / "log.jsonl", run.epoch)
        say(f"resumed: {folder / 'last.pt'}, {run.epoch} of {settings.epochs} epochs done")
    describe_run(stage, settings, data, device, precision)

    description = {"stage": stage.name, **describe(data.info), "preprocessing": {
        "channels": 1, "image_size": settings.image_size, "resize": "bicubic", "mean": 0.5, "std": 0.5},
        "settings": identity(stage.name, settings), "precision": precision, "selected_on": settings.select,
        "versions": library_versions()}
    trained = network
    if world_size() > 1:
        trained = DistributedDataParallel(network, [device] if device.type == "cuda" else None)
    writer = open_tensorboard(folder) if settings.tensorboard and rank() == 0 else None
    while run.epoch < settings.epochs:
        record = train_one_epoch(stage, settings, run, trained, teachers, data, device, precision)
        run.epoch += 1
        share_buffers(network)
        confusion = evaluate(network, data.select, num_classes, device, precision)
        accuracy = confusion.diag().sum().item() / confusion.sum().item()
        record[f"{settings.select}_accuracy"] = accuracy
        # Of equal epochs the later one: it has seen more, at a lower learning rate.
        if accuracy >= run.best_accuracy:
            run.best_accuracy, run.best_epoch = accuracy, run.epoch
            save_checkpoint(folder / "best.pt", {"model": network.state_dict(), "description": {
                **description, "epoch": run.epoch, "accuracy": accuracy}})
        append_json_line(folder / "log.jsonl", record)
        save_checkpoint(folder / "last.pt", run.state())
        report.log_epoch(record, settings, run, writer)
    say(f"best epoch {run.best_epoch}: {settings.select} accuracy {run.best_accuracy:.4f}")
    if rank() == 0:
        report.draw_curves(folder)
    best, description = load_network(folder / "best.pt", num_classes)
    best.to(device, memory_format=torch.channels_last)
    test(stage, settings, data, best, description, folder / "best.pt", device)


def describe_run(stage, settings, data, device, precision):
    """Print what is about to run."""
    name = data.info.name
    say(f"stage {stage.name} on {name}: {len(data.classes)} classes ({stage.group}), {len(data.train)} images to train "
        f"on, {len(data.select)} to select on ({settings.select}), {len(data.test)} to test")
    say(f"device {device_name(device)}; precision {precision}; seed {settings.seed}; batch {settings.batch_size} "
        f"({settings.batch_size // world_size()} on each of {world_size()} processes); lr {settings.lr:g}, "
        f"{settings.schedule}")
    if settings.schedule == "steps" and settings.lr_steps and min(settings.lr_steps) > settings.epochs:
        say(f"note: none of --lr-steps {','.join(map(str, settings.lr_steps))} falls within {settings.epochs} epochs; "
            "for a short run consider --schedule one-cycle")


def train_one_epoch(stage, settings, run, trained, teachers, data, device, precision):
    """One pass over the training images. Returns the epoch's record for the log: losses by name, learning rate, time.

    trained: `run.network`, or its wrapper for several processes. Raises UserError at a loss that is not finite."""
    trained.train()
    epoch, started, steps = run.epoch + 1, time.perf_counter(), len(run.sampler)
    group_of_class = data.info.group_of_class()
    sums, previous, names = None, None, ()
    loader = batch_loader(data.train, run.sampler, device)
    bar = tqdm(loader, desc=f"{stage.name} {epoch}/{settings.epochs}", total=steps, leave=False, disable=rank() or None)
    for step, (images, labels) in enumerate(bar):
        # Drawn for the whole batch and then cut, so that the number of processes does not change what is flipped.
        flip = torch.rand(settings.batch_size, generator=run.flips)[rank()::world_size()] < 0.5
        groups = group_of_class[labels]
        images, labels, flip = (part.to(device, non_blocking=True) for part in (images, labels, flip))
        images = network_input(images, flip)
        for parameters in run.optimizer.param_groups:
            parameters["lr"] = learning_rate(settings, epoch, step, steps)
        with autocast(device, precision):
            logits, features = trained(images)
            losses = {"cross_entropy": F.cross_entropy(logits.float(), labels, reduction="none")}
            if stage.imitate:
                losses.update(stage.imitate(teachers, images, groups, features))
        terms = torch.stack([loss.mean() for loss in losses.values()])  # all weights are 1
        run.optimizer.zero_grad(set_to_none=True)
        terms.sum().backward()
        run.optimizer.step()
        if settings.sampler == "self-calibrated":
            by_class = sum_over_processes(sums_by_class(losses["mse_own"], labels, len(data.info.classes))).cpu()
            run.sampler.update(*by_class)
        # Read one step late: by then the value is there, and a GPU need not be waited for.
        names, terms = tuple(losses), terms.detach()
        check_finite(previous, names, stage, epoch, step - 1)
        previous = terms
        sums = terms if sums is None else sums + terms
    check_finite(previous, names, stage, epoch, steps - 1)
    means = (sum_over_processes(sums) / world_size() / steps).tolist()
    seconds = time.perf_counter() - started
    return {"epoch": epoch, "lr": run.optimizer.param_groups[0]["lr"], "loss": sum(means),
            **dict(zip(names, means, strict=True)), "seconds": round(seconds, 3),
            "images_per_second": round(steps * settings.batch_size / seconds, 1)}


def check_finite(terms, names, stage, epoch, step):
    """Raise UserError naming the loss term that is not finite. terms: (len(names),), or None before the first step."""
    if terms is not None and not math.isfinite(terms.sum().item()):
        bad = ", ".join(f"{name} is {value}" for name, value in zip(names, terms.tolist(), strict=True)
                        if not math.isfinite(value))
        raise UserError(f"stage {stage.name}, epoch {epoch}, step {step + 1}: {bad or 'the loss is not finite'}; the "
                        "checkpoints of the last good epoch are kept; try a lower --lr or --precision fp32")


def share_buffers(network):
    """Give every process the batch-norm statistics of the first, so that all hold one network."""
    if world_size() > 1:
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, 0)


def trim_log(path, epochs):
    """Drop the lines of epochs that the checkpoint to resume from does not hold."""
    if rank() == 0 and path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:epochs]), encoding="utf-8")


def open_tensorboard(folder):
    """A TensorBoard writer into `folder`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard: the package is not installed; pip install tensorboard") from None
    return SummaryWriter(str(folder))


# ---- test ------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(network, dataset, num_classes, device, precision, batch_size=64):
    """Confusion matrix of `network` over `dataset`, (true classes, predicted classes) int64 on the CPU.

    With several processes each takes a share; every image counts once. Leaves the network in eval mode."""
    network.eval()
    share = range(rank(), len(dataset), world_size())
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
    for start in range(0, len(share), batch_size):
        images, labels = dataset.__getitems__(list(share[start:start + batch_size]))
        with autocast(device, precision):
            logits, _ = network(network_input(images.to(device)))
        pairs = labels.to(device) * num_classes + logits.argmax(1)
        confusion += torch.bincount(pairs, minlength=num_classes * num_classes)
    return sum_over_processes(confusion).view(num_classes, num_classes).cpu()


def test(stage, settings, data, network, description, weights, device):
    """Test a network on the test part, print the table, write results.json, results.txt and confusion.png into
    `settings.output`. Returns the results on the first process, None on the others.

    The precision `auto` is fp32 here: a number that is compared with a published one should not hang on the machine."""
    precision = "fp32" if settings.precision == "auto" else settings.precision
    confusion = evaluate(network, data.test, len(data.info.classes), device, precision)
    if rank() != 0:
        return None
    description = description or {}
    train_counts = class_counts(data.train.labels, len(data.info.classes))
    results = {
        "dataset": data.info.name, "split": "test", "stage": description.get("stage", stage.name),
        "classes_of": stage.group, "selected_on": description.get("selected_on", "unknown"),
        "epoch": description.get("epoch"), "weights": str(weights), "weights_sha256": sha256_of(weights),
        **report.accuracies(confusion, data.info, data.classes, train_counts),
        **measure(network, settings.image_size, device, precision), "image_size": settings.image_size,
        "device": device_name(device), "precision": precision, "versions": library_versions(),
        "confusion": confusion.tolist(),
    }
    report.write_results(Path(settings.output), results)
    return results


def test_only(stage, settings, given, device):
    """`--test-only`: test a checkpoint of this project or released weights. Returns the exit status."""
    path = Path(settings.weights or Path(settings.output) / "best.pt")
    run_here = (Path(settings.output) / "settings.json").exists()
    if settings.weights and run_here and path.resolve().parent != Path(settings.output).resolve():
        raise UserError(f"{settings.output}: holds a run of its own; give another --output for the test of {path}")
    info = read_info(settings.data_root)
    network, description = load_network(path, len(info.classes))
    if description:
        check_classes(description, info, path)
        settings = dataclasses.replace(settings, select=description["selected_on"])
        if "image_size" not in given:
            settings = dataclasses.replace(settings, image_size=description["preprocessing"]["image_size"])
    data = load_data(stage, settings, training=False)
    say(f"testing {path} on {info.name}: {len(data.test)} images at {settings.image_size}x{settings.image_size}")
    network.to(device, memory_format=torch.channels_last)
    results = test(stage, settings, data, network, description, path, device)
    if results and settings.expect_accuracy is not None:
        found = round(100 * results["overall"], 2)
        if abs(found - settings.expect_accuracy) > 0.005:
            say(f"expected an overall accuracy of {settings.expect_accuracy:.2f} per cent, found {found:.2f}")
            return 1
        say(f"the overall accuracy is {found:.2f} per cent, as expected")
    return 0


@torch.inference_mode()
def measure(network, image_size, device, precision, batch_size=8, repeats=5):
    """Parameters, FLOPs of one image (2 a multiply-add, convolutions and linear layers) and the milliseconds that an
    image takes in a batch of 8 (median of 5 batches after one to warm up)."""
    from torch.utils.flop_counter import FlopCounterMode

    network.eval()
    images = torch.zeros(batch_size, 1, image_size, image_size, device=device)
    with FlopCounterMode(display=False) as counter:
        network(images[:1])
    seconds = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        with autocast(device, precision):
            network(images)[0].float().cpu()  # the copy waits for the device
        seconds.append(time.perf_counter() - started)
    return {"parameters": sum(parameter.numel() for parameter in network.parameters()),
            "flops": counter.get_total_flops(),
            "ms_per_image": round(1000 * sorted(seconds[1:])[repeats // 2] / batch_size, 3),
            "ms_per_image_batch": batch_size}
