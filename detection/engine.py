"""How a detector trains: from settings to a run, epoch by epoch, to the test of its last epoch. A stage script says
WHAT (its settings; LDSettings bring a teacher)."""

from dataclasses import dataclass
from pathlib import Path

import torch

from common.files import read_json_lines, remove_partials, save_checkpoint, sha256_of, write_json
from common.flags import check_output
from common.runtime import (
    UserError,
    autocast,
    device_name,
    library_versions,
    rank,
    resolve_device,
    run_script,
    say,
    seed_everything,
    start_processes,
    world_size,
)
from common.training import (
    TrainingRun,
    check_common_settings,
    is_resumed,
    resume,
    run_precision,
    to_device,
    train_epochs,
    trained_form,
)
from detection import pictures
from detection.assigners.atss import assign_batch
from detection.checkpoint import describe_model, describe_preprocessing
from detection.data.annotations import fingerprint, for_training, read_annotations
from detection.data.batches import AspectRatioBatchSampler, DetectionDataset, loader
from detection.data.records import Annotations
from detection.data.transforms import normalise
from detection.distillers.teacher import distil, load_teacher
from detection.evaluation import ap_of_run, read_test_annotations, test, test_only
from detection.geometry.anchors import make_anchors, pyramid_sizes
from detection.losses.gfl import gfl_losses
from detection.network.backbone import initialise
from detection.network.detector import Architecture, Detector
from detection.settings import LDSettings, data_name, identity, parse_settings

FLIP = 0.5  # probability that a training image is mirrored
WARMUP_RATIO = 0.001  # of the learning rate, where it starts
COCO_CLASSES = 80


def run_training(stage, settings, description, argv=None):
    """The main program of a stage script: parse the flags, then train and test, or only test. Exits the process."""
    run_script(lambda: _run(stage, parse_settings(stage, settings, description, argv)))


def _run(stage, settings):
    device = resolve_device(settings.device)
    start_processes(device)
    seed_everything(settings.seed)
    if settings.test_only:
        return test_only(settings, device)
    return train(stage, settings, device)


@dataclass(kw_only=True)
class DetectionRun(TrainingRun):
    """Everything that one training run of a detector holds."""

    train_annotations: Annotations
    test_annotations: Annotations
    teacher: torch.nn.Module | None  # frozen; not a part of the network

    def __post_init__(self):
        self.dataset = DetectionDataset(self.train_annotations)

    def batches(self):
        """The batches that are left of the epoch."""
        self.sampler.set_position(self.epoch, self.step)
        return loader(self.dataset, self.sampler, self.settings.workers, self.device)


# ---- before training -------------------------------------------------------------------------------------------------


def train(stage, settings, device):
    """Train a detector, keep `last.pt` for --resume and at the end `final.pt`, and test that: the last epoch, whatever
    the others would have scored on the test images."""
    folder = Path(settings.output)
    check_common_settings(settings)
    if settings.batch_size == world_size() and settings.long <= 32 and settings.init == "none":
        raise UserError(f"--batch-size {settings.batch_size}: leaves each process one image, whose last features are a "
                        "single pixel: nothing for batch norm to average; give a larger one, or larger images")
    to_train_on = for_training(read_annotations(settings.train, settings.images or None))
    if not any(len(record.labels) for record in to_train_on.records):
        raise UserError(f"{settings.train}: no object that can be trained on; python -m detection.check_data says more")
    to_test_on = read_test_annotations(settings, to_train_on.classes)
    precision, distils = run_precision(settings, device), isinstance(settings, LDSettings)
    mine = identity(stage, settings, precision, fingerprint(to_train_on),
                    **({"teacher_sha256": teacher_sha256(settings)} if distils else {}))
    if rank() == 0:
        check_output(settings, mine, f"images, boxes or classes than {settings.train} has")
    if settings.resume and (folder / "results.json").exists():
        say(f"{folder}: is finished already, see results.json there")
        return
    description = describe(stage, settings, to_train_on, mine, device)
    teacher = load_teacher(settings, description, device, precision) if distils else None
    run = start_run(stage, settings, to_train_on, to_test_on, description, teacher, device, precision)
    if rank() == 0:
        remove_partials(folder)
        if not (folder / "settings.json").exists():
            write_json(folder / "settings.json", {
                **mine, **{key: description[key] for key in ("dataset", "device", "processes", "versions")}})
    train_epochs(run, trained_form(run), run.batches, train_step, finish_epoch)
    if rank() == 0:
        pictures.draw_curves(read_json_lines(folder / "log.jsonl"), folder / "curves.png")
    test(settings, folder / "final.pt", device)


