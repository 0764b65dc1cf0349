"""Tests of a network: its predictions, its confusion matrix, its cost, and `--test-only`."""

import dataclasses
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from common.charts import optional_picture
from common.files import read_json, sha256_of
from common.precision import precision_of_test
from common.run_folder import check_test_output
from common.runtime import (
    UserError,
    device_name,
    library_versions,
    rank,
    say,
    sum_over_processes,
    world_size,
)
from dataset import DatasetInfo, ImageDataset, class_counts, fingerprint, network_input, read_info
from recognition import report
from recognition.inference import Predictions, batch_size, logits_function
from recognition.mistakes import draw_mistakes
from recognition.settings import Settings
from recognition.stage import Stage, check_classes, load_test_images, read_lists
from resnet50 import ResNet50, load_network


class Checkpoint(NamedTuple):
    """A file of weights, loaded: its network, and its metadata (None for weights that bring none)."""

    path: Path
    network: ResNet50
    description: dict[str, Any] | None


@dataclass(frozen=True)
class TestSet:
    """The images of a test. info: of the data set. classes: the ids to report on. train_labels: of the images that the
    network was trained on, to be counted in the report."""

    info: DatasetInfo
    classes: list[int]
    images: ImageDataset
    train_labels: Sequence[int] | np.ndarray


@torch.inference_mode()
def predict_all(network: torch.nn.Module, dataset: ImageDataset, device: torch.device, precision: str) -> Predictions:
    """The Predictions of `network` for every image of `dataset`. With several processes each computes a share, and all
    of them return the whole."""
    logits_of, together = logits_function(network, device, precision), batch_size(device)
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
    # The shares of other processes are 0 here, so the sum joins them.
    return Predictions(sum_over_processes(classes).cpu(), sum_over_processes(probabilities).cpu())


