"""A stage, and what it needs before it can run: the images of its classes, and the checkpoints of earlier stages."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from ClassAwareSampler import ClassAwareBatchSampler
from common.image_cache import ImageCache
from common.runtime import UserError, autocast, say
from dataset import (
    GROUPS,
    DatasetInfo,
    ImageDataset,
    Sample,
    check_distinct,
    class_counts,
    network_input,
    read_info,
    read_split,
)
from recognition.distillation import freeze, recalibrate
from resnet50 import load_network

SCRIPTS = {"baseline": "baseline_resnet50.py", "t1": "baseline_cl_t1.py", "t2": "baseline_cl_t2.py",
           "t3": "baseline_cl_t3.py", "student": "baseline_cl_s_weight.py"}


@dataclass(frozen=True)
class Stage:
    """One stage of T2FTS.

    name: also the name of its folder. group: the classes it is trained and tested on: `head`, `middle`, `tail`, `all`.
    teachers: the stages that teach it. targets: the function of `distillation` that returns the features to imitate.
    script_prefix: before the names of its script and of those of its teachers. released: what the authors' protocol has
    for this stage beside `settings.RELEASED`: where it starts, and what is the student's alone."""

    name: str
    group: str
    teachers: tuple[str, ...] = ()
    targets: Callable | None = None
    script_prefix: str = ""
    released: Mapping[str, Any] = field(default_factory=dict)


# ---- images ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lists:
    """The lists of a stage's data set, with the samples of all its classes.

    info: of the data set. classes: the ids of the stage's classes. select: the samples to choose the best epoch on,
    which with --select test are those of `test`."""

    info: DatasetInfo
    classes: list[int]
    train: list[Sample]
    select: list[Sample]
    test: list[Sample]

    def by_split(self) -> dict[str, list[Sample]]:
        """The samples under the names of the splits that they stand for."""
        return {"train": self.train, "val": self.select, "test": self.test}


@dataclass(frozen=True)
class Data:
    """The images of a stage's classes: `train` to learn from, `select` to choose the best epoch on, `test` to report
    on. info, classes: as in `Lists`."""

    info: DatasetInfo
    classes: list[int]
    train: ImageDataset
    select: ImageDataset
    test: ImageDataset


def read_lists(stage, settings, training: bool = True) -> Lists:
    """Read and check the lists of a stage's data set. A test alone (training=False) needs no train.txt.

    Raises UserError for lists that would make training wrong: a group without classes, a class without training images,
    an image in two lists or with two labels, fewer images than a batch, nothing to choose the best epoch on."""
    info = read_info(settings.data_root)
    path = info.root / "dataset.json"
    for group in GROUPS if len(stage.teachers) == len(GROUPS) else [stage.group]:
        if group != "all" and not info.groups[group]:
            raise UserError(f"{path}: the group '{group}' holds no class, and stage {stage.name} needs one; make the "
                            "data set with other --head-min and --tail-max")
    classes = list(range(len(info.classes))) if stage.group == "all" else sorted(info.groups[stage.group])
    train = read_split(info, "train") if training or (info.root / "train.txt").exists() else []
    val, test = read_split(info, "val"), read_split(info, "test")
    if training and settings.select != "test" and not val:
        raise UserError(f"{info.root / 'val.txt'}: no held-out part to choose the best epoch on; make the data set "
                        "with --val-fraction, or give --select test (the authors' protocol)")
    if training:
        check_distinct(info, {"train": train, "val": val, "test": test})
    if settings.select == "test":
        lists = Lists(info, classes, train=train + val, select=test, test=test)
    else:
        lists = Lists(info, classes, train=train, select=val, test=test)
    if training:
        check_trainable(stage, settings, lists)
    if not of_classes(test, classes):
        raise UserError(f"{info.root / 'test.txt'}: no image of the classes of stage {stage.name}; add some, or make "
                        "the data set with other --head-min and --tail-max")
    return lists


def check_trainable(stage, settings, lists):
    """Raise UserError for a class without training images, fewer images than a batch, or nothing to select on."""
    info = lists.info
    path, train = info.root / "train.txt", of_classes(lists.train, lists.classes)
    counts = class_counts([sample.label for sample in train], len(info.classes))
    for class_id in lists.classes:
        if counts[class_id] == 0:
            raise UserError(f"{path}: class {class_id} ({info.classes[class_id]}) has no training image; add some, or "
                            "take the class out of the data set")
    if len(train) < settings.batch_size:
        raise UserError(f"{path}: stage {stage.name} has {len(train)} training images, fewer than a batch of "
                        f"{settings.batch_size}; give a smaller --batch-size")
    if not of_classes(lists.select, lists.classes):
        remedy = "add some" if settings.select == "test" else "give --select test, or make the data set of more images"
        raise UserError(f"{info.root}: no image of the classes of stage {stage.name} to choose the best epoch on (of a "
                        f"class with one training image none is held out); {remedy}")


def of_classes(samples: Sequence[Sample], classes: Sequence[int]) -> list[Sample]:
    """The samples whose label is one of `classes`."""
    classes = set(classes)
    return [sample for sample in samples if sample.label in classes]


