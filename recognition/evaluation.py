"""How good a network is: its confusion matrix, its cost, and the test entry `--test-only`."""

import dataclasses
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from common.charts import optional_picture
from common.files import read_json, sha256_of
from common.precision import resolve_precision
from common.runtime import (
    UserError,
    device_name,
    library_versions,
    rank,
    say,
    sum_over_processes,
    world_size,
)
from dataset import class_counts, network_input, read_info
from recognition import report
from recognition.inference import batch_size, inference_network
from recognition.mistakes import draw_mistakes
from recognition.stage import check_classes, load_test_images, read_lists
from resnet50 import load_network


class Predictions(NamedTuple):
    """What a network says about each of N images, on the CPU. classes: (N,) int64, the most probable class.
    probabilities: (N,) fp32, of that class, by softmax."""

    classes: torch.Tensor
    probabilities: torch.Tensor


@torch.inference_mode()
def predict_all(network, dataset, device, precision):
    """The Predictions of `network` for every image of `dataset`. With several processes each takes a share, and all of
    them return the whole."""
    logits_of, together = inference_network(network, device, precision), batch_size(device)
    classes = torch.zeros(len(dataset), dtype=torch.int64, device=device)
    probabilities = torch.zeros(len(dataset), device=device)
    share = range(rank(), len(dataset), world_size())
    for start in range(0, len(share), together):
        batch = share[start:start + together]
        images, _ = dataset.__getitems__(list(batch))
        logits = logits_of(images)  # (B, classes) fp32
        predicted = logits.argmax(1)
        at = slice(batch.start, batch.stop, batch.step)
        classes[at] = predicted
        probabilities[at] = logits.softmax(1).gather(1, predicted[:, None])[:, 0]
    # What is another's is 0 here, so that the sum joins the shares.
    return Predictions(sum_over_processes(classes).cpu(), sum_over_processes(probabilities).cpu())


def confusion_matrix(labels, predicted, num_classes):
    """(true classes, predicted classes) int64: how many images of each class were taken for each, from (N,) int64
    labels and predictions."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


def evaluate(network, dataset, num_classes, device, precision):
    """Confusion matrix of `network` over `dataset`, (true classes, predicted classes) int64 on the CPU."""
    predictions = predict_all(network, dataset, device, precision)
    return confusion_matrix(torch.from_numpy(dataset.labels), predictions.classes, num_classes)


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
    """Test a checkpoint, print the table, write results.json and results.txt, then confusion.png and mistakes.png, into
    `settings.output`. Returns the results on the first process, None on the others.

    info: the DatasetInfo. classes: the ids to report on. train_labels: of the images it was trained on, to be counted.
    dataset: the test images. The precision `auto` is fp32 here: a number that is compared with a published one should
    not hang on the machine."""
    precision = resolve_precision("fp32" if settings.precision == "auto" else settings.precision, device)
    num_classes = len(info.classes)
    network, description = load_network(weights, num_classes)
    network.to(device, memory_format=torch.channels_last)
    predictions = predict_all(network, dataset, device, precision)
    if rank() != 0:
        return None
    confusion = confusion_matrix(torch.from_numpy(dataset.labels), predictions.classes, num_classes)
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
    draw_pictures(Path(settings.output), results, dataset, predictions, info)
    return results


def draw_pictures(folder, results, dataset, predictions, info):
    """confusion.png and mistakes.png of a test; one that cannot be drawn is a note."""
    with optional_picture(folder / "confusion.png") as path:
        report.draw_confusion(results, path)
    with optional_picture(folder / "mistakes.png") as path:
        draw_mistakes(dataset, predictions, info, f"{results['dataset']}, {results['stage']}", path)
    drawn = [name for name in ("confusion.png", "mistakes.png") if (folder / name).is_file()]
    if drawn:
        say(f"drawn: {folder / ', '.join(drawn)}")


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
