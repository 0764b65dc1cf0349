"""A GFL, GFocal V2, LD, PAA or LAD detector that mmdetection trained, or a rotated RetinaNet or Rotated-LD of mmrotate,
as a checkpoint of this project.

    python -m detection.convert gfl_r50_fpn_1x_coco.pth runs/coco/gfl_r50.pt
    python -m detection.convert rotated_retinanet_hbb_r50.pth runs/dota/r50.pt --short 1024 --long 1024
    python -m detection.convert latest.pth runs/mine/teacher.pt --classes names.txt --short 640 --long 1000
    python -m detection.convert colad.pth runs/coco/paa_r50.pt --teacher

ResNet-18, 34, 50 or 101 with its stride in the 3x3 convolutions, ResNeXt-50 or 101 (32x4d), Res2Net-50 or 101 (26w x
4s), these also with deformable convolutions (DCNv2) in c3 to c5 or c4 to c5; pyramid from P3 to P7. Sizes are taken
from the weights, names of classes from the file, if it has them, or from --classes. The result can be tested,
published, and be a teacher. ATSS has the weights of PAA and is taken for it.

A file that holds more than tensors and plain types is not read, as that could run code. Where mmdetection is installed
and the file is trusted, its state_dict alone can be saved again."""

import argparse
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision.models.resnet import Bottleneck

from common.files import check_entries, is_stored_whole, list_lines, load_checkpoint, save_checkpoint, sha256_of
from common.runtime import UserError, run_script
from detection.checkpoint import RANGES, describe_model, describe_preprocessing, is_description
from detection.geometry.anchors import RETINA, STRIDES
from detection.network.backbone import DCN, DEPTHS, backbone_name, is_backbone
from detection.network.detector import Architecture, Detector

# Ours, as a pattern, and theirs. The backbone has the same names in both; `head.scales` is one entry for all levels
# here, and one for each there.
NAMES = (
    (r"neck\.lateral\.(\d)", r"neck.lateral_convs.\1.conv"),
    (r"neck\.output\.(\d)", r"neck.fpn_convs.\1.conv"),
    (r"neck\.extra\.0", r"neck.fpn_convs.3.conv"),
    (r"neck\.extra\.1", r"neck.fpn_convs.4.conv"),
    (r"head\.class_tower\.(\d+)\.0", r"bbox_head.cls_convs.\1.conv"),
    (r"head\.class_tower\.(\d+)\.1", r"bbox_head.cls_convs.\1.gn"),
    (r"head\.box_tower\.(\d+)\.0", r"bbox_head.reg_convs.\1.conv"),
    (r"head\.box_tower\.(\d+)\.1", r"bbox_head.reg_convs.\1.gn"),
)
OUTPUTS = {
    "gfl": ((r"head\.classify", r"bbox_head.gfl_cls"),
            (r"head\.regress", r"bbox_head.gfl_reg"),
            (r"head\.quality", r"bbox_head.reg_conf")),
    "paa": ((r"head\.classify", r"bbox_head.atss_cls"),
            (r"head\.regress", r"bbox_head.atss_reg"),
            (r"head\.iou", r"bbox_head.atss_centerness"),
            (r"head\.objectness", r"bbox_head.objectness"),
            (r"head\.bias", r"bbox_head.obj_bias"),
            (r"head\.coefficients", r"bbox_head.coeff_conv")),
    "rotated": ((r"head\.classify", r"bbox_head.retina_cls"),
                (r"head\.regress", r"bbox_head.retina_reg")),
}
SCALES, SCALE = "head.scales", "bbox_head.scales.{}.scale"
TEACHER = r"teacher(_model\.|_|\.)"  # how the names of a teacher begin that is in the same file
# What is computed and not learned, and the classifier of ImageNet.
LEFT_OUT = ("bbox_head.integral", "backbone.fc.")
CLASSIFY, CLASSIFY_BIAS = "bbox_head.gfl_cls.weight", "bbox_head.gfl_cls.bias"
QUALITY, IOU, BIAS, COEFFICIENTS = (
    f"bbox_head.{name}.weight" for name in ("reg_conf.0", "atss_centerness", "obj_bias", "coeff_conv"))

# ---- names -----------------------------------------------------------------------------------------------------------


def mmdet_name(name: str, head: str = "gfl") -> str:
    """What mmdetection calls an entry of the state dict of a Detector with that head."""
    for ours, theirs in (*NAMES, *OUTPUTS[head]):
        name = re.sub(f"^{ours}(?=\\.)", theirs, name)
    return name


def to_mmdet(state: Mapping[str, torch.Tensor], head: str = "gfl") -> dict[str, torch.Tensor]:
    """The state dict of a Detector with that head in mmdetection's names."""
    scales = {SCALE.format(level): scale for level, scale in enumerate(state.get(SCALES, ()))}
    return {mmdet_name(name, head): value for name, value in state.items() if name != SCALES} | scales