def cache_folder(info: DatasetInfo, settings) -> Path:
    """The folder of a data set's caches: `cache` in its own, or one of its name in --cache-dir."""
    return Path(settings.cache_dir) / info.root.resolve().name if settings.cache_dir else info.root / "cache"


def load_data(lists: Lists, settings) -> Data:
    """The images of the stage's classes, in a cache of every image of the lists, which all stages share."""
    info, everything = lists.info, [*lists.train, *lists.select, *lists.test]
    cache = ImageCache(info.images, everything, settings.image_size, cache_folder(info, settings),
                       value_range=info.value_range)
    train, select, test = (ImageDataset(cache, of_classes(samples, lists.classes))
                           for samples in (lists.train, lists.select, lists.test))
    return Data(info, lists.classes, train=train, select=select, test=test)


def load_test_images(lists: Lists, settings) -> ImageDataset:
    """The test images of the stage's classes, in a cache of their own: a test needs no training image."""
    info = lists.info
    cache = ImageCache(info.images, lists.test, settings.image_size, cache_folder(info, settings), name="test",
                       value_range=info.value_range)
    return ImageDataset(cache, of_classes(lists.test, lists.classes))


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def initial_weights(stage, settings) -> str:
    """`--init`, with `baseline` replaced by its checkpoint's path. Raises UserError where that file is absent."""
    if settings.init != "baseline":
        return settings.init
    if stage.name == "baseline":
        raise UserError("--init baseline: this is the baseline; expected none, imagenet or a checkpoint file")
    path = best_checkpoint_beside(settings, "baseline")
    require(path, stage.script_prefix + SCRIPTS["baseline"], "baseline", "--init (none, imagenet or a file)")
    return str(path)


def teacher_paths(stage, settings) -> dict[str, Path]:
    """{teacher: the path of its checkpoint}, from its flag or in the folder beside --output; empty without
    distillation."""
    teachers = stage.teachers if settings.distillation else ()
    return {name: Path(getattr(settings, name) or best_checkpoint_beside(settings, name)) for name in teachers}


def teacher_weights(stage, settings) -> dict[str, Path]:
    """The `teacher_paths`. Raises UserError for an absent file."""
    weights = teacher_paths(stage, settings)
    for name, path in weights.items():
        require(path, stage.script_prefix + SCRIPTS[name], name, f"--{name}")
    return weights


def best_checkpoint_beside(settings, name: str) -> Path:
    """The best checkpoint of stage `name`, in its folder beside --output."""
    return Path(settings.output).parent / name / "best.pt"


def require(path: Path, script: str, stage_name: str, flag: str) -> None:
    """Raise UserError unless there is a checkpoint at `path`, naming the script that makes it and the flag for it."""
    if not path.is_file():
        raise UserError(f"{path}: no checkpoint of {stage_name} here; run {script} first, or say where it is with "
                        f"{flag}")


def load_teacher(name, path, settings, info):
    """The network of teacher `name`: a checkpoint of the stage of that name, or of a baseline, which knows every class.
    Raises UserError for a checkpoint of this project of another stage, image size, or division into groups."""
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
        check_value_range(description, info, path)
    say(f"teacher {name}: {path}" + (f", epoch {description['epoch']}" if description else ""))
    return teacher


def check_value_range(description, info, path):
    """Raise UserError where a checkpoint was trained on images scaled to 8 bits by another value range."""
    trained, expected = (value_range and list(value_range) for value_range in (
        description["preprocessing"].get("value_range"), info.value_range))
    if trained != expected:
        raise UserError(f"{path}: was trained with the value range {trained}, that of {info.root / 'dataset.json'} is "
                        f"{expected}; train the teachers anew")


def load_teachers(weights, settings, info):
    """{name: ResNet50} of {name: file}; names with the same file share one network."""
    networks = {}
    for name, path in weights.items():
        network = load_teacher(name, path, settings, info)  # a file given twice is checked as each teacher
        same = next((other for other in networks if Path(weights[other]).resolve() == Path(path).resolve()), None)
        networks[name] = networks[same] if same else network
    return networks


def freeze_teachers(networks, settings, data, device, precision):
    """The frozen teachers on the device, {name: network}, made of the networks of `load_teachers`.

    data: the stage's images, on which the teachers' statistics are recalibrated if the settings say so."""
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
    """Class-aware batches of 32 training images as input of a network: as many images as there are, at most 1,600. The
    same --seed gives the same batches."""
    sampler = ClassAwareBatchSampler(dataset.labels, 32, settings.seed)
    for _ in range(min(len(sampler), 50)):
        yield network_input(dataset.__getitems__(sampler.draw().tolist())[0].to(device))


def check_classes(description, info, path):
    """Raise UserError where a checkpoint was trained for other classes, or the same classes in another order."""
    for class_id, (trained, expected) in enumerate(zip_longest(description["classes"], info.classes)):
        if trained != expected:
            raise UserError(f"{path}: its class {class_id} is {trained!r}, that of {info.root / 'dataset.json'} is "
                            f"{expected!r}; expected the same classes in the same order")
