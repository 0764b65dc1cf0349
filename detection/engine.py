"""How a detector trains: from settings to a run, epoch by epoch, to the test of its last epoch. A stage script says
what: a `Method` and its settings."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common.charts import optional_picture
from common.files import read_json_lines, save_checkpoint, sha256_of
from common.images import ValueRange, value_range_entry, value_range_of, value_range_text
from common.run_folder import RunFolder, check_output, is_finished, is_resumed, run_precision, say_finished
from common.runtime import (
    UserError,
    autocast,
    device_name,
    library_versions,
    of_first_process,
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
    check_batch_norm_has_pixels,
    check_common_settings,
    resume,
    sgd,
    to_device,
    train_epochs,
    trained_form,
)
from detection import pictures
from detection.assigners.targets import ground_truth
from detection.checkpoint import describe_model, describe_preprocessing, initialise_detector, load_detector
from detection.data.annotations import check_apart, fingerprint, for_training, read_annotations
from detection.data.batches import AspectRatioBatchSampler, Batch, DetectionDataset, loader
from detection.data.records import Annotations
from detection.data.transforms import normalise
from detection.evaluation import ap_of_run, read_test_annotations, settings_of_test, test, test_only
from detection.geometry.anchors import pyramid_sizes
from detection.methods.method import Method, Step
from detection.network.backbone import initialise
from detection.network.detector import Detector
from detection.settings import Settings, data_name, identity_of_run, parse_settings

FLIP = 0.5  # probability that a training image is mirrored
WARMUP_RATIO = 0.001  # of the learning rate, where it starts


def run_stage(method: Method, settings: Settings, description: str | None, argv: Sequence[str] | None = None) -> None:
    """The main program of a stage script: parse the flags, then train and test, or only test. Exits the process."""
    run_script(lambda: _run(method, parse_settings(method.name, settings, description, argv)))


def _run(method: Method, settings: Settings) -> None:
    device = resolve_device(settings.device)
    start_processes(device)
    seed_everything(settings.seed)
    if settings.test_only:
        return test_only(settings, device)
    return train(method, settings, device)


class Trainee(torch.nn.Module):
    """The trained networks: the published one, and the companions that its method trains beside it."""

    def __init__(self, student: torch.nn.Module, companions: dict[str, torch.nn.Module], forward: Callable[..., Any]):
        super().__init__()
        self.student, self.companions, self.forward_of_method = student, torch.nn.ModuleDict(companions), forward

    def forward(self, images: torch.Tensor, teacher: Any) -> Any:
        """The outputs of the method's `forward`. images: (N, 3, H, W), normalised. teacher: the teacher's outputs."""
        return self.forward_of_method(self.student, self.companions, images, teacher)


@dataclass(kw_only=True)
class Run(TrainingRun):
    """The state of one training run of a detector."""

    method: Method
    train_annotations: Annotations
    test_annotations: Annotations
    teacher: torch.nn.Module | None  # frozen; not a part of what is trained
    companions: dict[str, torch.nn.Module] = field(default_factory=dict)  # trained beside the published one, by name
    value_range: ValueRange | None = None  # of images of more than 8 bits

    def __post_init__(self) -> None:
        self.dataset = DetectionDataset(self.train_annotations, self.value_range)
        self._trainee = Trainee(self.network, self.companions, self.method.forward)

    @property
    def trainee(self) -> Trainee:
        return self._trainee

    def batches(self) -> Iterable[Batch]:
        """The batches that are left of the epoch."""
        self.sampler.set_position(self.epoch, self.step)
        return loader(self.dataset, self.sampler, self.settings.workers, self.device)

    @property
    def detectors(self) -> dict[str, Detector]:
        """{folder below the output: detector} of all that are kept and tested: the published one, "", comes last."""
        return {**{name: each for name, each in self.companions.items() if isinstance(each, Detector)},
                "": self.network}

    def more_state(self) -> dict[str, Any]:
        return {"companions": self.trainee.companions.state_dict()} if self.companions else {}

    def restore_more(self, state: dict[str, Any]) -> None:
        if self.companions:
            self.trainee.companions.load_state_dict(state["companions"])


# ---- before training -------------------------------------------------------------------------------------------------


def train(method: Method, settings: Settings, device: torch.device) -> None:
    """Train a detector, keep `last.pt` for --resume and at the end `final.pt`, and test that: the last epoch, whatever
    the others would have scored on the test images."""
    folder = Path(settings.output)
    check_common_settings(settings)
    kind = method.architecture(settings).kind
    settings = settings_of_test(settings, kind)
    if not settings.starts_frozen:  # else batch norm keeps its statistics
        check_batch_norm_has_pixels(settings, settings.long)
    train_annotations = for_training(read_annotations(settings.train, settings.images or None,
                                                      oriented=kind.oriented))
    if not any(len(record.labels) for record in train_annotations.records):
        raise UserError(f"{settings.train}: no object that can be trained on; python -m detection.check_data says more")
    test_annotations = read_test_annotations(settings, train_annotations.classes)
    check_apart(train_annotations, test_annotations)
    precision = run_precision(settings, device)
    more = {"value_range": train_value_range(settings, train_annotations)}
    if method.load_teacher:
        more["teacher_sha256"] = teacher_sha256(method, settings)
    identity = identity_of_run(method.name, settings, precision, fingerprint(train_annotations), **more)
    if rank() == 0:
        check_output(settings, identity, f"images, boxes or classes than {settings.train} has")
    if is_finished(settings):
        say_finished(settings)
        return
    with RunFolder(settings) as run_folder:
        run = start_run(method, settings, train_annotations, test_annotations, identity, device, precision)
        run_folder.record(identity, run.description)
        train_epochs(run, trained_form(run), run.batches, train_step, finish_epoch)
        if rank() == 0:
            with optional_picture(folder / "curves.png") as path:
                pictures.draw_curves(read_json_lines(folder / "log.jsonl"), path)
        for name in run.detectors:
            weights = folder / name / "final.pt"
            test(dataclasses.replace(settings, output=str(folder / name)), weights, *load_detector(weights),
                 test_annotations, device)


def train_value_range(settings: Settings, annotations: Annotations) -> list[int] | None:
    """The `value_range_of` the images to train on, found by the first process, as metadata has it."""
    files = [record.path for record in annotations.records] if rank() == 0 else []
    value_range = of_first_process(value_range_of(files, settings.value_range, settings.workers or 1))
    if value_range:
        say(value_range_text(value_range))
    return value_range_entry(value_range).get("value_range")


def teacher_sha256(method: Method, settings: Any) -> str:
    """Hexadecimal SHA-256 of the teacher's file: with another teacher it is another run."""
    if not Path(settings.teacher).is_file():
        raise UserError(f"--teacher {settings.teacher}: no such checkpoint; train one with python -m detection.train_"
                        f"{method.architecture(settings).head} --output {Path(settings.teacher).parent}, or say where "
                        "one is")
    return sha256_of(settings.teacher)