def from_mmdet(state: Mapping[str, torch.Tensor], names: Iterable[str], head: str = "gfl") -> dict[str, torch.Tensor]:
    """The inverse of `to_mmdet`. names: of the entries of the Detector."""
    scales = [state[name] for name in map(SCALE.format, range(len(STRIDES))) if name in state]
    return {name: torch.stack(scales) if name == SCALES else state[mmdet_name(name, head)] for name in names}


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_mmdet(path: str | Path, teacher: bool = False) -> tuple[dict[str, torch.Tensor], list[Any] | None]:
    """A file of mmdetection as (state dict, names of the classes or None), without what a Detector does not have.
    teacher: the state dict is that of the teacher in the file.

    Raises UserError for what is no such file, and for what a Detector has no counterpart of."""
    content = load_checkpoint(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(name, str) for name in state):
        raise UserError(f"{path}: holds no weights; expected a state dict, or one under 'state_dict' as mmdetection "
                        "writes it")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    state = {re.sub(f"^{TEACHER}", "", name): value for name, value in state.items()
             if bool(re.match(TEACHER, name)) == teacher}
    if not state:
        raise UserError(f"{path}: holds no teacher beside the detector; leave --teacher out")
    state = {name: value for name, value in state.items() if not name.startswith(LEFT_OUT)}
    if COEFFICIENTS in state and BIAS not in state:  # the released head of COP has an objectness that it does not use
        state = {name: value for name, value in state.items() if not name.startswith("bbox_head.objectness.")}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or not is_stored_whole(value):
            raise UserError(f"{path}: {name[:80]} is no dense tensor of numbers; expected a state dict")
    return state, named_classes(content.get("meta"))


def named_classes(meta: Any) -> list[Any] | None:
    """The names of the classes in the `meta` of a checkpoint (mmdetection 2: CLASSES; 3: dataset_meta), or None."""
    meta = meta if isinstance(meta, dict) else {}
    inner = meta.get("dataset_meta")
    for place in (meta, inner if isinstance(inner, dict) else {}):
        for key in ("CLASSES", "classes"):
            if isinstance(place.get(key), (list, tuple)):
                return list(place[key])
    return None


