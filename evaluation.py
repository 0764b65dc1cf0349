"""How good a network is: its confusion matrix, its cost, and the test entry `--test-only`."""

import dataclasses
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import report
from dataset import class_counts, network_input, read_info
from files import read_json, sha256_of
from inference import batch_size, inference_network
from precision import resolve_precision
from resnet50 import load_network
from runtime import (
    UserError,
    device_name,
    library_versions,
    rank,
    say,
    sum_over_processes,
    world_size,
)
from stage import check_classes, load_test_images, read_lists


@torch.inference_mode()
def evaluate(network, dataset, num_classes, device, precision):
    """Confusion matrix of `network` over `dataset`, (true classes, predicted classes) int64 on the CPU.

    With several processes each takes a share; every image counts once."""
    logits_of, together = inference_network(network, device, precision), batch_size(device)
    share = range(rank(), len(dataset), world_size())
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
    for start in range(0, len(share), together):
        images, labels = dataset.__getitems__(list(share[start:start + together]))
        pairs = labels.to(device) * num_classes + logits_of(images).argmax(1)
        confusion += torch.bincount(pairs, minlength=num_classes * num_classes)
    return sum_over_processes(confusion).view(num_classes, num_classes).cpu()


@torch.inference_mode()
def measure(network, image_size, device, precision, repeats=5):
    """Parameters, FLOPs of one image (2 a multiply-add, convolutions and linear layers) and the milliseconds that an
    image takes in a batch of 8 (median of 5 batches after one to warm up)."""
    images = torch.zeros(8, 1, image_size, image_size, dtype=torch.uint8, device=device)
    with FlopCounterMode(display=False) as counter:
        network.eval()(network_input(images[:1]))
    logits_of, seconds = inference_network(network, device, precision), []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        logits_of(images).cpu()  # the copy waits for the device
        seconds.append(time.perf_counter() - started)
    return {"parameters": sum(parameter.numel() for parameter in network.parameters()),
            "flops": counter.get_total_flops(),
            "ms_per_image": round(1000 * sorted(seconds[1:])[repeats // 2] / len(images), 3),
            "ms_per_image_batch": len(images)}


def test(stage, settings, info, classes, train_labels, dataset, weights, device):
    """Test a checkpoint, print the table, write results.json, results.txt and confusion.png into `settings.output`.
    Returns the results on the first process, None on the others.

    info: the DatasetInfo. classes: the ids to report on. train_labels: of the images it was trained on, to be counted.
    dataset: the test images. The precision `auto` is fp32 here: a number that is compared with a published one should
    not hang on the machine."""
    precision = resolve_precision("fp32" if settings.precision == "auto" else settings.precision, device)
    num_classes = len(info.classes)
    network, description = load_network(weights, num_classes)
    network.to(device, memory_format=torch.channels_last)
    confusion = evaluate(network, dataset, num_classes, device, precision)
    if rank() != 0:
        return None
    description = description or {"stage": stage.name, "selected_on": "unknown", "epoch": None}
    results = {
        "dataset": info.name, "split": "test", "stage": description["stage"], "classes_of": stage.group,
        "selected_on": description["selected_on"], "epoch": description["epoch"],
        "weights": str(weights), "weights_sha256": sha256_of(weights),
        **report.accuracies(confusion, info, classes, class_counts(train_labels, num_classes)),
        **measure(network, settings.image_size, device, precision), "image_size": settings.image_size,
        "device": device_name(device), "precision": precision, "versions": library_versions(),
        "confusion": confusion.tolist(),
    }
    report.write_results(Path(settings.output), results)
    return results


def test_only(stage, settings, given, device):
    """`--test-only`: test a checkpoint of this project or released weights. Returns the exit status.

    given: the flags that were given; without --image-size a checkpoint is tested at the size it was trained at."""
    output = Path(settings.output)
    weights = Path(settings.weights or output / "best.pt")
    if weights.resolve().parent != output.resolve() and (output / "settings.json").exists():
        raise UserError(f"{output}: holds a run of its own; give another --output for the test of {weights}")
    info = read_info(settings.data_root)
    _, description = load_network(weights, len(info.classes))
    earlier = output / "results.json"
    if earlier.exists():
        tested = read_json(earlier)
        if not isinstance(tested, dict) or tested.get("weights_sha256") != sha256_of(weights):
            raise UserError(f"{earlier}: is of other weights than {weights}; give another --output")
    # Released weights were trained on the whole list: that is what their training counts are to be.
    select = "test"
    if description:
        check_classes(description, info, weights)
        select = description["selected_on"]
        if "image_size" not in given:
            settings = dataclasses.replace(settings, image_size=description["preprocessing"]["image_size"])
    settings = dataclasses.replace(settings, select=select)
    info, classes, splits = read_lists(stage, settings, training=False)
    images = load_test_images(info, classes, splits, settings)
    say(f"testing {weights} on {info.name}: {len(images)} images at {settings.image_size}x{settings.image_size}")
    train_labels = [sample.label for sample in splits["train"]] if "train" in splits else []
    results = test(stage, settings, info, classes, train_labels, images, weights, device)
    if results and settings.expect_accuracy is not None:
        found = round(100 * results["overall"], 2)
        if abs(found - settings.expect_accuracy) > 0.005:
            say(f"expected an overall accuracy of {settings.expect_accuracy:.2f} per cent, found {found:.2f}")
            return 1
        say(f"the overall accuracy is {found:.2f} per cent, as expected")
    return 0
