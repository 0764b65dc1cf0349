"""The settings of a stage: the values at the top of each script, and the flags of the same names."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.flags import check_range, check_test_flags, epochs_list, parse_flags, setting, with_flags
from common.run_folder import run_identity
from dataset import GROUPS

TEACHER_BATCH_NORM = ("train", "own", "recalibrated", "eval")  # the first is the default
# The protocol of the authors' released code, as far as all stages have it in common; the rest is `Stage.released`.
RELEASED = {"epochs": 100, "batch_size": 8, "lr": 1e-3, "schedule": "steps", "lr_steps": (33, 63, 93),
            "image_size": 224, "augment": "flip", "teacher_batch_norm": "train", "select": "test"}


@dataclass(frozen=True)
class Settings:
    """Every setting of a stage. The defaults are those of the paper's recipe wherever it has one."""

    data_root: str = setting("data/FGSC-23", "folder with dataset.json and the lists, made by prepare_dataset.py")
    output: str = setting("runs/{data}/{stage}", "folder of the stage's files; {data} stands for the name of "
                                                 "--data-root, {stage} for that of the stage")
    recipe: str = setting("", "released: the authors' protocol in place of the script's values, from where each stage "
                              "starts to the epoch chosen on the test part; flags that are given count all the same",
                          choices=("released",))
    init: str = setting("baseline", "initial weights: none, imagenet, baseline (best.pt in the folder 'baseline' "
                                    "beside --output), or a checkpoint file")
    t1: str = setting("", "checkpoint of T1 (default: best.pt in the folder 't1' beside --output)")
    t2: str = setting("", "checkpoint of T2 (default: best.pt in the folder 't2' beside --output)")
    t3: str = setting("", "checkpoint of T3 (default: best.pt in the folder 't3' beside --output)")
    epochs: int = setting(100, "passes over the stage's training images")
    min_steps: int = setting(0, "least number of steps: a stage of few images makes several passes over them an "
                                "epoch; 0 for one pass")
    batch_size: int = setting(8, "images a step, of all processes together")
    lr: float = setting(1e-3, "learning rate; with --schedule one-cycle its maximum")
    schedule: str = setting("steps", "steps: lr / 10 from each epoch of --lr-steps on; one-cycle: up for 30 per cent "
                                     "of the run, then down to 0, for short runs", choices=("steps", "one-cycle"))
    lr_steps: tuple = setting((33, 63, 93), "epochs, counted from 1, that begin with a learning rate cut to a tenth",
                              type=epochs_list)
    momentum: float = setting(0.9, "momentum of SGD")
    weight_decay: float = setting(1e-4, "weight decay of SGD")
    image_size: int = setting(224, "images are resized to a square of this many pixels")
    augment: str = setting("flip", "what is drawn for each training image: flip, whether it is mirrored (the paper); "
                                   "dihedral, one of the 8 symmetries of a square, for images that have no up",
                           choices=("flip", "dihedral"))
    sampler: str = setting("shuffled", "how a batch is drawn", choices=("shuffled", "class-aware", "self-calibrated"))
    train: str = setting("all", "all: the whole network; classifier: classifier re-training, a new last layer on the "
                                "frozen rest", choices=("all", "classifier"))
    loss: str = setting("cross-entropy", "classification loss; ldam-drw is LDAM with deferred re-weighting",
                        choices=("cross-entropy", "balanced-softmax", "ldam-drw"))
    logit_adjustment: float = setting(0.0, "tau: in tests, tau times the logarithm of a class's share of the "
                                           "training images is subtracted from its logit; 0 for none")
    distillation: bool = setting(True, "imitate the teachers; --no-distillation trains with the classification "
                                       "loss alone")
    distillation_weight: float = setting(1.0, "weight of each imitation loss, beside 1 of the classification loss")
    calibration_momentum: float = setting(0.0, "self-calibrated sampling: 0 weights the classes by the last batch "
                                               "alone (the paper); above 0, by a running loss of each class")
    teacher_batch_norm: str = setting(
        TEACHER_BATCH_NORM[0], "statistics that teachers normalise by: train, those of the whole batch (the authors' "
                               "code); own, of the teacher's own images in it; recalibrated, running statistics "
                               "recomputed on the images of this stage; eval, those of the teacher's training",
        choices=TEACHER_BATCH_NORM)
    select: str = setting("val", "how the best epoch is chosen: val, on the held-out part of train; last, the last "
                                 "epoch is kept, for held-out parts of few images; test, on the test part, the "
                                 "authors' protocol, which also trains on the held-out part",
                        choices=("val", "last", "test"))
    seed: int = setting(0, "seed of all random choices")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    precision: str = setting("auto", "bf16, fp32, or auto: bf16 where the hardware is fast at it",
                             choices=("auto", "fp32", "bf16"))
    feature_cache: float = setting(0.0, "GB of disk for the teachers' features of all training images, so that the "
                                        "teachers run once instead of at every step; 0 for none", type=float)
    cache_dir: str = setting("", "folder of the cache of decoded images, for a data folder that cannot be written "
                                 "(default: 'cache' in --data-root)")
    compile: bool = setting(False, "compile the network: the first step takes a minute, the others are faster")
    save_steps: int = setting(0, "also write last.pt after every N steps, not only after every epoch; 0 for never")
    tensorboard: bool = setting(False, "also write TensorBoard events (needs the package tensorboard)")
    resume: bool = setting(False, "continue the run in --output from its last checkpoint, if it has one")
    test_only: bool = setting(False, "do not train: test --weights and write results.json")
    weights: str = setting("", "checkpoint to test: ours or the authors' released files (default: best.pt of --output)")
    expect_accuracy: float = setting(None, "per cent; exit with status 1 if the overall accuracy, to two decimals, "
                                           "is another", type=float)


