"""One training run: everything it holds, how it starts or is resumed, and what its checkpoints hold."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ClassAwareSampler import ClassAwareBatchSampler, SelfCalibratedBatchSampler, ShuffledBatchSampler
from dataset import describe
from feature_cache import FeatureCache, open_feature_cache
from files import atomic_path, load_checkpoint, read_json_lines, save_checkpoint
from resnet50 import ResNet50, initialise
from runtime import UserError, device_name, library_versions, rank, say, sum_over_processes, world_size
from settings import Settings
from stage import Data, Stage, check_classes, initial_weights, load_data, load_teacher, teacher_weights


@dataclass
class Run:
    """Everything that one training run holds. `state` and `restore` are its checkpoint: the parts that change."""

    stage: Stage
    settings: Settings
    data: Data
    device: torch.device
    precision: str
    teachers: dict  # {name: frozen ResNet50}
    features: FeatureCache | None  # what the teachers say of the training images, if it is kept on disk
    network: ResNet50
    optimizer: torch.optim.Optimizer
    sampler: ShuffledBatchSampler
    flips: torch.Generator
    epoch: int = 0  # epochs finished
    step: int = 0  # steps done of the epoch after them
    loss_sums: torch.Tensor = field(default_factory=lambda: torch.zeros(()))  # (terms,) over these steps
    seconds: float = 0.0  # that these steps have taken
    best_epoch: int = 0
    best_accuracy: float = -1.0
    description: dict = field(default_factory=dict)  # what its checkpoints say of themselves

    def __post_init__(self):
        self.group_of_class = self.data.info.group_of_class()

    def state(self):
        """A dict of tensors and plain types."""
        return {"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict(),
                "sampler": self.sampler.state_dict(), "flips": self.flips.get_state(),
                "torch_random": torch.get_rng_state(), "epoch": self.epoch, "step": self.step,
                "loss_sums": self.loss_sums, "seconds": self.seconds, "best_epoch": self.best_epoch,
                "best_accuracy": self.best_accuracy, "features_kept": self.features is not None}

    def restore(self, state):
        """Go on where the run that gave `state` stood. Raises an exception of any kind for what is no such state."""
        # Network and optimizer look for themselves.
        check_alike(state, {name: value for name, value in self.state().items() if name not in ("model", "optimizer")})
        if not (0 <= state["epoch"] <= self.settings.epochs and 0 <= state["step"] < len(self.sampler)):
            raise ValueError(f"epoch {state['epoch']} and step {state['step']} are not of this run")
        if state["features_kept"] != (self.features is not None):
            raise ValueError("it was begun with the teachers' features kept on disk and they are not now, or the other "
                             "way round; give --feature-cache and the disk the room they had")
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])
        self.flips.set_state(state["flips"])
        torch.set_rng_state(state["torch_random"])
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.loss_sums = state["loss_sums"].to(self.device)
        self.best_epoch, self.best_accuracy = state["best_epoch"], state["best_accuracy"]


def start_run(stage, settings, lists, device, precision):
    """A Run, new or resumed. What may be missing is looked for before the images are read.

    lists: what `read_lists` returned."""
    init, weights = initial_weights(stage, settings), teacher_weights(stage, settings)
    info = lists[0]
    teachers = {name: load_teacher(name, path, settings, info, device, precision) for name, path in weights.items()}
    network = ResNet50(len(info.classes))
    last = Path(settings.output) / "last.pt"
    resumed = settings.resume and last.exists()
    if not resumed:
        said, description = initialise(network, init)
        if description:
            check_classes(description, info, init)
        say(f"initialised: {said}")
    data = load_data(*lists, settings)
    features = open_feature_cache(stage, settings, data, teachers, weights, device, precision)
    sampler = make_sampler(stage, settings, data.train, len(info.classes))
    network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=settings.lr, momentum=settings.momentum,
                                weight_decay=settings.weight_decay, fused=device.type in ("cpu", "cuda"))
    flips = torch.Generator().manual_seed(settings.seed + 1)
    run = Run(stage, settings, data, device, precision, teachers, features, network, optimizer, sampler, flips)
    if resumed:
        try:
            run.restore(load_checkpoint(last))
        except UserError:
            raise
        except Exception as error:  # a damaged state can make a load_state_dict raise anything
            raise UserError(f"{last}: not a checkpoint that this run can go on from ({error})") from None
    if settings.resume:
        trim_log(last.with_name("log.jsonl"), run.epoch)
    if resumed:
        say(f"resumed: {last}, {progress(run)} done")
    return run


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


def make_sampler(stage, settings, dataset, num_classes):
    """The batch sampler that the settings name, over `dataset`."""
    arguments = (dataset.labels, settings.batch_size, settings.seed, rank(), world_size())
    if settings.sampler == "shuffled":
        return ShuffledBatchSampler(*arguments)
    if settings.sampler == "class-aware":
        return ClassAwareBatchSampler(*arguments)
    return SelfCalibratedBatchSampler(*arguments, num_classes=num_classes, momentum=settings.calibration_momentum)


def describe_run(run, mine):
    """Print what is about to run. Returns the description for its checkpoints, of plain values.

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
        records = read_json_lines(path, epochs)
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def save_last(run):
    """Write last.pt, from which `--resume` goes on."""
    share_buffers(run.network)
    if world_size() > 1:  # the checkpoint is the first process's: what it holds must be that of all
        run.loss_sums = sum_over_processes(run.loss_sums.to(run.device)) / world_size()
    save_checkpoint(Path(run.settings.output) / "last.pt", {
        **run.state(), "description": {**run.description, "epoch": run.epoch}})


def share_buffers(network):
    """Give every process the batch-norm statistics of the first, so that all hold one network."""
    if world_size() > 1:
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, 0)
