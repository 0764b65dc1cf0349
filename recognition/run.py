"""One training run of a stage: its parts, its start or resumption, and the metadata of its checkpoints."""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from ClassAwareSampler import (
    ClassAwareBatchSampler,
    GlobalBatchSampler,
    SelfCalibratedBatchSampler,
    ShuffledBatchSampler,
)
from common.images import value_range_entry
from common.run_folder import is_resumed
from common.runtime import device_name, library_versions, rank, say, world_size
from common.training import UNCHECKED_STEPS, TrainingRun, resume, sgd
from dataset import ImageDataset, class_counts, describe
from recognition.feature_cache import FeatureCache, open_feature_cache
from recognition.losses import CosineClassifier, adjust_logits
from recognition.settings import Settings, recipe_of_run
from recognition.stage import (
    Data,
    Lists,
    Stage,
    check_classes,
    freeze_teachers,
    initial_weights,
    load_data,
    load_teachers,
    teacher_weights,
)
from resnet50 import ResNet50, initialise


@dataclass(kw_only=True)
class Run(TrainingRun):
    """One training run of a stage."""

    stage: Stage
    data: Data
    teachers: dict[str, torch.nn.Module]  # frozen ResNet50s by name
    features: FeatureCache | None  # the teachers' features of the training images, where they are kept on disk
    flips: torch.Generator
    best_epoch: int = 0
    best_accuracy: float = -1.0
    warned: bool = False  # of distillation terms far above the classification loss

    def __post_init__(self):
        self.group_of_class = self.data.info.group_of_class()
        counts = class_counts(self.data.train.labels, len(self.group_of_class))
        self.class_counts = torch.from_numpy(counts).to(self.device)  # (C,) training images

    def published_network(self) -> ResNet50:
        """The network outside training: a plain ResNet50, its logits adjusted if the settings say so."""
        settings, network = self.settings, self.network
        if settings.loss == "ldam-drw" or settings.logit_adjustment:
            network = copy.deepcopy(network)
        if settings.loss == "ldam-drw":
            network.fc = network.fc.as_linear()
        if settings.logit_adjustment:
            adjust_logits(network.fc, self.class_counts, settings.logit_adjustment)
        return network

    def more_state(self):
        return {"sampler": self.sampler.state_dict(), "flips": self.flips.get_state(), "best_epoch": self.best_epoch,
                "best_accuracy": self.best_accuracy, "features_kept": self.features is not None}

    def restore_more(self, state):
        if state["features_kept"] != (self.features is not None):
            raise ValueError("the run was begun with the teachers' features kept on disk and they are not now, or the "
                             "other way round; give --feature-cache and the disk the room they had")
        self.sampler.load_state_dict(state["sampler"])
        self.flips.set_state(state["flips"])
        self.best_epoch, self.best_accuracy = state["best_epoch"], state["best_accuracy"]


def start_run(stage: Stage, settings: Settings, lists: Lists, device: torch.device, precision: str) -> Run:
    """A Run, new or resumed. Missing files are reported before the images are read."""
    init, weights = initial_weights(stage, settings), teacher_weights(stage, settings)
    info = lists.info
    teachers = load_teachers(weights, settings, info)
    network = ResNet50(len(info.classes))
    if not is_resumed(settings):
        origin, description = initialise(network, init)
        if description:
            check_classes(description, info, init)
        say(f"initialised: {origin}")
    prepare_classifier(network, settings)
    data = load_data(lists, settings)
    teachers = freeze_teachers(teachers, settings, data, device, precision)
    features = open_feature_cache(stage, settings, data, teachers, weights, device, precision)
    sampler = make_sampler(settings, data.train, len(info.classes))
    network.to(device, memory_format=torch.channels_last)
    optimizer = sgd(network.parameters(), settings, device)
    flips = torch.Generator().manual_seed(settings.seed + 1)
    # Self-calibrated sampling waits for the losses of every step anyway, so a check of each costs nothing more.
    check_every = 1 if settings.sampler == "self-calibrated" else UNCHECKED_STEPS
    run = Run(name=stage.name, settings=settings, device=device, precision=precision, network=network,
              optimizer=optimizer, sampler=sampler, check_every=check_every, stage=stage, data=data, teachers=teachers,
              features=features, flips=flips)
    resume(run)
    return run


def prepare_classifier(network: ResNet50, settings: Settings) -> None:
    """Give `network`, in place, the last layer for --loss and --train, and freeze the parameters that are not
    trained."""
    if settings.loss == "ldam-drw":
        classifier = CosineClassifier(network.fc.in_features, network.fc.out_features)
        classifier.load_state_dict(network.fc.state_dict())
        classifier.bias.requires_grad_(False)
        network.fc = classifier
    if settings.train == "classifier":
        network.requires_grad_(False)
        network.fc.weight.requires_grad_(True)
        network.fc.bias.requires_grad_(settings.loss != "ldam-drw")
        network.fc.reset_parameters()


def make_sampler(settings: Settings, dataset: ImageDataset, num_classes: int) -> GlobalBatchSampler:
    """The batch sampler that the settings name, over `dataset`."""
    arguments = (dataset.labels, settings.batch_size, settings.seed, rank(), world_size())
    if settings.sampler == "shuffled":
        sampler = ShuffledBatchSampler(*arguments)
    elif settings.sampler == "class-aware":
        sampler = ClassAwareBatchSampler(*arguments)
    else:
        sampler = SelfCalibratedBatchSampler(*arguments, num_classes=num_classes,
                                             momentum=settings.calibration_momentum)
    sampler.train_at_least(settings.min_steps, settings.epochs)
    return sampler


def describe_run(run: Run, identity: dict[str, Any]) -> dict[str, Any]:
    """Print a summary of the run. Returns the metadata of its checkpoints, plain values.

    identity: the run's `settings.identity_of_run`."""
    stage, settings, data, recipe = run.stage, run.settings, run.data, recipe_of_run(run.stage, run.settings)
    say(f"stage {stage.name} on {data.info.name}: {len(data.classes)} classes ({stage.group}), {len(data.train)} "
        f"images to train on, {len(data.select)} to select on ({settings.select}), {len(data.test)} to test")
    if data.info.value_range:
        say(f"of images of more than 8 bits the values {data.info.value_range} become 0 and 255 (dataset.json)")
    say(f"device {device_name(run.device)}; precision {run.precision}; seed {settings.seed}; batch "
        f"{settings.batch_size} ({settings.batch_size // world_size()} on each of {world_size()} processes); lr "
        f"{settings.lr:g}, {settings.schedule}" + (f"; recipe {recipe}" if recipe else ""))
    if settings.schedule == "steps" and settings.lr_steps and min(settings.lr_steps) > settings.epochs:
        say(f"note: none of --lr-steps {','.join(map(str, settings.lr_steps))} falls within {settings.epochs} epochs; "
            "for a short run consider --schedule one-cycle")
    preprocessing = {"channels": 1, "image_size": settings.image_size, "resize": "bicubic", "mean": 0.5, "std": 0.5,
                     **value_range_entry(data.info.value_range)}
    return {"stage": stage.name, **describe(data.info), "preprocessing": preprocessing, "selected_on": settings.select,
            "recipe": recipe, "settings": identity, "device": device_name(run.device), "processes": world_size(),
            "versions": library_versions()}