# Settings that may differ within a run.
NOT_PART_OF_A_RUN = ("data_root", "output", "recipe", "device", "cache_dir", "save_steps", "tensorboard", "resume",
                     "test_only", "weights", "expect_accuracy")


def unused_settings(stage) -> set[str]:
    """Names of the settings that a `Stage` cannot use, which are not flags of its script: checkpoints of stages that do
    not teach it, and the settings of distillation and of self-calibrated sampling without the teachers for them."""
    unused = {"t1", "t2", "t3"} - set(stage.teachers)
    if not stage.teachers:
        unused |= {"distillation", "distillation_weight", "teacher_batch_norm", "feature_cache"}
    if len(stage.teachers) < len(GROUPS):
        unused.add("calibration_momentum")
    return unused


def parse_settings(stage, settings: Settings, description: str | None,
                   argv: Sequence[str] | None = None) -> tuple[Settings, dict[str, Any]]:
    """The settings of a stage script as changed by its flags, checked, with its folder names filled in; and the flags
    that were given, {name: value}.

    stage: the `Stage`. settings: the block at the top of the script. description: the script's docstring."""
    given = parse_flags(settings, description, argv, unused_settings(stage))
    settings = with_flags(settings, given, {"released": released(stage)})
    data = Path(settings.data_root).resolve().name
    output = settings.output
    if settings.test_only and settings.weights and "output" not in given:
        weights = Path(settings.weights).resolve()  # .../student/best.pt is tested into test_student_best
        output = str(Path(output).parent / f"test_{weights.parent.name}_{weights.stem}")
    settings = dataclasses.replace(settings, output=output.replace("{data}", data).replace("{stage}", stage.name))
    check_ranges(settings)
    check_test_flags(settings, ("weights", "expect_accuracy"))
    return settings, given


def released(stage) -> dict[str, Any]:
    """The settings of a `Stage` in the authors' protocol."""
    return {**RELEASED, **stage.released}


def recipe_of_run(stage, settings: Settings) -> str:
    """The recipe of a run, human-readable, with the settings that differ from it; "" without a recipe."""
    if not settings.recipe:
        return ""
    changed = [name for name, value in released(stage).items() if getattr(settings, name) != value]
    return settings.recipe + (f" but for {', '.join(changed)}" if changed else "")


def why_epochs_are_fixed(settings: Settings) -> str:
    """Why a run cannot go on for more epochs than it was started with: with more it would have begun otherwise. "" for
    a run that can."""
    if settings.schedule == "one-cycle":
        return "the learning rate of --schedule one-cycle depends on the number of epochs"
    if settings.loss == "ldam-drw":
        return "--loss ldam-drw begins to re-weight at a share of the epochs"
    if settings.min_steps:
        return "--min-steps divides the steps among the epochs"
    return ""


def check_ranges(settings: Settings) -> None:
    """Raise UserError for the first setting that is out of its range."""
    for name, low, high in (("epochs", 1, 1e6), ("batch_size", 1, 1e6), ("image_size", 32, 4096), ("lr", 1e-12, 1e3),
                            ("momentum", 0, 1), ("weight_decay", 0, 1e3), ("logit_adjustment", 0, 100),
                            ("distillation_weight", 0, 1e3), ("calibration_momentum", 0, 0.9999),
                            ("feature_cache", 0, 1e6), ("save_steps", 0, 1e9), ("min_steps", 0, 1e9)):
        check_range(settings, name, low, high)


def judged_on(settings: Settings) -> str:
    """The split that the network is tested on after every epoch: `val` or `test`."""
    return "test" if settings.select == "test" else "val"


def identity_of_run(stage: str, settings: Settings, precision: str, data: str,
                    teachers: dict[str, str]) -> dict[str, Any]:
    """The plain values that identify a run: two runs with equal ones compute the same on the same device.

    precision: fp32 or bf16, also where the setting is `auto`. data: the `dataset.fingerprint` of its data set.
    teachers: {name: SHA-256 of its checkpoint}."""
    digests = {f"{name}_sha256": digest for name, digest in teachers.items()}
    return run_identity(stage, settings, NOT_PART_OF_A_RUN, precision=precision, data=data, **digests)