def teacher_sha256(settings):
    """Hexadecimal SHA-256 of the teacher's file: with another teacher it is another run."""
    if not Path(settings.teacher).is_file():
        raise UserError(f"--teacher {settings.teacher}: no such checkpoint; train one with python -m "
                        f"detection.train_gfl --output {Path(settings.teacher).parent}, or say where one is")
    return sha256_of(settings.teacher)


def describe(stage, settings, annotations, mine, device):
    """What the run's checkpoints say of themselves, plain values."""
    return {"stage": stage, "classes": list(annotations.classes), "model": describe_model(architecture(settings)),
            "preprocessing": describe_preprocessing(settings.short[1], settings.long), "epoch": 0,
            "dataset": data_name(settings.train), "settings": mine, "device": device_name(device),
            "processes": world_size(), "versions": library_versions()}


def architecture(settings):
    """The detector's Architecture that the settings name."""
    return Architecture(settings.depth, settings.channels, settings.tower_convs, settings.reg_max, settings.quality)


def start_run(stage, settings, to_train_on, to_test_on, description, teacher, device, precision):
    """A DetectionRun, new or resumed."""
    torch.manual_seed(settings.seed)  # again: whatever was read before, a teacher among it, the same weights to start
    frozen = settings.frozen and settings.init != "none"
    network = Detector(len(to_train_on.classes), architecture(settings), frozen)
    if not is_resumed(settings):
        said = initialise(network.backbone, settings.depth, settings.init)
        say(f"initialised: ResNet-{settings.depth} with {said}")
    network.to(device, memory_format=torch.channels_last)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=settings.lr, momentum=settings.momentum,
                                weight_decay=settings.weight_decay, fused=device.type in ("cpu", "cuda"))
    shapes = [(record.height, record.width) for record in to_train_on.records]
    sampler = AspectRatioBatchSampler(shapes, settings.batch_size, settings.seed, rank(), world_size(), settings.short,
                                      settings.long, FLIP, settings.repeat)
    run = DetectionRun(name=stage, settings=settings, device=device, precision=precision, network=network,
                       optimizer=optimizer, sampler=sampler, description=description,
                       train_annotations=to_train_on, test_annotations=to_test_on, teacher=teacher)
    say(f"stage {stage} on {description['dataset']}: {len(to_train_on.classes)} classes, {len(shapes)} images with "
        f"{sum(len(record.labels) for record in to_train_on.records)} objects to train on, {len(to_test_on.records)} "
        "images to test")
    short = "-".join(map(str, sorted(set(settings.short))))
    say(f"device {device_name(device)}; precision {precision}; seed {settings.seed}; batch {settings.batch_size} "
        f"({settings.batch_size // world_size()} on each of {world_size()} processes); lr "
        f"{settings.lr * settings.batch_size / 16:g}; short side {short}, long side at most {settings.long}; "
        f"{len(sampler)} steps an epoch")
    for note in notes(run):
        say(f"note: {note}")
    resume(run)
    return run