def read_architecture(state: Mapping[str, torch.Tensor], path: str | Path) -> tuple[Architecture, int]:
    """(Architecture, number of classes) that a state dict of mmdetection has by its names and shapes.

    Raises UserError if it is none of the detectors here, or on another backbone than ours."""
    head = next((head for head, names in OUTPUTS.items() if f"{names[0][1]}.weight" in state), "gfl")
    classify, regress = (f"{name}.weight" for _, name in OUTPUTS[head][:2])
    for name in (classify, regress):
        if name not in state or state[name].ndim != 4:
            raise UserError(f"{path}: lacks {name}; expected a GFL, GFocal V2, LD, PAA or LAD detector of mmdetection, "
                            "or a rotated RetinaNet or Rotated-LD of mmrotate")
    (num_classes, channels), values = state[classify].shape[:2], len(state[regress])
    if head == "paa":
        parts = {"iou": IOU in state, "iop": BIAS in state, "cop": COEFFICIENTS in state}
        auxiliary = "+".join(name for name, present in parts.items() if present)
        fields = {"auxiliary": auxiliary, "cop_padding": "logit0" if parts["cop"] else "prob0"}
    elif head == "rotated":
        anchors = len(RETINA.shapes)
        if num_classes % anchors or values % (5 * anchors):
            raise UserError(f"{path}: its head has {num_classes} scores and {values} values of boxes a location; "
                            f"expected multiples of {anchors} and {5 * anchors}, as {anchors} anchors with oriented "
                            "boxes have")
        num_classes //= anchors
        fields = {"reg_max": values // (5 * anchors) - 1}
    else:
        fields = {"reg_max": values // 4 - 1, "quality": QUALITY in state}
        num_classes -= QUALITY in state  # see without_background
    return Architecture(channels=channels, tower_convs=count(state, "bbox_head.cls_convs.{}.conv.weight"), head=head,
                        **fields, **read_backbone(state, path)), num_classes


def read_backbone(state: Mapping[str, torch.Tensor], path: str | Path) -> dict[str, Any]:
    """The fields of an Architecture that describe the backbone of a state dict of mmdetection.

    Raises UserError if it is another than ours."""
    blocks, bottleneck = count(state, "backbone.layer3.{}.conv1.weight"), "backbone.layer3.0.conv3.weight" in state
    family = "res2net" if "backbone.layer1.0.convs.0.weight" in state else "resnet"
    if getattr(state.get("backbone.layer1.0.conv2.weight"), "shape", ())[1:2] == (4,):  # channels of a group
        family = "resnext"
    deformable = (re.match(r"backbone\.(layer\d)\..*\.conv_offset\.", name) for name in state)
    layers = tuple(sorted({match[1] for match in deformable if match}))
    for depth, (block, numbers, _) in DEPTHS.items():
        for dcn in DCN:
            if ((numbers[2], block is Bottleneck, DCN[dcn]) == (blocks, bottleneck, layers)
                    and is_backbone(depth, family, dcn)):
                return {"depth": depth, "backbone": family, "dcn": dcn}
    raise UserError(f"{path}: its backbone has {blocks} {'bottleneck' if bottleneck else 'basic'} blocks in layer3 and "
                    f"deformable convolutions in {', '.join(layers) or 'no layer'}; expected a ResNet-"
                    f"{', '.join(map(str, DEPTHS))}, or of bottlenecks also a ResNeXt or Res2Net and deformable "
                    "convolutions in layer2 to layer4 or in layer3 and layer4")


def without_background(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict whose classifier has the channels of the classes alone: GFocal V2's has one more, of the background,
    which neither its loss nor its tests read."""
    if QUALITY not in state:
        return state
    return {name: value[:-1] if name in (CLASSIFY, CLASSIFY_BIAS) else value for name, value in state.items()}


def count(state: Iterable[str], template: str) -> int:
    """How many names of `state` are `template` with a number."""
    pattern = re.escape(template).replace(r"\{\}", r"\d+")
    return sum(re.fullmatch(pattern, name) is not None for name in state)


def check_classes(classes: Sequence[Any] | None, num_classes: int, path: str | Path, source: str | Path | None) -> None:
    """Raise UserError unless `classes` are the names of so many classes. source: where they stand, None for nowhere."""
    if classes is None:
        raise UserError(f"{path}: does not name its {num_classes} classes; give a text file with one name a line as "
                        "--classes")
    if len(classes) != num_classes:
        raise UserError(f"{source}: names {len(classes)} classes; expected {num_classes}, as {path} has")
    wrong = [name for name in classes if not isinstance(name, str) or not name.strip() or not name.isprintable()]
    wrong += [name for name, times in Counter(map(str, classes)).items() if times > 1]
    if wrong:
        raise UserError(f"{source}: {repr(wrong[0])[:80]} is no name, or not of one class alone; expected "
                        f"{num_classes} different names")


# ---- the program -----------------------------------------------------------------------------------------------------


def convert(path: str | Path, classes_file: str | Path | None, short: int, long: int,
            teacher: bool = False) -> dict[str, Any]:
    """The checkpoint of a Detector of a file of mmdetection, as `save_checkpoint` takes it.

    classes_file: None, or a text file with the names of the classes. short, long: limits of an image's sides in pixels
    (see `transforms.target_size`). teacher: convert the teacher in the file."""
    state, classes = read_mmdet(path, teacher)
    if classes_file:
        classes = [name for _, name in list_lines(classes_file)]
    architecture, num_classes = read_architecture(state, path)
    check_classes(classes, num_classes, path, classes_file or path)
    description = {"stage": "converted", "classes": classes, "model": describe_model(architecture),
                   "preprocessing": describe_preprocessing(short, long), "epoch": 0, "source_sha256": sha256_of(path)}
    if not is_description(description):
        expected = ", ".join(f"{name} {low} to {high}" for name, (low, high) in RANGES.items())
        raise UserError(f"{path}: has {num_classes} classes and {architecture}; expected at most 10000 and {expected}, "
                        "channels a multiple of 32")
    with torch.device("meta"):  # names and shapes alone
        ours = Detector(num_classes, architecture).state_dict()
    state = without_background(state)
    check_entries(path, state, to_mmdet(ours, architecture.head), "such a detector in mmdetection")
    model = from_mmdet(state, ours, architecture.head)
    model = {name: value.to(ours[name].dtype).clone(memory_format=torch.contiguous_format)
             for name, value in model.items()}
    return {"model": model, "description": description}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", metavar="FILE", help="checkpoint or state dict of mmdetection")
    parser.add_argument("output", metavar="OUTPUT", help="the checkpoint to write")
    parser.add_argument("--classes", metavar="NAMES", help="text file with the names of the classes, one a line, in "
                        "the order of their ids (default: as FILE names them)")
    parser.add_argument("--short", type=int, default=800, help="tests resize images to this short side, in pixels "
                        "(default: 800)")
    parser.add_argument("--long", type=int, default=1333, help="... unless their long side would exceed this (default: "
                        "1333)")
    parser.add_argument("--teacher", action="store_true", help="convert the teacher that LAD and CoLAD have in the "
                        "same file, in place of the student")
    args = parser.parse_args(argv)
    if not all(32 <= side <= 100_000 for side in (args.short, args.long)):
        raise UserError(f"--short {args.short} --long {args.long}: expected 32 to 100000 pixels")
    if Path(args.output).exists() and os.path.samefile(args.weights, args.output):
        raise UserError(f"{args.output}: is the file to convert; give another name")
    checkpoint = convert(args.weights, args.classes, args.short, args.long, args.teacher)
    save_checkpoint(args.output, checkpoint)
    description = checkpoint["description"]
    model = description["model"]
    head = {"gfl": "GFL", "paa": f"PAA ({model['auxiliary']})", "rotated": "rotated RetinaNet"}[model["head"]]
    head += " with quality (GFocal V2)" * model["quality"]
    print(f"{args.output}: {head} on {backbone_name(model['depth'], model['backbone'], model['dcn'])}, "
          f"{len(description['classes'])} classes, {len(checkpoint['model'])} entries")


if __name__ == "__main__":
    run_script(main)
