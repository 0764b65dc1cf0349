"""What a stage is, and what it needs before it can run: its classes' images, and the checkpoints of earlier stages."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch

from ClassAwareSampler import ClassAwareBatchSampler
from common.image_cache import ImageCache
from common.runtime import UserError, autocast, say
from dataset import GROUPS, SPLITS, ImageDataset, class_counts, network_input, read_info, read_split
from recognition.distillation import freeze, recalibrate
from resnet50 import load_network

SCRIPTS = {"baseline": "baseline_resnet50.py", "t1": "baseline_cl_t1.py", "t2": "baseline_cl_t2.py",
           "t3": "baseline_cl_t3.py", "student": "baseline_cl_s_weight.py"}


@dataclass(frozen=True)
class Stage:
    """One stage of T2FTS.

    name: also the name of its folder. group: the classes it is trained and tested on: `head`, `middle`, `tail`, `all`.
    teachers: the stages that teach it. targets: the function of `distillation` that gives the features to imitate."""

    name: str
    group: str
    teachers: tuple = ()
    targets: Callable | None = None


# ---- images ----------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """A stage's images: `train` to learn from, `select` to choose the best epoch on, `test` to report on; info: the
    DatasetInfo; classes: the stage's class ids."""

    info: object
    classes: list
    train: ImageDataset
    select: ImageDataset
    test: ImageDataset


def read_lists(stage, settings, training=True):
    """Read and check the data set's lists. Returns (DatasetInfo, the stage's class ids, {split: [Sample]}), where the
    split `val` is what the best epoch is chosen on; the samples are those of all classes. A test needs no train.txt.

    Raises UserError for what would make training wrong: a group without classes, a class without training images, fewer
    images than a batch, no held-out part to select on."""
    info = read_info(settings.data_root)
    path = info.root / "dataset.json"
    for group in GROUPS if len(stage.teachers) == len(GROUPS) else [stage.group]:
        if group != "all" and not info.groups[group]:
            raise UserError(f"{path}: the group '{group}' holds no class, and stage {stage.name} needs one; make the "
                            "data set with other --head-min and --tail-max")
    classes = list(range(len(info.classes))) if stage.group == "all" else sorted(info.groups[stage.group])
    splits = {split: read_split(info, split) for split in SPLITS
              if training or split == "test" or (info.root / f"{split}.txt").exists()}
    if training and settings.select != "test" and not splits["val"]:
        raise UserError(f"{info.root / 'val.txt'}: no held-out part to choose the best epoch on; make the data set "
                        "with --val-fraction, or give --select test (the authors' protocol)")
    if settings.select == "test":
        splits["train"], splits["val"] = splits.get("train", []) + splits.get("val", []), splits["test"]
    if training:
        check_trainable(stage, settings, info, classes, splits)
    if not of_classes(splits["test"], classes):
        raise UserError(f"{info.root / 'test.txt'}: no image of the classes of stage {stage.name}")
    return info, classes, splits


def check_trainable(stage, settings, info, classes, splits):
    """Raise UserError for a class without training images, fewer images than a batch, or nothing to select on."""
    path, train = info.root / "train.txt", of_classes(splits["train"], classes)
    counts = class_counts([sample.label for sample in train], len(info.classes))
    for class_id in classes:
        if counts[class_id] == 0:
            raise UserError(f"{path}: class {class_id} ({info.classes[class_id]}) has no training image; add some, or "
                            "take the class out of the data set")
    if len(train) < settings.batch_size:
        raise UserError(f"{path}: stage {stage.name} has {len(train)} training images, fewer than a batch of "
                        f"{settings.batch_size}; give a smaller --batch-size")
    if not of_classes(splits["val"], classes):
        raise UserError(f"{info.root}: no image of the classes of {stage.name} to choose the best epoch on")


def of_classes(samples, classes):
    """The samples whose label is one of `classes`."""
    classes = set(classes)
    return [sample for sample in samples if sample.label in classes]


def load_data(info, classes, splits, settings):
    """The stage's images, over one cache of every image of the lists, which all stages share."""
    everything = [sample for samples in splits.values() for sample in samples]
    cache = ImageCache(info.images, everything, settings.image_size, info.root / "cache")
    return Data(info, classes, *(ImageDataset(cache, of_classes(splits[split], classes)) for split in SPLITS))


