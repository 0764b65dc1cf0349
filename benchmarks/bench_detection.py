"""What a training step of the detectors costs: GFL, GFL taught by LD and by LTD, PAA, PAA taught by LAD, and
torchvision's FCOS on the same ResNet and images; what PAA's assignment costs beside a loop over the objects with a
mixture of scikit-learn for each, as in the released code; and what the ways of suppression cost.

    python -m benchmarks.bench_detection
    python -m benchmarks.bench_detection --depth 18 --teacher-depth 50 --height 320 --width 320 --batch-size 4
    python -m benchmarks.bench_detection --only assignment --objects 500

A step is that of `detection.engine.train_step` on drawn noise with random boxes; weights are random, which changes no
time. Every ResNet has its stem, layer1 and batch-norm statistics frozen."""

import dataclasses

import torch
from torchvision import ops
from torchvision.models import get_model
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.fcos import FCOS
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from benchmarks.common import finish, interleaved, parser, print_table, set_up
from common.precision import resolve_precision
from common.runtime import autocast, run_script
from common.weights import fold_batch_norm
from detection.assigners.atss import assign_by_atss
from detection.assigners.paa import CANDIDATES, assign_by_paa, costs_of, potential_positives
from detection.assigners.targets import ground_truth
from detection.data.batches import Batch
from detection.data.transforms import MEAN, STD
from detection.distillers.ld import ld_losses
from detection.engine import Run, train_step
from detection.geometry.anchors import make_anchors, pyramid_sizes
from detection.geometry.suppression import SUPPRESSIONS
from detection.losses.gfl import gfl_losses
from detection.methods.gfl import GFL, GFLSettings
from detection.methods.lad import LAD, LADSettings
from detection.methods.ld import LD, LDSettings
from detection.methods.ltd import LTD, LTDSettings
from detection.methods.paa import PAA, PAASettings
from detection.network.backbone import DEPTHS
from detection.network.detector import Architecture, Detector
from detection.network.gfl_head import Outputs
from detection.network.paa_head import Outputs as PAAOutputs

CLASSES = 15  # DOTA's


def draw_boxes(count, height, width, generator):
    """(count, 4) boxes of 8 to 256 pixels within an image."""
    sides = 8 * 32 ** torch.rand(count, 2, generator=generator)
    corners = torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - sides).clamp(min=0)
    return torch.cat([corners, (corners + sides).minimum(torch.tensor([width, height]))], dim=1)


def draw_batch(args):
    """A data.Batch of noise."""
    generator, size = torch.Generator().manual_seed(0), (args.height, args.width)
    images = torch.randint(0, 256, (args.batch_size, 3, *size), dtype=torch.uint8, generator=generator)
    boxes = [draw_boxes(args.objects, *size, generator) for _ in images]
    labels = [torch.randint(0, CLASSES, (args.objects,), generator=generator) for _ in images]
    return Batch(images, boxes, labels, [size] * args.batch_size, list(range(args.batch_size)),
                 [(1.0, 1.0)] * args.batch_size)


def our_step(args, batch, device, precision, method, settings, teacher=None):
    """A function that does a training step of a method."""
    settings = dataclasses.replace(settings, depth=args.depth, lr=1e-6)
    network = Detector(CLASSES, method.architecture(settings), frozen=True)
    run = Run(name=method.name, method=method, settings=settings, device=device, precision=precision, network=network,
              optimizer=None, sampler=[0], description={}, train_annotations=None, test_annotations=None,
              teacher=teacher, companions=method.companions(CLASSES, settings))
    trained = run.trainee.to(device, memory_format=torch.channels_last).train()
    run.optimizer = sgd(trained)
    return lambda: train_step(run, trained, batch)


