"""torchvision's FCOS trained and tested as the detectors of this project are, so that its AP can stand beside theirs:
the same ResNet with the same start, image sizes, batches in the same order, schedule, optimizer and test.

    python -m benchmarks.bench_fcos --train train.json --test test.json --depth 18 --init none --output runs/mine/fcos
    python -m detection.compare FCOS=runs/mine/fcos GFL=runs/mine/gfl PAA=runs/mine/paa

Writes results.json as a run of this project does. It is not resumed and trains on one device."""

import argparse
import dataclasses
import time
from pathlib import Path

import torch
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.fcos import FCOS, FCOSHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from common.files import write_json
from common.flags import add_flags
from common.precision import precision_of_test, resolve_precision
from common.runtime import UserError, autocast, device_name, library_versions, resolve_device, run_script
from common.training import sgd
from detection.data.annotations import fingerprint, for_training, read_annotations
from detection.data.batches import AspectRatioBatchSampler, DetectionDataset, loader, test_draws
from detection.data.transforms import MEAN, STD
from detection.engine import FLIP, learning_rate, train_value_range
from detection.evaluation import average_precisions, read_test_annotations, settings_of_test
from detection.geometry.suppression import Selection
from detection.network.backbone import Backbone, initialise
from detection.network.detector import HEADS
from detection.settings import Settings, check_ranges, data_name
from detection.tables import results_table

FLAGS = ("train", "test", "images", "test_images", "output", "init", "frozen", "depth", "channels", "tower_convs",
         "epochs", "batch_size", "lr", "lr_steps", "warmup_steps", "momentum", "weight_decay", "clip", "repeat",
         "short", "long", "value_range", "metric", "seed", "device", "precision", "workers")


def build(num_classes, settings):
    """FCOS as torchvision builds it, on our ResNet, with our widths and our limits of detections."""
    frozen = settings.frozen and settings.init != "none"
    resnet = Backbone(settings.depth, frozen)
    print(f"initialised: {resnet.name} with {initialise(resnet, settings.init)}")
    channels = settings.channels
    layers = {f"layer{number}": str(number) for number in (2, 3, 4)}
    body = BackboneWithFPN(resnet, layers, list(resnet.out_channels), channels, LastLevelP6P7(channels, channels))
    mean, std = ([value / 255 for value in values] for values in (MEAN, STD))
    head = FCOSHead(channels, 1, num_classes, settings.tower_convs)
    limits = Selection()
    network = FCOS(body, num_classes, head=head, image_mean=mean, image_std=std, score_thresh=limits.least_score,
                   nms_thresh=limits.overlap, detections_per_img=limits.most, topk_candidates=limits.candidates)
    network.transform.resize = lambda image, target=None: (image, target)  # images come in the size of our detectors
    network.keeps_statistics = frozen
    return network


def train_mode(network):
    """The network in training mode, the batch norms of a fine-tuned ResNet left alone."""
    network.train()
    for module in network.backbone.body.modules():
        if network.keeps_statistics and isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return network


def images_of(batch, device):
    """[(3, h, w) in 0..1], without the padding."""
    return [image[:, :height, :width].to(device).float() / 255
            for image, (height, width) in zip(batch.images, batch.sizes, strict=True)]


def train(network, dataset, settings, device, precision, most_steps):
    """Train for the epochs of the settings, or `most_steps` steps; print a line an epoch."""
    optimizer = sgd(network.parameters(), settings, device)
    shapes = [(record.height, record.width) for record in dataset.annotations.records]
    sampler = AspectRatioBatchSampler(shapes, settings.batch_size, settings.seed, 0, 1, settings.short, settings.long,
                                      FLIP, settings.repeat)
    for epoch in range(settings.epochs):
        train_mode(network)
        sampler.set_position(epoch, 0)
        total, started = 0.0, time.perf_counter()
        for step, batch in enumerate(loader(dataset, sampler, settings.workers, device)):
            if epoch * len(sampler) + step == most_steps:
                return
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, epoch + 1, step, len(sampler))
            targets = [{"boxes": boxes.to(device), "labels": labels.to(device)}
                       for boxes, labels in zip(batch.boxes, batch.labels, strict=True)]
            with autocast(device, precision):
                losses = network(images_of(batch, device), targets)
            loss = sum(losses.values())
            if not loss.isfinite():
                raise UserError(f"epoch {epoch + 1}, step {step + 1}: the loss is {loss.item()}; try a lower --lr")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if settings.clip:
                torch.nn.utils.clip_grad_norm_(network.parameters(), settings.clip)
            optimizer.step()
            total += loss.item()
        images = len(sampler) * settings.batch_size / (time.perf_counter() - started)
        print(f"epoch {epoch + 1:>3}/{settings.epochs}  loss {total / len(sampler):.4f}  {images:.1f} images/s",
              flush=True)


@torch.inference_mode()
def detect_all(network, dataset, settings, device, precision):
    """The detections of every image in pixels of its file, one image at a time, as `detection.evaluation` has them."""
    network.eval()
    draws = [[draw] for draw in test_draws(dataset.annotations, settings.short[1], settings.long)]
    found = []
    for batch in loader(dataset, draws, settings.workers, device):
        with autocast(device, precision):
            (detections,) = network(images_of(batch, device))
        detections = {name: values.cpu() for name, values in detections.items()}
        x, y = batch.scales[0]
        found.append({**detections, "boxes": detections["boxes"].float() / torch.tensor([x, y, x, y])})
    return found


def parse():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(flags, [field for field in dataclasses.fields(Settings) if field.name in FLAGS])
    flags.add_argument("--most-steps", type=int, default=-1, help="stop after so many steps, to try it out")
    args = vars(flags.parse_args())
    most_steps = args.pop("most_steps")
    settings = Settings(**args)
    output = settings.output.replace("{data}", data_name(settings.train)).replace("{stage}", "fcos")
    settings = settings_of_test(dataclasses.replace(settings, output=output), HEADS["gfl"])
    check_ranges(settings)
    return settings, most_steps


def main():
    settings, most_steps = parse()
    device = resolve_device(settings.device)
    precision = resolve_precision(settings.precision, device)
    path = Path(settings.output) / "results.json"
    if path.exists():
        raise UserError(f"{path}: is there already; give another --output")
    annotations = for_training(read_annotations(settings.train, settings.images or None))
    test_annotations = read_test_annotations(settings, annotations.classes)
    torch.manual_seed(settings.seed)
    network = build(len(annotations.classes), settings).to(device, memory_format=torch.channels_last)
    print(f"FCOS on {data_name(settings.train)}: {len(annotations.records)} images to train on, "
          f"{len(test_annotations.records)} to test; {device_name(device)}; precision {precision}", flush=True)
    value_range = train_value_range(settings, annotations)
    train(network, DetectionDataset(annotations, value_range), settings, device, precision, most_steps)
    found = detect_all(network, DetectionDataset(test_annotations, value_range), settings, device,
                       precision_of_test(settings.precision, device))
    results = average_precisions(found, test_annotations, settings.metric)
    results.pop("curves")
    results = {"stage": "fcos", "dataset": data_name(settings.test), "epoch": settings.epochs,
               "test_images": fingerprint(test_annotations), **results,
               "settings": {"test": settings.test, "metric": settings.metric, "suppression": "auto"},
               "suppression": "nms",
               "parameters": sum(parameter.numel() for parameter in network.parameters()),
               "device": device_name(device), "versions": library_versions()}
    print(results_table(results))
    write_json(path, results)
    print(f"{results['parameters'] / 1e6:.2f} M parameters; written: {path}")


if __name__ == "__main__":
    run_script(main)