def load_test_images(info, classes, splits, settings):
    """The stage's test images alone, over a cache of their own: to test needs no training image."""
    cache = ImageCache(info.images, splits["test"], settings.image_size, info.root / "cache", name="test")
    return ImageDataset(cache, of_classes(splits["test"], classes))


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def initial_weights(stage, settings):
    """`--init`, with `baseline` made the file that it stands for. Raises UserError where that is absent."""
    if settings.init != "baseline":
        return settings.init
    if stage.name == "baseline":
        raise UserError("--init baseline: this is the baseline; expected none, imagenet or a checkpoint file")
    path = best_checkpoint_beside(settings, "baseline")
    return str(require(path, "baseline", "--init (none, imagenet or a file)"))


def teacher_weights(stage, settings):
    """{teacher: its checkpoint}, from its flag or from the folder beside --output; none without distillation. Raises
    UserError for an absent one."""
    if not settings.distillation:
        return {}
    return {name: require(getattr(settings, name) or best_checkpoint_beside(settings, name), name, f"--{name}")
            for name in stage.teachers}


def best_checkpoint_beside(settings, name):
    """Where the stage scripts put the best checkpoint of stage `name` of the same run."""
    return Path(settings.output).parent / name / "best.pt"


def require(path, name, flag):
    """`path`, or a UserError that says how to get the checkpoint of stage `name`."""
    if not Path(path).is_file():
        script = ("dota_" if Path(sys.argv[0]).name.startswith("dota_") else "") + SCRIPTS[name]
        raise UserError(f"{path}: no checkpoint of {name} here; run {script} first, or say where it is with {flag}")
    return path


def load_teacher(name, path, settings, info):
    """The network of teacher `name`: the stage of that name, or a baseline, which knows every class. Raises UserError
    for a checkpoint of this project that is of another stage, image size, or division into groups."""
    teacher, description = load_network(path, len(info.classes))
    if description:
        check_classes(description, info, path)
        size = description["preprocessing"].get("image_size")
        if description["stage"] not in (name, "baseline"):
            raise UserError(f"{path}: is a checkpoint of stage {description['stage']}; expected one of {name}, or a "
                            "baseline")
        if description["groups"] != info.groups:
            raise UserError(f"{path}: was trained with other head, middle and tail classes than those of "
                            f"{info.root / 'dataset.json'}; train the teachers anew")
        if size != settings.image_size:
            raise UserError(f"{path}: was trained at {size} pixels; this run is at {settings.image_size}; give "
                            f"--image-size {size}")
    say(f"teacher {name}: {path}" + (f", epoch {description['epoch']}" if description else ""))
    return teacher


def load_teachers(weights, settings, info):
    """{name: ResNet50} of {name: file}; names with the same file share one network."""
    networks = {}
    for name, path in weights.items():
        network = load_teacher(name, path, settings, info)  # each name has its own checks, also for the same file
        same = next((other for other in networks if Path(weights[other]).resolve() == Path(path).resolve()), None)
        networks[name] = networks[same] if same else network
    return networks


def freeze_teachers(networks, settings, data, device, precision):
    """The frozen teachers, {name: network on the device}, made of what `load_teachers` gave.

    data: the stage's images, for teachers whose statistics are recalibrated on them."""
    frozen = {}
    for network in dict.fromkeys(networks.values()):
        network.to(device, memory_format=torch.channels_last)
        if settings.teacher_batch_norm == "recalibrated":
            with autocast(device, precision):
                recalibrate(network, recalibration_batches(data.train, settings, device))
        teacher = freeze(network, settings.teacher_batch_norm, precision)
        frozen.update({name: teacher for name in networks if networks[name] is network})
    return frozen


def recalibration_batches(dataset, settings, device):
    """Class-aware batches of 32 training images as a network takes them, as many images as there are but no more than
    1,600; the same for the same --seed."""
    sampler = ClassAwareBatchSampler(dataset.labels, 32, settings.seed)
    for _ in range(min(len(sampler), 50)):
        yield network_input(dataset.__getitems__(sampler.draw().tolist())[0].to(device))


def check_classes(description, info, path):
    """Raise UserError where a checkpoint of as many classes was trained for others, or the same in another order."""
    for class_id, (theirs, ours) in enumerate(zip_longest(description["classes"], info.classes)):
        if theirs != ours:
            raise UserError(f"{path}: its class {class_id} is {theirs!r}, that of {info.root / 'dataset.json'} is "
                            f"{ours!r}; expected the same classes in the same order")
