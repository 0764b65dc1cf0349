"""Trained networks for inference: checkpoints, released weights and exported files, each as a fast function from grey
images to logits, with the names of its classes."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common.images import ValueRange
from common.precision import resolve_precision
from common.runtime import UserError, resolve_device
from common.weights import fold_batch_norm
from dataset import describe, network_input, read_info
from recognition.exported import SUFFIXES, LogitsFunction, read_exported
from recognition.published import DOTA, FGSC23
from resnet50 import ResNet50, load_state, read_weights

# ---- speed ---------------------------------------------------------------------------------------------------------


def batch_size(device: torch.device) -> int:
    """The number of images to pass through a network together. On a CPU the features of more do not fit the caches:
    with 64 an image takes up to twice as long as with 8 or 16."""
    return 16 if device.type == "cpu" else 64


def logits_function(network: torch.nn.Module, device: torch.device, precision: str) -> LogitsFunction:
    """A function from images (B, 1, H, W) uint8, on any device, to logits (B, classes) fp32 on `device`.

    It holds a copy of `network` in eval mode with folded batch norms, for bf16 cast as a whole: its logits are as near
    to those of fp32 as with autocast, which casts the weights again for every batch."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    folded = fold_batch_norm(network).to(device, dtype, memory_format=torch.channels_last)

    @torch.inference_mode()
    def logits_of(images: torch.Tensor) -> torch.Tensor:
        return folded(network_input(images.to(device)).to(dtype))[0].float()

    return logits_of


class Predictions(NamedTuple):
    """The predictions of a network for N images, on the CPU. classes: (N,) int64, the most probable class of each.
    probabilities: (N,) fp32, of that class, by softmax."""

    classes: torch.Tensor
    probabilities: torch.Tensor


# ---- files ---------------------------------------------------------------------------------------------------------


class Classifier(NamedTuple):
    """A loaded file. logits_of: a function as of `logits_function`. classes: names in id order. image_size: side of its
    square images, in pixels. batch_size: the number of images to pass to it together. value_range: of images of more
    than 8 bits, see `common.images.decode`."""

    logits_of: LogitsFunction
    classes: list[str]
    image_size: int
    batch_size: int
    value_range: ValueRange | None = None


def open_classifier(weights: str | Path, data_root: str | None = None, image_size: int | None = None,
                    device: str = "auto", precision: str = "auto") -> Classifier:
    """The Classifier of a checkpoint, of released weights, or of a file that export.py wrote.

    data_root: the data set with the class names, for weights that bring none. image_size: None for the training size.
    device, precision: as the flags of those names."""
    if Path(weights).suffix.lower() in SUFFIXES:
        return _open_exported(weights, data_root, image_size, device, precision)
    device = resolve_device(device)
    precision = resolve_precision(precision, device)
    network, description = load_classifier(weights, data_root, image_size)
    return Classifier(logits_function(network, device, precision), description["classes"],
                      description["preprocessing"]["image_size"], batch_size(device),
                      description["preprocessing"].get("value_range"))


def _open_exported(path: str | Path, data_root: str | None, image_size: int | None, device: str,
                   precision: str) -> Classifier:
    # The file runs as export.py has checked it: in fp32, on the CPU.
    if device not in ("auto", "cpu") or precision not in ("auto", "fp32"):
        raise UserError(f"{path}: an exported file runs on the CPU in fp32 here; for --device {device} --precision "
                        f"{precision} give the checkpoint")
    logits_of, description = read_exported(path)
    size, classes = description["preprocessing"]["image_size"], description["classes"]
    if image_size not in (None, size):
        raise UserError(f"{path}: was exported for images of {size} pixels, not {image_size}")
    check_class_names(description, len(classes), data_root, path)
    return Classifier(logits_of, classes, size, batch_size(torch.device("cpu")),
                      description["preprocessing"].get("value_range"))


def load_classifier(weights: str | Path, data_root: str | None = None,
                    image_size: int | None = None) -> tuple[ResNet50, dict[str, Any]]:
    """(network in eval mode on the CPU, description) of a checkpoint or released weights; arguments as in
    `open_classifier`. For weights without a description it is `describe_released`."""
    state, description = read_weights(weights)
    classifier = state.get("fc.weight", torch.empty(0))
    if classifier.ndim != 2 or classifier.shape[1] != 2048 or not len(classifier):
        raise UserError(f"{weights}: lacks fc.weight, (classes, 2048); expected the weights of a ResNet-50")
    num_classes = len(classifier)
    network = ResNet50(num_classes)
    load_state(network, state, weights)
    description = description or describe_released(num_classes, data_root, weights)
    check_class_names(description, num_classes, data_root, weights)
    if image_size:
        description["preprocessing"] = {**description["preprocessing"], "image_size": image_size}
    return network.eval(), description


def describe_released(num_classes: int, data_root: str | None, weights: str | Path) -> dict[str, Any]:
    """A description for weights without one: class names and groups from --data-root or the published data sets, the
    recipe's preprocessing; stage and selection are unknown, the epoch is 0."""
    if data_root:
        known = describe(read_info(data_root))
    else:
        published = {len(data["classes"]): data for data in (FGSC23, DOTA)}.get(num_classes)
        if not published:
            raise UserError(f"{weights}: holds no class names; give the data set it was trained on with --data-root")
        print(f"note: {weights} holds no class names; taken for {published['name']}, as it has {num_classes} classes",
              file=sys.stderr)
        known = {"dataset": published["name"], "classes": published["classes"], "groups": published["groups"]}
    preprocessing = {"channels": 1, "image_size": 224, "resize": "bicubic", "mean": 0.5, "std": 0.5}
    return {"stage": "unknown", **known, "preprocessing": preprocessing, "selected_on": "unknown", "epoch": 0}


def check_class_names(description: dict[str, Any], num_classes: int, data_root: str | None, path: str | Path) -> None:
    """Raise UserError unless the classes that a description names are as many as the network's, and those of
    --data-root."""
    if data_root and read_info(data_root).classes != description["classes"]:
        raise UserError(f"{path}: was trained for other classes than those of {data_root}")
    if len(description["classes"]) != num_classes:
        raise UserError(f"{path}: is for {num_classes} classes; {len(description['classes'])} are named by "
                        f"{data_root or 'its description'}")
