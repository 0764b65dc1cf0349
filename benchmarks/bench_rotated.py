"""What a training step of the detectors of oriented boxes costs: rotated RetinaNet, the same taught by Rotated-LD, and
torchvision's RetinaNet, of horizontal boxes, on the same ResNet and images.

    python -m benchmarks.bench_rotated
    python -m benchmarks.bench_rotated --depth 18 --teacher-depth 34 --height 320 --width 320 --batch-size 4

A step is that of `detection.engine.train_step` on drawn noise with random boxes; weights are random, which changes no
time. Every ResNet has its stem, layer1 and batch-norm statistics frozen."""

import math

import torch
from torchvision.models.detection.retinanet import RetinaNet

from benchmarks.bench_detection import CLASSES, draw_boxes, forward_step, sgd, torchvision_step
from benchmarks.common import finish, interleaved, parser, set_up
from common.precision import resolve_precision
from common.runtime import run_script
from common.weights import fold_batch_norm
from detection.data.batches import Batch
from detection.engine import Run, train_step
from detection.geometry.oriented import circumscribed, from_horizontal
from detection.methods.rotated import ROTATED, RotatedSettings
from detection.methods.rotated_ld import ROTATED_LD, RotatedLDSettings
from detection.network.detector import Detector


def draw_batch(args):
    """A data.Batch of noise with oriented boxes."""
    generator, size = torch.Generator().manual_seed(0), (args.height, args.width)
    images = torch.randint(0, 256, (args.batch_size, 3, *size), dtype=torch.uint8, generator=generator)
    boxes = [from_horizontal(draw_boxes(args.objects, *size, generator)) for _ in images]
    for own in boxes:
        own[:, 4] = math.pi / 2 * torch.rand(args.objects, generator=generator)
    labels = [torch.randint(0, CLASSES, (args.objects,), generator=generator) for _ in images]
    return Batch(images, boxes, labels, [size] * args.batch_size, list(range(args.batch_size)),
                 [(1.0, 1.0)] * args.batch_size)


def our_step(batch, device, precision, method, settings, teacher=None):
    """A function that does a training step of a method."""
    network = Detector(CLASSES, method.architecture(settings), frozen=True)
    network.to(device, memory_format=torch.channels_last)
    run = Run(name=method.name, method=method, settings=settings, device=device, precision=precision, network=network,
              optimizer=sgd(network), sampler=[0], description={}, train_annotations=None, test_annotations=None,
              teacher=teacher)
    trained = run.trainee.train()
    return lambda: train_step(run, trained, batch)


def measure(args, device, precision):
    """The rows of the table."""
    batch = draw_batch(args)
    horizontal = batch._replace(boxes=[circumscribed(boxes) for boxes in batch.boxes])
    shared = {"lr": 1e-6, "depth": args.depth, "clip": 35.0}
    architecture = ROTATED.architecture(RotatedSettings(depth=args.teacher_depth))
    teacher = fold_batch_norm(Detector(CLASSES, architecture)).requires_grad_(False)
    teacher.to(device, memory_format=torch.channels_last)
    seconds = interleaved({
        "RetinaNet, torchvision": torchvision_step(args, horizontal, device, precision, RetinaNet),
        "rotated RetinaNet": our_step(batch, device, precision, ROTATED, RotatedSettings(**shared)),
        "with Rotated-LD": our_step(batch, device, precision, ROTATED_LD, RotatedLDSettings(**shared), teacher),
        "the teacher's forward": forward_step(teacher, batch, device, precision),
    }, args.repeats, device)
    retina, alone, taught, asked = seconds.values()
    goals = {"rotated RetinaNet": ("RetinaNet", alone / retina, 1.25),
             "with Rotated-LD": ("the student and the teacher's forward", taught / (alone + asked), 1.05)}
    return [{"step": name, "ms": round(1000 * taken, 1), "times": goals.get(name, (None,))[0],
             "ratio": round(goals[name][1], 3) if name in goals else None, "goal": goals.get(name, (0, 0, None))[2]}
            for name, taken in seconds.items()]


def main():
    flags = parser(__doc__, "rotated")
    flags.add_argument("--depth", type=int, default=18, choices=(18, 34, 50, 101))
    flags.add_argument("--teacher-depth", type=int, default=34, choices=(18, 34, 50, 101))
    flags.add_argument("--height", type=int, default=1024)
    flags.add_argument("--width", type=int, default=1024)
    flags.add_argument("--batch-size", type=int, default=2)
    flags.add_argument("--objects", type=int, default=20, help="of each image")
    flags.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    args = flags.parse_args()
    device = set_up(args)
    precision = resolve_precision(args.precision, device)
    finish(args, device, f"a training step of {args.batch_size} images of {args.height}x{args.width}, ResNet-"
           f"{args.depth}, teacher ResNet-{args.teacher_depth}, {precision}", measure(args, device, precision))


if __name__ == "__main__":
    run_script(main)