def sgd(network):
    """The optimizer of every contestant."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return torch.optim.SGD(parameters, lr=1e-6, momentum=0.9, weight_decay=1e-4, fused=True)


def torchvision_step(args, batch, device, precision, detector=FCOS):
    """A function that does a training step of a detector of torchvision."""
    resnet = get_model(f"resnet{args.depth}", weights=None)
    channels = resnet.fc.in_features
    body = _resnet_fpn_extractor(resnet, 3, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(channels, 256))
    mean, std = ([value / 255 for value in values] for values in (MEAN, STD))
    network = detector(body, CLASSES, min_size=args.height, max_size=args.width, image_mean=mean, image_std=std)
    network.to(device, memory_format=torch.channels_last).train()
    for module in network.backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    optimizer = sgd(network)

    def step():
        images = batch.images.to(device).float().div(255).contiguous(memory_format=torch.channels_last)
        targets = [{"boxes": boxes.to(device), "labels": labels.to(device)}
                   for boxes, labels in zip(batch.boxes, batch.labels, strict=True)]
        with autocast(device, precision):
            losses = network(list(images), targets)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        optimizer.step()

    return step


def loss_step(args, batch, device, distils=False):
    """A function that assigns the anchors of a batch and computes the losses of GFL, and with `distils` of LD, with
    their gradients, the networks left out."""
    sizes = pyramid_sizes(args.height, args.width)
    shape = (args.batch_size, len(make_anchors(sizes, device).boxes))
    logits = torch.full((*shape, CLASSES), -4.6, device=device, requires_grad=True)
    edges = torch.randn((*shape, 4, 17), device=device, requires_grad=True)
    teacher = Outputs(torch.randn_like(logits), torch.randn_like(edges), [])
    boxes, labels = (torch.cat(parts).to(device) for parts in (batch.boxes, batch.labels))

    def step():
        anchors, outputs = make_anchors(sizes, device), Outputs(logits, edges, [])
        truth = ground_truth(boxes, labels, [args.objects] * args.batch_size, batch.sizes, CLASSES)
        targets = assign_by_atss(anchors, truth)
        losses = gfl_losses(outputs, targets, anchors)
        if distils:
            losses |= ld_losses(outputs, teacher, targets, anchors, LDSettings())
        sum(losses.values()).backward()

    return step


def random_teacher(architecture, device):
    """A frozen teacher."""
    network = fold_batch_norm(Detector(CLASSES, architecture)).requires_grad_(False)
    return network.to(device, memory_format=torch.channels_last)


def forward_step(teacher, batch, device, precision):
    """A function that asks a teacher."""
    images = batch.images.to(device).float().contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def step():
        with autocast(device, precision):
            teacher(images)

    return step


def measure_steps(args, device, precision):
    """Rows of the table of training steps."""
    batch = draw_batch(args)
    teachers = [random_teacher(Architecture(args.teacher_depth, head=head), device) for head in ("gfl", "paa")]
    given = args, batch, device, precision
    seconds = interleaved({
        "FCOS, torchvision": torchvision_step(*given),
        "GFL": our_step(*given, GFL, GFLSettings()),
        "GFL with LD": our_step(*given, LD, LDSettings(), teachers[0]),
        "GFL with LTD": our_step(*given, LTD, LTDSettings(), teachers[0]),
        "GFL with LTD but for LIC": our_step(*given, LTD, LTDSettings(lic=False), teachers[0]),
        "the GFL teacher's forward": forward_step(teachers[0], batch, device, precision),
        "PAA": our_step(*given, PAA, PAASettings()),
        "PAA with LAD": our_step(*given, LAD, LADSettings(), teachers[1]),
        "the PAA teacher's forward": forward_step(teachers[1], batch, device, precision),
        "assignment and losses of GFL": loss_step(args, batch, device),
        "assignment and losses of GFL with LD": loss_step(args, batch, device, True),
    }, args.repeats, device)
    fcos, gfl, taught, by_ltd, without_lic, asked, paa, lad, asked_paa, losses, all_losses = seconds.values()
    share = 0.10 if device.type == "cuda" else None
    return rows_of_steps(seconds, {
        "GFL": ("FCOS", gfl / fcos, 1.15),
        "GFL with LD": ("GFL and the teacher's forward", taught / (gfl + asked), 1.05),
        "GFL with LTD": ("GFL and the teacher's forward", by_ltd / (gfl + asked), 1.15),
        "GFL with LTD but for LIC": ("GFL and the teacher's forward", without_lic / (gfl + asked), 1.15),
        "PAA": ("GFL", paa / gfl, 1.25),
        "PAA with LAD": ("PAA and the teacher's forward", lad / (paa + asked_paa), 1.08),
        "assignment and losses of GFL": ("GFL", losses / gfl, share),
        "assignment and losses of GFL with LD": ("GFL with LD", all_losses / taught, share)})


def rows_of_steps(seconds, goals):
    """Rows of a table of training steps. seconds: {step: seconds}. goals: {step: (name of what it is measured by, ratio
    to that, the ratio to stay below or None)}."""
    rows = []
    for name, taken in seconds.items():
        other, ratio, goal = goals.get(name, (None, None, None))
        rows.append({"step": name, "ms": round(1000 * taken, 1), "times": other, "ratio": ratio and round(ratio, 3),
                     "goal": goal})
    return rows


def loop_over_objects(outputs, anchors, truth, mixture):
    """The cost that each object's positives end at, found object by object. mixture: sklearn.mixture."""
    potential = potential_positives(anchors, truth)
    costs = costs_of(outputs, potential, anchors, truth)
    found = []
    for number in range(len(truth.boxes)):
        own = potential.objects == number
        levels = anchors.levels[potential.anchors[own]]
        candidates = [costs[own][levels == level] for level in range(len(anchors.sizes))]
        candidates = torch.cat([level.topk(min(CANDIDATES, len(level)), largest=False).values
                                for level in candidates]).sort().values
        if len(candidates) < 2:
            continue
        values = candidates.double().cpu().numpy()[:, None]
        fitted = mixture.GaussianMixture(2, weights_init=[0.5, 0.5], means_init=[values.min(0), values.max(0)],
                                         precisions_init=[[1.0], [1.0]], covariance_type="diag").fit(values)
        cheap, density = fitted.predict(values) == 0, fitted.score_samples(values)
        if cheap.any():
            found.append(candidates[torch.from_numpy(cheap).to(candidates.device)][density[cheap].argmax()])
    return found