def notes(run):
    """In sentences, what of a run's settings does something else than its user may think."""
    settings, steps = run.settings, run.settings.epochs * len(run.sampler)
    if 2 * settings.warmup_steps > steps:
        yield (f"--warmup-steps {settings.warmup_steps} are most of the {steps} steps of the run; a tenth of them is "
               "plenty")
    late = [str(epoch) for epoch in settings.lr_steps if epoch > settings.epochs]
    if late:
        yield f"--lr-steps {','.join(late)} never come: the run has {settings.epochs} epochs"
    if not isinstance(settings, LDSettings):
        return
    images = settings.batch_size // world_size()
    if images > 3 and settings.ld_norm == "none":
        yield (f"LD's terms are sums over the {images} images of a process, and their weights are tuned for 2 or 3; "
               "lower --lambda-ld-main and --lambda-ld-vlr in proportion, or see --ld-norm")
    classes = run.network.num_classes
    if classes == 1 and (settings.lambda_kd_main or settings.lambda_kd_vlr):
        yield "with one class the classification's distillation is 0: its softmax has nothing to compare"
    elif settings.lambda_kd_main / classes > 2 * 10 / COCO_CLASSES:
        yield (f"the classification's distillation is a mean over the {classes} classes, and its weight of 10 was "
               f"tuned for {COCO_CLASSES}; as strong here is --lambda-kd-main {10 * classes / COCO_CLASSES:g}")


# ---- a step, an epoch ------------------------------------------------------------------------------------------------


def train_step(run, trained, batch):
    """One step. Returns the names of the loss terms and their values, (terms,).

    trained: `run.network`, or its form for training. batch: a data.Batch on the CPU."""
    device = run.device
    images, boxes, labels = to_device((batch.images, torch.cat(batch.boxes), torch.cat(batch.labels)), device)
    # Before the network is asked: what waits for the GPU here does not wait for the network.
    anchors = make_anchors(pyramid_sizes(*images.shape[2:]), device)
    targets = assign_batch(anchors, boxes, labels, [len(own) for own in batch.boxes], batch.sizes,
                           run.network.num_classes)
    images = normalise(images, batch.sizes).contiguous(memory_format=torch.channels_last)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.settings, run.epoch + 1, run.step, len(run.sampler))
    with autocast(device, run.precision):
        outputs = trained(images)
    losses = gfl_losses(outputs, targets, anchors, run.settings.box_loss)
    if run.teacher is not None:
        losses |= distil(run, images, outputs, targets, anchors)
    terms = torch.stack(list(losses.values()))
    run.optimizer.zero_grad(set_to_none=True)
    terms.sum().backward()
    if run.settings.clip:
        torch.nn.utils.clip_grad_norm_(run.network.parameters(), run.settings.clip)
    run.optimizer.step()
    return tuple(losses), terms.detach()


def learning_rate(settings, epoch, step, steps_per_epoch):
    """The learning rate of a step: lr * batch_size / 16, a tenth of it for each of lr_steps that has begun, and over
    the first warmup_steps steps rising linearly from WARMUP_RATIO of it. epoch counts from 1, step (in the epoch) from
    0."""
    base = settings.lr * settings.batch_size / 16 * 0.1 ** sum(epoch >= start for start in settings.lr_steps)
    done = (epoch - 1) * steps_per_epoch + step
    if done >= settings.warmup_steps:
        return base
    return base * (WARMUP_RATIO + (1 - WARMUP_RATIO) * done / settings.warmup_steps)


def finish_epoch(run, record):
    """Test the network if that is due, print the epoch's line, and keep the last epoch's weights."""
    settings = run.settings
    if settings.test_every and run.epoch % settings.test_every == 0:
        record.update(ap_of_run(run))
    fixed = ("epoch", "lr", "loss", "seconds", "images_per_second", "AP", "AP50", "AP75")
    terms = "".join(f"  {name} {value:.4f}" for name, value in record.items() if name not in fixed)
    tested = f"  AP {100 * record['AP']:.1f}  AP50 {100 * record['AP50']:.1f}" if record.get("AP") is not None else ""
    say(f"epoch {record['epoch']:>3}/{settings.epochs}  lr {record['lr']:.1e}  loss {record['loss']:.4f}{terms}{tested}"
        f"  {record['images_per_second']:.1f} images/s")
    run.description["epoch"] = run.epoch
    if run.epoch == settings.epochs:
        save_checkpoint(Path(settings.output) / "final.pt", {
            "model": run.network.state_dict(), "description": run.description})