def describe_run(method: Method, settings: Settings, annotations: Annotations, identity: dict[str, Any],
                 device: torch.device) -> dict[str, Any]:
    """The metadata of the run's checkpoints, plain values. annotations: those to train on."""
    return {"stage": method.name, "classes": list(annotations.classes),
            "model": describe_model(method.architecture(settings)),
            "preprocessing": describe_preprocessing(settings.short[1], settings.long, identity["value_range"]),
            "epoch": 0,
            "dataset": data_name(settings.train), "settings": identity, "device": device_name(device),
            "processes": world_size(), "versions": library_versions()}


def start_run(method: Method, settings: Settings, train_annotations: Annotations, test_annotations: Annotations,
              identity: dict[str, Any], device: torch.device, precision: str) -> Run:
    """A Run, new or resumed."""
    description = describe_run(method, settings, train_annotations, identity, device)
    teacher = method.load_teacher(settings, description, device, precision) if method.load_teacher else None
    torch.manual_seed(settings.seed)  # again: the same weights to start from, whatever was read before
    num_classes = len(train_annotations.classes)
    network = Detector(num_classes, method.architecture(settings), settings.starts_frozen)
    if not is_resumed(settings):
        say("initialised: " + (
            initialise_detector(network, train_annotations.classes, settings.init_detector) if settings.init_detector
            else f"{network.backbone.name} with {initialise(network.backbone, settings.init)}"))
    companions = method.companions(num_classes, settings)
    for trained in (network, *companions.values()):
        trained.to(device, memory_format=torch.channels_last)
    optimizer = sgd((parameter for trained in (network, *companions.values()) for parameter in trained.parameters()),
                    settings, device)
    shapes = [(record.height, record.width) for record in train_annotations.records]
    sampler = AspectRatioBatchSampler(shapes, settings.batch_size, settings.seed, rank(), world_size(), settings.short,
                                      settings.long, FLIP, settings.repeat, settings.augment == "dihedral")
    run = Run(name=method.name, settings=settings, device=device, precision=precision, network=network,
              optimizer=optimizer, sampler=sampler, description=description, method=method,
              train_annotations=train_annotations, test_annotations=test_annotations, teacher=teacher,
              companions=companions, value_range=identity["value_range"])
    say(f"stage {run.name} on {description['dataset']}: {num_classes} classes, {len(shapes)} images with "
        f"{sum(len(record.labels) for record in train_annotations.records)} objects to train on, "
        f"{len(test_annotations.records)} images to test")
    short = "-".join(map(str, sorted(set(settings.short))))
    say(f"device {device_name(device)}; precision {precision}; seed {settings.seed}; batch {settings.batch_size} "
        f"({settings.batch_size // world_size()} on each of {world_size()} processes); lr "
        f"{settings.lr * settings.batch_size / 16:g}; short side {short}, long side at most {settings.long}; "
        f"{len(sampler)} steps an epoch")
    for note in notes(run):
        say(f"note: {note}")
    resume(run)
    return run