def measure_assignment(args, device):
    """Rows: milliseconds of PAA's assignment of a batch, all objects at once and object by object."""
    from sklearn import mixture  # of requirements-dev.txt

    sizes, generator = pyramid_sizes(args.height, args.width), torch.Generator().manual_seed(0)
    anchors, rows = make_anchors(sizes, device), []
    shape = args.batch_size, len(anchors.boxes)
    logits, deltas = (torch.randn(*shape, size, generator=generator).to(device) for size in (CLASSES, 4))
    outputs = PAAOutputs(logits - 4, deltas, [])
    for objects in sorted({args.objects, 500}):
        boxes = torch.cat([draw_boxes(objects, args.height, args.width, generator) for _ in range(args.batch_size)])
        labels = torch.randint(0, CLASSES, (len(boxes),), generator=generator)
        truth = ground_truth(boxes.to(device), labels.to(device), [objects] * args.batch_size,
                             [(args.height, args.width)] * args.batch_size, CLASSES)
        seconds = interleaved({
            "all at once": lambda truth=truth: assign_by_paa(outputs, anchors, truth),
            "object by object": lambda truth=truth: loop_over_objects(outputs, anchors, truth, mixture),
        }, args.repeats, device, warm_up=1)
        slow = seconds["object by object"]
        rows += [{"assignment of PAA": name, "images": args.batch_size, "objects each": objects,
                  "ms": round(1000 * taken, 1), "times the loop": round(taken / slow, 3)}
                 for name, taken in seconds.items()]
    return rows


def measure_suppression(device, repeats):
    """Rows: milliseconds of the ways of suppression on so many boxes around 300 objects, against torchvision's NMS;
    with a limit of 100, which ends Cluster-NMS early, as in tests, and without."""
    rows = []
    for count in (1000, 5000):
        for classes in (1, CLASSES):
            generator = torch.Generator().manual_seed(0)
            chosen = torch.randint(0, 300, (count,), generator=generator)
            boxes = draw_boxes(300, 800, 1333, generator)[chosen] + 4 * torch.randn(count, 4, generator=generator)
            found = [part.to(device) for part in (boxes, torch.rand(count, generator=generator), chosen % classes)]
            ways = {"torchvision.ops.batched_nms": lambda found=found: ops.batched_nms(*found, 0.6)}
            for name, suppress in SUPPRESSIONS.items():
                for limit in (100, count):
                    ways[f"{name}, at most {limit}"] = lambda suppress=suppress, limit=limit, found=found: suppress(
                        *found, limit=limit)
            seconds = interleaved(ways, repeats, device)
            first = next(iter(seconds.values()))
            rows += [{"suppression": name, "boxes": count, "classes": classes, "ms": round(1000 * taken, 2),
                      "times torchvision": round(taken / first, 2)} for name, taken in seconds.items()]
    return rows


def step_flags(description, name, depth, teacher_depth, height, width):
    """An argument parser with the flags of a benchmark of training steps, of these defaults."""
    flags = parser(description, name)
    flags.add_argument("--depth", type=int, default=depth, choices=tuple(DEPTHS))
    flags.add_argument("--teacher-depth", type=int, default=teacher_depth, choices=tuple(DEPTHS))
    flags.add_argument("--height", type=int, default=height)
    flags.add_argument("--width", type=int, default=width)
    flags.add_argument("--batch-size", type=int, default=2)
    flags.add_argument("--objects", type=int, default=20, help="of each image")
    flags.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    return flags


def conditions(args, precision):
    """What a benchmark of training steps was measured on."""
    return (f"{args.batch_size} images of {args.height}x{args.width}, ResNet-{args.depth}, teacher ResNet-"
            f"{args.teacher_depth}, {precision}")


def main():
    flags = step_flags(__doc__, "detection", depth=50, teacher_depth=101, height=800, width=1344)
    flags.add_argument("--only", choices=("steps", "assignment", "suppression"), help="measure this alone")
    args = flags.parse_args()
    device = set_up(args)
    precision = resolve_precision(args.precision, device)
    tables = {"suppression": lambda: measure_suppression(device, max(args.repeats, 7)),
              "assignment": lambda: measure_assignment(args, device),
              "steps": lambda: measure_steps(args, device, precision)}
    rows = {name: measure() for name, measure in tables.items() if args.only in (None, name)}
    *others, last = rows
    for name in others:
        print_table(rows[name])
    finish(args, device, conditions(args, precision), rows[last], **{name: rows[name] for name in others})


if __name__ == "__main__":
    run_script(main)
