"""The settings of a detection stage: the values at the top of each script, the flags of the same names, and the
published recipes."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.flags import check_range, check_test_flags, epochs_list, expects, parse_flags, setting, with_flags
from common.images import low_and_high
from common.run_folder import run_identity
from common.runtime import UserError
from detection.geometry.anchors import FACTORS
from detection.geometry.suppression import SUPPRESSIONS
from detection.network.backbone import DCN, DEPTHS, FAMILIES, is_backbone

# What the published schedules have in common are the defaults of Settings. Epochs are counted from 1, and lr_steps are
# those that BEGIN with a lower learning rate: "12 epochs, steps 8 and 11" of a config are (9, 12) here.
SCHEDULES = {"1x": {"epochs": 12, "lr_steps": (9, 12)}, "2x": {"epochs": 24, "lr_steps": (17, 23)}}
RECIPES = {
    "1x": {**SCHEDULES["1x"], "short": (800, 800)},
    "2x": {**SCHEDULES["2x"], "short": (480, 800)},
    "voc": {"epochs": 4, "lr_steps": (4,), "batch_size": 6, "short": (800, 800), "repeat": 3, "metric": "voc07"},
    "voc-teacher": {"epochs": 16, "lr_steps": (13,), "batch_size": 6, "short": (800, 800), "repeat": 3,
                    "metric": "voc07"},
    "nwpu": {"epochs": 50, "lr_steps": (41,), "batch_size": 8, "lr": 0.002, "short": (600, 600), "long": 1000,
             "clip": 35.0, "metric": "voc"},
}
METRICS = ("auto", "coco", "voc07", "voc", "dota")


@expects("a side in pixels, or two joined by a comma, such as 480,800")
def sides(text: str) -> tuple[int, int]:
    """"800" -> (800, 800); "480,800" -> (480, 800). The type of --short."""
    numbers = tuple(int(number) for number in text.split(","))
    if len(numbers) not in (1, 2):
        raise ValueError
    return numbers[0], numbers[-1]


def settings_of_recipes(recipes: Mapping[str, Mapping[str, Any]]) -> str:
    """`1x: epochs, lr_steps; 2x: ...`, for the help of --recipe."""
    return "; ".join(f"{name}: {', '.join(values)}" for name, values in recipes.items())


@dataclass(frozen=True)
class Settings:
    """The settings that all detectors have. The defaults are the published ones wherever there are any."""

    train: str = setting("data/mine/train.json", "what to train on: a COCO .json, a Pascal VOC image set .txt, or "
                                                 "several joined by commas")
    test: str = setting("data/mine/test.json", "what to test on, of the same kinds")
    images: str = setting("", "folder of the images (default: 'images' beside the .json, COCO's own layout, VOC's "
                              "JPEGImages)")
    test_images: str = setting("", "folder of the images to test on, if it is another")
    output: str = setting("runs/{data}/{stage}", "the stage's own folder; {data} stands for the name of the folder "
                                                 "that --train lies in, {stage} for that of the stage")
    recipe: str = setting("", "a published schedule, in place of the script's values for "
                              + settings_of_recipes(RECIPES), choices=tuple(RECIPES))
    init: str = setting("imagenet", "what the backbone starts from: imagenet, a file, or none")
    init_detector: str = setting("", "checkpoint of a detector to start from instead, with pyramid and head; outputs "
                                     "for other classes start anew")
    frozen: bool = setting(True, "fine-tune the published way: the backbone's stem, layer1 and batch-norm statistics "
                                 "stay as they are; with --init none nothing ever does")
    backbone: str = setting("resnet", "ResNet, ResNeXt (32x4d) or Res2Net (26w x 4s)", choices=tuple(FAMILIES))
    depth: int = setting(50, "of the backbone; 50 or 101 for all but the plain ResNet", choices=tuple(DEPTHS))
    dcn: str = setting("none", "the stages of the backbone with deformable convolutions (DCNv2)", choices=tuple(DCN))
    channels: int = setting(256, "of the feature pyramid and the head, a multiple of 32, at least 64")
    tower_convs: int = setting(4, "convolutions of each tower of the head")
    anchor_size: float = setting(1.0, "sides of the anchors, in those of the published ones; below 1 for small objects",
                                 type=float)
    augment: str = setting("flip", "training images are mirrored left to right at random (flip, published), or also "
                                   "turned by quarters (dihedral), as scenes from above allow",
                           choices=("flip", "dihedral"))
    epochs: int = setting(12, "passes over the training images")
    batch_size: int = setting(16, "images of a step, over all processes together")
    lr: float = setting(0.01, "learning rate for a batch of 16; for another it is scaled in proportion")
    lr_steps: tuple = setting((9, 12), "epochs, counted from 1, that begin with a learning rate cut to a tenth",
                              type=epochs_list)
    warmup_steps: int = setting(500, "steps over which the learning rate rises linearly from a thousandth")
    momentum: float = setting(0.9, "momentum of SGD")
    weight_decay: float = setting(1e-4, "weight decay of SGD")
    clip: float = setting(0.0, "largest norm of all gradients together; 0 for any", type=float)
    repeat: int = setting(1, "passes over the training images that make an epoch")
    short: tuple = setting((800, 800), "images are resized to this short side, in pixels, or in training to one drawn "
                                       "from LOW,HIGH; tests are at the larger", type=sides)
    long: int = setting(1333, "... unless their long side would exceed this")
    value_range: tuple = setting(None, "of images of more than 8 bits, the pixel values LOW,HIGH that become black and "
                                       "white (default: the lowest and the highest of the training images)",
                                 type=low_and_high)
    suppression: str = setting("auto", "how a test thins out overlapping boxes; auto: as published for the detector, "
                                       "PAA with nms-voting, others with nms", choices=("auto", *SUPPRESSIONS))
    metric: str = setting("auto", "AP of COCO; of VOC 2007 (11 points); of VOC since 2010 (area under the curve); of "
                                  "DOTA, of oriented boxes (11 points); auto: dota for oriented boxes, else coco",
                          choices=METRICS)
    test_every: int = setting(0, "also test after every so many epochs, for the curves; it chooses nothing")
    seed: int = setting(0, "seed of everything random")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    precision: str = setting("auto", "bf16, fp32, or auto: bf16 where the hardware is fast at it, and fp32 for tests",
                             choices=("auto", "fp32", "bf16"))
    workers: int = setting(2, "processes of each training process that load images; 0 for none")
    save_steps: int = setting(0, "write last.pt every so many steps too, not only after every epoch")
    tensorboard: bool = setting(False, "also write TensorBoard events (needs the package tensorboard)")
    resume: bool = setting(False, "go on with the run in --output from its last checkpoint, if it has one")
    test_only: bool = setting(False, "train nothing: test --weights and write results.json")
    weights: str = setting("", "checkpoint to test (default: final.pt of --output)")

    @classmethod
    def recipes(cls) -> dict[str, dict[str, Any]]:
        """{name: {setting: value}} of the published schedules. A method with others has them as choices of `recipe`."""
        return RECIPES

    @property
    def starts_frozen(self) -> bool:
        """Whether the backbone is fine-tuned the published way: there is something to keep."""
        return self.frozen and (self.init != "none" or self.init_detector != "")

    def ranges(self) -> tuple[tuple[str, float, float], ...]:
        """[(name, lowest, highest)] of the settings that are numbers."""
        return (("epochs", 1, 1e6), ("batch_size", 1, 1e6), ("channels", 64, 4096), ("tower_convs", 0, 16),
                ("anchor_size", *FACTORS), ("lr", 1e-12, 1e3), ("warmup_steps", 0, 1e9), ("momentum", 0, 1),
                ("weight_decay", 0, 1e3), ("clip", 0, 1e9), ("repeat", 1, 1e6), ("long", 32, 1e5),
                ("workers", 0, 1024), ("test_every", 0, 1e6), ("save_steps", 0, 1e9))


# Changing these does not make it another run.
NOT_PART_OF_A_RUN = ("train", "test", "images", "test_images", "output", "recipe", "device", "workers", "save_steps",
                     "tensorboard", "resume", "test_only", "weights", "suppression", "metric", "test_every", "teacher")


def parse_settings(stage: str, settings: Settings, description: str | None,
                   argv: Sequence[str] | None = None) -> Settings:
    """The settings of a stage script as changed by its flags, checked, with its folder names filled in.

    stage: the stage's name. settings: the block at the top of the script. description: the script's docstring."""
    settings = with_flags(settings, parse_flags(settings, description, argv), settings.recipes())
    paths, names = {}, {"{data}": data_name(settings.train), "{stage}": stage}
    for name in ("output", "teacher"):
        value = getattr(settings, name, None)
        for placeholder, text in names.items():
            value = value and value.replace(placeholder, text)
        if value is not None:
            paths[name] = value
    settings = dataclasses.replace(settings, **paths)
    check_ranges(settings)
    check_test_flags(settings, ("weights",))
    return settings


def data_name(source: str) -> str:
    """The name of the folder that a source lies in: VOC2007 for VOC2007/ImageSets/Main/trainval.txt, mine for
    mine/train.json and mine/annotations/train.json."""
    folder = Path(source.split(",")[0]).resolve().parent
    while folder.name in ("annotations", "Main", "ImageSets"):
        folder = folder.parent
    return folder.name


def check_ranges(settings: Settings) -> None:
    """Raise UserError for the first setting that is out of its range."""
    for name, low, high in settings.ranges():
        check_range(settings, name, low, high)
    low, high = settings.short
    if not 32 <= low <= high <= 1e5:
        raise UserError(f"--short {low},{high}: expected one side of 32 to 100000 pixels, or two, the smaller first")
    if not is_backbone(settings.depth, settings.backbone, settings.dcn):
        raise UserError(f"--backbone {settings.backbone} --dcn {settings.dcn} --depth {settings.depth}: expected "
                        "--depth 50 or 101; 18 and 34 are of the plain ResNet alone")
    if settings.channels % 32:
        raise UserError(f"--channels {settings.channels}: expected a multiple of 32, the groups of the group norms")


def identity_of_run(stage: str, settings: Settings, precision: str, data: str, **more: Any) -> dict[str, Any]:
    """The plain values that identify a run: two runs with equal ones compute the same on the same device.

    precision: resolved, `fp32` or `bf16`. data: the fingerprint of the annotations to train on. more: the value range
    that was found, the digest of the teacher's file."""
    return run_identity(stage, settings, NOT_PART_OF_A_RUN, precision=precision, data=data, **more)