def confusion_matrix(labels: torch.Tensor, predicted: torch.Tensor, num_classes: int) -> torch.Tensor:
    """(true classes, predicted classes) int64: the number of images for each pair, from (N,) int64 labels and
    predictions."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


def evaluate(network: torch.nn.Module, dataset: ImageDataset, num_classes: int, device: torch.device,
             precision: str) -> torch.Tensor:
    """Confusion matrix of `network` over `dataset`, (true classes, predicted classes) int64 on the CPU."""
    predictions = predict_all(network, dataset, device, precision)
    return confusion_matrix(torch.from_numpy(dataset.labels), predictions.classes, num_classes)


@torch.inference_mode()
def measure(network: torch.nn.Module, image_size: int, device: torch.device, precision: str,
            repeats: int = 5) -> dict[str, Any]:
    """Parameters, FLOPs of one image (2 a multiply-add, convolutions and linear layers) and milliseconds an image in a
    batch of 8 (median of 5 batches after one to warm up)."""
    images = torch.zeros(8, 1, image_size, image_size, dtype=torch.uint8, device=device)
    with FlopCounterMode(display=False) as counter:
        network.eval()(network_input(images[:1]))
    logits_of, seconds = logits_function(network, device, precision), []
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


def read_checkpoint(path: Path, info: DatasetInfo) -> Checkpoint:
    """The Checkpoint in a file, of as many classes as the data set has. Raises UserError for anything else."""
    return Checkpoint(path, *load_network(path, len(info.classes)))


def test(stage: Stage, settings: Settings, checkpoint: Checkpoint, test_set: TestSet,
         device: torch.device) -> dict[str, Any] | None:
    """Test a checkpoint: print the table, and write results.json, results.txt, confusion.png and mistakes.png into
    `settings.output`. Returns the results on the first process, None on the others."""
    info, images, precision = test_set.info, test_set.images, precision_of_test(settings.precision, device)
    num_classes, network = len(info.classes), checkpoint.network
    network.to(device, memory_format=torch.channels_last)
    predictions = predict_all(network, images, device, precision)
    if rank() != 0:
        return None
    confusion = confusion_matrix(torch.from_numpy(images.labels), predictions.classes, num_classes)
    description = checkpoint.description or {"stage": stage.name, "selected_on": "unknown", "epoch": None}
    results = {
        "dataset": info.name, "split": "test", "stage": description["stage"], "classes_of": stage.group,
        "selected_on": description["selected_on"], "recipe": description.get("recipe", ""),
        "epoch": description["epoch"], "test_images": images_fingerprint(test_set),
        "weights": str(checkpoint.path), "weights_sha256": sha256_of(checkpoint.path),
        **report.accuracies(confusion, info, test_set.classes, class_counts(test_set.train_labels, num_classes)),
        **measure(network, settings.image_size, device, precision), "image_size": settings.image_size,
        "device": device_name(device), "precision": precision, "versions": library_versions(),
        "confusion": confusion.tolist(),
    }
    report.write_results(Path(settings.output), results)
    draw_pictures(Path(settings.output), results, test_set, predictions)
    return results


def images_fingerprint(test_set: TestSet) -> str:
    """16 hexadecimal digits that change with the classes, the groups, and the images of a test with their labels."""
    return fingerprint(test_set.info, {"test": test_set.images.samples})


def draw_pictures(folder: Path, results: dict[str, Any], test_set: TestSet, predictions: Predictions) -> None:
    """Draw confusion.png and mistakes.png of a test; for a picture that cannot be drawn a note is printed."""
    with optional_picture(folder / "confusion.png") as path:
        report.draw_confusion(results, path)
    with optional_picture(folder / "mistakes.png") as path:
        draw_mistakes(test_set.images, predictions, test_set.info, f"{results['dataset']}, {results['stage']}", path)
    drawn = [name for name in ("confusion.png", "mistakes.png") if (folder / name).is_file()]
    if drawn:
        say(f"drawn: {folder / ', '.join(drawn)}")


def test_only(stage: Stage, settings: Settings, given: Collection[str], device: torch.device) -> int:
    """`--test-only`: test a checkpoint of this project or released weights. Returns the exit status.

    given: names of the flags that were given; without --image-size a checkpoint is tested at its training size."""
    output = Path(settings.output)
    weights = Path(settings.weights or output / "best.pt")
    check_test_output(settings, weights)
    info = read_info(settings.data_root)
    checkpoint = read_checkpoint(weights, info)
    description = checkpoint.description
    earlier = output / "results.json"
    if earlier.exists():
        tested = read_json(earlier)
        if not isinstance(tested, dict) or tested.get("weights_sha256") != sha256_of(weights):
            raise UserError(f"{earlier}: is of other weights than {weights}; give another --output")
    # Released weights were trained on the whole list, val included: so their training images are to be counted.
    select = "test"
    if description:
        check_classes(description, info, weights)
        select = description["selected_on"]
        if "image_size" not in given:
            settings = dataclasses.replace(settings, image_size=description["preprocessing"]["image_size"])
    settings = dataclasses.replace(settings, select=select)
    lists = read_lists(stage, settings, training=False)
    if description:
        value_range = description["preprocessing"].get("value_range")
        lists = dataclasses.replace(lists, info=dataclasses.replace(
            lists.info, value_range=value_range and tuple(value_range)))
    images = load_test_images(lists, settings)
    say(f"testing {weights} on {info.name}: {len(images)} images at {settings.image_size}x{settings.image_size}")
    test_set = TestSet(lists.info, lists.classes, images, [sample.label for sample in lists.train])
    results = test(stage, settings, checkpoint, test_set, device)
    if results and settings.expect_accuracy is not None:
        accuracy = round(100 * results["overall"], 2)
        if abs(accuracy - settings.expect_accuracy) > 0.005:
            say(f"expected an overall accuracy of {settings.expect_accuracy:.2f} per cent, found {accuracy:.2f}")
            return 1
        say(f"the overall accuracy is {accuracy:.2f} per cent, as expected")
    return 0
