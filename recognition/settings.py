"""The settings of a stage: the values at the top of each script, and the flags of the same names."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from common.flags import check_range, epochs_list, parse_flags, run_identity, setting

TEACHER_BATCH_NORM = ("train", "own", "recalibrated", "eval")  # the first is the default


@dataclass(frozen=True)
class Settings:
    """Every setting of a stage. The defaults are those of the paper's recipe wherever it has one."""

    data_root: str = setting("data/FGSC-23", "folder with dataset.json and the lists, made by prepare_dataset.py")
    output: str = setting("runs/{data}/{stage}", "the stage's own folder; {data} stands for the name of --data-root, "
                                                 "{stage} for that of the stage")
    init: str = setting("baseline", "what the network starts from: none, imagenet, baseline (the best checkpoint in "
                                    "the folder 'baseline' beside --output), or a checkpoint file")
    t1: str = setting("", "checkpoint of T1 (default: best.pt in the folder 't1' beside --output)")
    t2: str = setting("", "checkpoint of T2 (default: best.pt in the folder 't2' beside --output)")
    t3: str = setting("", "checkpoint of T3 (default: best.pt in the folder 't3' beside --output)")
    epochs: int = setting(100, "passes over the stage's training images")
    batch_size: int = setting(8, "images of a step, over all processes together")
    lr: float = setting(1e-3, "learning rate; with --schedule one-cycle its peak")
    schedule: str = setting("steps", "steps: lr / 10 from each epoch of --lr-steps on; one-cycle: up for 30 per cent "
                                     "of the run, then down to nothing, for short runs", choices=("steps", "one-cycle"))
    lr_steps: tuple = setting((32, 62, 92), "epochs, counted from 1, that begin with a learning rate cut to a tenth",
                              type=epochs_list)
    momentum: float = setting(0.9, "momentum of SGD")
    weight_decay: float = setting(1e-4, "weight decay of SGD")
    image_size: int = setting(224, "images are resized to a square of this many pixels")
    sampler: str = setting("shuffled", "how a batch is drawn", choices=("shuffled", "class-aware", "self-calibrated"))
    train: str = setting("all", "all: the whole network; classifier: classifier re-training, a new last layer on the "
                                "frozen rest", choices=("all", "classifier"))
    loss: str = setting("cross-entropy", "classification loss; ldam-drw is LDAM with deferred re-weighting",
                        choices=("cross-entropy", "balanced-softmax", "ldam-drw"))
    logit_adjustment: float = setting(0.0, "tau: that many times the logarithm of a class's share of the training "
                                           "images is subtracted from its logit in tests; 0 for none")
    distillation: bool = setting(True, "T2, T3, student: imitate the teachers; --no-distillation leaves the "
                                       "classification loss alone")
    calibration_momentum: float = setting(0.0, "self-calibrated: 0 weighs the classes by the last batch alone (the "
                                               "paper); above 0, by a running loss of each class")
    teacher_batch_norm: str = setting(
        TEACHER_BATCH_NORM[0], "what teachers normalise by: train, statistics of the whole batch (the authors' "
                               "behaviour); own, of the teacher's own images in it; recalibrated, running statistics "
                               "computed anew on the images of this stage; eval, those of the teacher's training",
        choices=TEACHER_BATCH_NORM)
    select: str = setting("val", "what the best epoch is chosen on: val, the held-out part of train; last, nothing: "
                                 "the last epoch is kept, for held-out parts of few images; test, the authors' "
                                 "protocol, which also trains on the held-out part", choices=("val", "last", "test"))
    seed: int = setting(0, "seed of everything random")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    precision: str = setting("auto", "bf16, fp32, or auto: bf16 where the hardware is fast at it",
                             choices=("auto", "fp32", "bf16"))
    feature_cache: float = setting(0.0, "GB of disk for the teachers' features of all training images, so that the "
                                        "teachers run once and not at every step; 0 for none", type=float)
    compile: bool = setting(False, "compile the network: its first step takes a minute, the others less time")
    save_steps: int = setting(0, "write last.pt every so many steps too, not only after every epoch")
    tensorboard: bool = setting(False, "also write TensorBoard events (needs the package tensorboard)")
    resume: bool = setting(False, "go on with the run in --output from its last checkpoint, if it has one")
    test_only: bool = setting(False, "train nothing: test --weights and write results.json")
    weights: str = setting("", "checkpoint to test: ours or the authors' released files (default: best.pt of --output)")
    expect_accuracy: float = setting(None, "per cent; exit with status 1 if the overall accuracy differs in its two "
                                           "decimals", type=float)


# Changing these does not make it another run.
NOT_PART_OF_A_RUN = ("data_root", "output", "device", "save_steps", "tensorboard", "resume", "test_only", "weights",
                     "expect_accuracy")


def parse_settings(stage, settings, description, argv=None):
    """The settings of a stage script as changed by its flags, checked, with its folder names filled in.

    stage: the stage's name. settings: the block at the top of the script. description: the script's docstring."""
    given = parse_flags(dataclasses.fields(Settings), description, argv)
    settings = dataclasses.replace(settings, **given)
    data = Path(settings.data_root).resolve().name
    output = settings.output
    if settings.test_only and settings.weights and "output" not in given:
        weights = Path(settings.weights).resolve()  # .../student/best.pt is tested into test_student_best
        output = str(Path(output).parent / f"test_{weights.parent.name}_{weights.stem}")
    settings = dataclasses.replace(settings, output=output.replace("{data}", data).replace("{stage}", stage))
    check_ranges(settings)
    return settings, given


def check_ranges(settings):
    """Raise UserError for the first setting that is out of its range."""
    for name, low, high in (("epochs", 1, 1e6), ("batch_size", 1, 1e6), ("image_size", 32, 4096), ("lr", 1e-12, 1e3),
                            ("momentum", 0, 1), ("weight_decay", 0, 1e3), ("logit_adjustment", 0, 100),
                            ("calibration_momentum", 0, 0.9999), ("feature_cache", 0, 1e6), ("save_steps", 0, 1e9)):
        check_range(settings, name, low, high)


def judged_on(settings):
    """The split that the network is tested on after every epoch: `val` or `test`."""
    return "test" if settings.select == "test" else "val"


def identity(stage, settings, precision, data):
    """The plain values that make a run what it is: two runs with equal ones compute the same on the same device.

    precision: what `auto` came to. data: the `dataset.fingerprint` of what it trains on."""
    return run_identity(stage, settings, NOT_PART_OF_A_RUN, precision=precision, data=data)
