"""What a training step of the detectors of oriented boxes costs: rotated RetinaNet, the same taught by Rotated-LD, and
torchvision's RetinaNet, of horizontal boxes, on the same ResNet and images.

    python -m benchmarks.bench_rotated
    python -m benchmarks.bench_rotated --depth 18 --teacher-depth 34 --height 320 --width 320 --batch-size 4

A step is that of `detection.engine.train_step` on drawn noise with random boxes; weights are random, which changes no
time. Every ResNet has its stem, layer1 and batch-norm statistics frozen."""

import math

import torch
from torchvision.models.detection.retinanet import RetinaNet

from benchmarks.bench_detection import (
    conditions,
    draw_batch,
    forward_step,
    our_step,
    random_teacher,
    rows_of_steps,
    step_flags,
    torchvision_step,
)
from benchmarks.common import finish, interleaved, set_up
from common.precision import resolve_precision
from common.runtime import run_script
from detection.geometry.oriented import circumscribed, from_horizontal
from detection.methods.rotated import ROTATED, RotatedSettings
from detection.methods.rotated_ld import ROTATED_LD, RotatedLDSettings


def turned(boxes):
    """(count, 4) boxes, each turned to any angle, (count, 5)."""
    boxes = from_horizontal(boxes)
    boxes[:, 4] = math.pi / 2 * torch.rand(len(boxes))
    return boxes


def measure(args, device, precision):
    """The rows of the table."""
    batch = draw_batch(args)
    oriented = batch._replace(boxes=[turned(boxes) for boxes in batch.boxes])
    horizontal = batch._replace(boxes=[circumscribed(boxes) for boxes in oriented.boxes])
    teacher = random_teacher(ROTATED.architecture(RotatedSettings(depth=args.teacher_depth)), device)
    given = args, oriented, device, precision
    seconds = interleaved({
        "RetinaNet, torchvision": torchvision_step(args, horizontal, device, precision, RetinaNet),
        "rotated RetinaNet": our_step(*given, ROTATED, RotatedSettings(clip=35.0)),
        "with Rotated-LD": our_step(*given, ROTATED_LD, RotatedLDSettings(clip=35.0), teacher),
        "the teacher's forward": forward_step(teacher, oriented, device, precision),
    }, args.repeats, device)
    retina, alone, taught, asked = seconds.values()
    return rows_of_steps(seconds, {
        "rotated RetinaNet": ("RetinaNet", alone / retina, 1.25),
        "with Rotated-LD": ("the student and the teacher's forward", taught / (alone + asked), 1.05)})


def main():
    args = step_flags(__doc__, "rotated", depth=18, teacher_depth=34, height=1024, width=1024).parse_args()
    device = set_up(args)
    precision = resolve_precision(args.precision, device)
    finish(args, device, f"a training step of {conditions(args, precision)}", measure(args, device, precision))


if __name__ == "__main__":
    run_script(main)