def notes(run: Run) -> Iterator[str]:
    """Sentences about settings that do not do what they seem to: those of every run, then those of the method."""
    settings, steps = run.settings, run.settings.epochs * len(run.sampler)
    if 2 * settings.warmup_steps > steps:
        yield (f"--warmup-steps {settings.warmup_steps} are most of the {steps} steps of the run; a tenth of them is "
               "plenty")
    late = [str(epoch) for epoch in settings.lr_steps if epoch > settings.epochs]
    if late:
        yield f"--lr-steps {','.join(late)} never come: the run has {settings.epochs} epochs"
    yield from run.method.notes(settings, run.network.num_classes, settings.batch_size // world_size())


# ---- a step, an epoch ------------------------------------------------------------------------------------------------


def train_step(run: Run, trained: torch.nn.Module, batch: Batch) -> tuple[tuple[str, ...], torch.Tensor]:
    """One step. Returns the names of the loss terms and their weighted values, (terms,).

    trained: `run.trainee`, or its form for training. batch: a batches.Batch on the CPU."""
    method, settings, device = run.method, run.settings, run.device
    step = start_step(run, batch)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(settings, run.epoch + 1, run.step, len(run.sampler))
    with autocast(device, run.precision):
        if run.teacher is not None:
            with torch.no_grad():
                step.teacher = run.teacher(step.images)
        step.outputs = trained(step.images, step.teacher)
    if method.assigns_by_outputs:
        step.targets = method.assign(step)
    losses, weights = method.losses(step, settings), method.weights(settings, run.network.num_classes)
    terms = torch.stack([weights[name] * loss for name, loss in losses.items()])
    run.optimizer.zero_grad(set_to_none=True)
    terms.sum().backward()
    if settings.clip:
        torch.nn.utils.clip_grad_norm_(run.trainee.parameters(), settings.clip)
    run.optimizer.step()
    return tuple(losses), terms.detach()


def start_step(run: Run, batch: Batch) -> Step:
    """The Step of a batch on the run's device. Its targets are in it already unless the method assigns by the outputs
    of the networks: what waits for the GPU here does not wait for the forward pass."""
    device = run.device
    images, boxes, labels = to_device((batch.images, torch.cat(batch.boxes), torch.cat(batch.labels)), device)
    truth = ground_truth(boxes, labels, [len(own) for own in batch.boxes], batch.sizes, run.network.num_classes)
    anchors = run.network.anchors(pyramid_sizes(*images.shape[2:]), device)
    images = normalise(images, batch.sizes).contiguous(memory_format=torch.channels_last)
    step = Step(images, truth, anchors, run.settings)
    if not run.method.assigns_by_outputs:
        step.targets = run.method.assign(step)
    return step


def learning_rate(settings: Settings, epoch: int, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step: lr * batch_size / 16, a tenth of it for each of lr_steps that has begun, and over
    the first warmup_steps steps rising linearly from WARMUP_RATIO of it. epoch counts from 1, step (in the epoch) from
    0."""
    base = settings.lr * settings.batch_size / 16 * 0.1 ** sum(epoch >= start for start in settings.lr_steps)
    done = (epoch - 1) * steps_per_epoch + step
    if done >= settings.warmup_steps:
        return base
    return base * (WARMUP_RATIO + (1 - WARMUP_RATIO) * done / settings.warmup_steps)


def finish_epoch(run: Run, record: dict[str, Any]) -> None:
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
        for name, network in run.detectors.items():
            save_checkpoint(Path(settings.output) / name / "final.pt", {
                "model": network.state_dict(),
                "description": {**run.description, "model": describe_model(network.architecture)}})
