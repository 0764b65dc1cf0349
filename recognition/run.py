"""One training run of a stage: what it holds, how it starts or is resumed, and what its checkpoints say of it."""

import copy
from dataclasses import dataclass

import torch

from ClassAwareSampler import ClassAwareBatchSampler, SelfCalibratedBatchSampler, ShuffledBatchSampler
from common.runtime import device_name, library_versions, rank, say, world_size
from common.training import UNCHECKED_STEPS, TrainingRun, is_resumed, resume, sgd
from dataset import class_counts, describe
from recognition.feature_cache import FeatureCache, open_feature_cache
from recognition.losses import CosineClassifier, adjust_logits
from recognition.stage import (
    Data,
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
    """Everything that one training run of a stage holds."""

    stage: Stage
    data: Data
    teachers: dict  # {name: frozen ResNet50}
    features: FeatureCache | None  # what the teachers say of the training images, if it is kept on disk
    flips: torch.Generator
    best_epoch: int = 0
    best_accuracy: float = -1.0
    warned: bool = False  # of distillation terms far above the classification loss

    def __post_init__(self):
        self.group_of_class = self.data.info.group_of_class()
        counts = class_counts(self.data.train.labels, len(self.group_of_class))
        self.class_counts = torch.from_numpy(counts).to(self.device)  # (C,) training images

    def answering_network(self):
        """The network as it answers outside training: a plain ResNet50, its logits adjusted if that is asked for."""
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
            raise ValueError("it was begun with the teachers' features kept on disk and they are not now, or the other "
                             "way round; give --feature-cache and the disk the room they had")
        self.sampler.load_state_dict(state["sampler"])
        self.flips.set_state(state["flips"])
        self.best_epoch, self.best_accuracy = state["best_epoch"], state["best_accuracy"]


def start_run(stage, settings, lists, device, precision):
    """A Run, new or resumed. What may be missing is looked for before the images are read.

    lists: what `read_lists` returned."""
    init, weights = initial_weights(stage, settings), teacher_weights(stage, settings)
    info = lists[0]
    teachers = load_teachers(weights, settings, info)
    network = ResNet50(len(info.classes))
    if not is_resumed(settings):
        said, description = initialise(network, init)
        if description:
            check_classes(description, info, init)
        say(f"initialised: {said}")
    prepare_classifier(network, settings)
    data = load_data(*lists, settings)
    teachers = freeze_teachers(teachers, settings, data, device, precision)
    features = open_feature_cache(stage, settings, data, teachers, weights, device, precision)
    sampler = make_sampler(stage, settings, data.train, len(info.classes))
    network.to(device, memory_format=torch.channels_last)
    optimizer = sgd(network.parameters(), settings, device)
    flips = torch.Generator().manual_seed(settings.seed + 1)
    # A sampler that waits for each step's losses costs the look at them anyway.
    check_every = 1 if settings.sampler == "self-calibrated" else UNCHECKED_STEPS
    run = Run(name=stage.name, settings=settings, device=device, precision=precision, network=network,
              optimizer=optimizer, sampler=sampler, check_every=check_every, stage=stage, data=data, teachers=teachers,
              features=features, flips=flips)
    resume(run)
    return run


def prepare_classifier(network, settings):
    """Give `network`, in place, the last layer that --loss and --train ask for, and freeze what is not trained."""
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


