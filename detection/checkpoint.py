"""Checkpoints of detectors: their metadata, and loading them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.files import check_entries, is_metadata, load_checkpoint
from common.images import ValueRange, is_value_range, value_range_entry
from common.runtime import UserError
from detection.data.transforms import MEAN, STD
from detection.geometry.anchors import FACTORS, SQUARE, STRIDES, AnchorGrid
from detection.network.backbone import is_backbone
from detection.network.detector import HEADS, Architecture, Detector
from detection.network.paa_head import AUXILIARIES, COP_PADDINGS

# The entries of a checkpoint's metadata and their kinds.
DESCRIPTION = {"stage": str, "classes": list, "model": dict, "preprocessing": dict, "epoch": int}
SIZES = ("backbone", "depth", "channels", "tower_convs")  # of backbone, pyramid and towers
RANGES = {"channels": (64, 4096), "tower_convs": (0, 16), "reg_max": (0, 64)}
SQUARE_RATIOS = list(SQUARE.ratios)  # that older checkpoints do not state
CHOICES = {"head": tuple(HEADS), "auxiliary": AUXILIARIES, "cop_padding": tuple(COP_PADDINGS)}


def describe_model(architecture: Architecture) -> dict[str, Any]:
    """The Architecture as plain values, and the parameters of the anchors, which a teacher must share."""
    return {**dataclasses.asdict(architecture), **describe_anchors(architecture.grid)}


def describe_anchors(grid: AnchorGrid) -> dict[str, Any]:
    """The parameters of the anchors as plain values."""
    return {"strides": list(STRIDES), "anchor_scale": grid.scales[0] if len(grid.scales) == 1 else list(grid.scales),
            "anchor_ratios": list(grid.ratios), "anchor_offset": 0}


def describe_preprocessing(short: int, long: int, value_range: ValueRange | None = None) -> dict[str, Any]:
    """The preprocessing of a detector's images as plain values: sides in pixels, means and deviations of R, G, B in
    0..255; of images of more than 8 bits the values that become 0 and 255."""
    return {"short": short, "long": long, "mean": list(MEAN), "std": list(STD), **value_range_entry(value_range)}


def load_detector(path: str | Path) -> tuple[Detector, dict[str, Any]]:
    """The Detector of a checkpoint of this project, in eval mode on the CPU, and the checkpoint's description, with
    all that describe_model states.

    Raises UserError for a file that is none, or whose weights are not those that its metadata describes."""
    content = load_checkpoint(path)
    description = content.get("description") if isinstance(content, dict) else None
    if not is_description(description):
        raise UserError(f"{path}: not a detector of this project; expected final.pt or last.pt of a detection run (for "
                        "weights of mmdet see python -m detection.convert)")
    empty = empty_detector(path, description)
    state = content.get("model")
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds no weights; expected a state dict under 'model'")
    check_entries(path, state, empty.state_dict(), f"a detector on {empty.backbone.name}")
    network = Detector(empty.num_classes, empty.architecture)
    network.load_state_dict(state)
    return network.eval(), {**description, "model": describe_model(network.architecture)}


def empty_detector(path: str | Path, description: dict[str, Any]) -> Detector:
    """The Detector of a description, without storage for its weights: a small file may claim to be a huge network.

    Raises UserError, naming the file at `path`, for anchors or normalisation that are not those of this project."""
    architecture = architecture_of(description["model"])
    expected = {**describe_anchors(architecture.grid), "mean": list(MEAN), "std": list(STD)}
    found = {"anchor_ratios": SQUARE_RATIOS, **description["model"], **description["preprocessing"]}
    for name, value in expected.items():
        if found.get(name) != value:
            raise UserError(f"{path}: its {name} is {str(found.get(name))[:80]}; expected {value}")
    with torch.device("meta"):
        return Detector(len(description["classes"]), architecture)


def architecture_of(model: dict[str, Any]) -> Architecture:
    """The Architecture of a checkpoint's "model" entry. A field that is younger than the checkpoint has its default."""
    return Architecture(**{field.name: model.get(field.name, field.default)
                           for field in dataclasses.fields(Architecture)})


def initialise_detector(network: Detector, classes: Sequence[str], path: str | Path) -> str:
    """Fill `network`, which is to find `classes`, in place from the checkpoint of a detector; returns in words what was
    loaded. What has no counterpart of its shape there stays as it is, and so do the outputs of other classes.

    Raises UserError where backbone, pyramid or towers differ."""
    source, description = load_detector(path)
    sizes = [", ".join(f"{name.replace('_', '-')} {getattr(each.architecture, name)}" for name in SIZES)
             for each in (source, network)]
    if sizes[0] != sizes[1]:
        raise UserError(f"--init-detector {path}: has {sizes[0]}; expected {sizes[1]}")
    own, state = network.state_dict(), source.state_dict()
    if description["classes"] != list(classes):
        with torch.device("meta"):
            larger = Detector(network.num_classes + 1, network.architecture).state_dict()
        state = {name: value for name, value in state.items() if name in own and own[name].shape == larger[name].shape}
    taken = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
    network.load_state_dict({**own, **taken})
    anew = [name for name in own if name not in taken]
    return f"{len(taken)} of {len(own)} entries from {path}" + (f"; anew: {', '.join(anew)}" if anew else "")


def is_description(value: Any) -> bool:
    """Whether `value` is the metadata of a detector's checkpoint, each entry of its kind and in its range."""
    if not is_metadata(value, DESCRIPTION):
        return False
    model, preprocessing = {"anchor_ratios": SQUARE_RATIOS, **value["model"]}, value["preprocessing"]
    in_range = all(type(model.get(name)) is int and low <= model[name] <= high for name, (low, high) in RANGES.items())
    anchor_size = model.get("anchor_size", 1.0)
    pixels = [preprocessing.get(name) for name in ("short", "long")]
    fixed = [model.get(name) for name in ("strides", "anchor_scale", "anchor_ratios", "anchor_offset")]
    fixed += [preprocessing.get(name) for name in ("mean", "std")]
    numbers = [each for part in (*fixed, value["epoch"]) for each in (part if isinstance(part, list) else [part])]
    small = all(type(number) in (int, float) and -1e9 < number < 1e9 for number in numbers)
    return (in_range and small and model["channels"] % 32 == 0
            and is_backbone(model.get("depth"), model.get("backbone", "resnet"), model.get("dcn", "none"))
            and type(model.get("quality")) is bool
            and type(anchor_size) in (int, float) and FACTORS[0] <= anchor_size <= FACTORS[1]
            and all(model.get(name, choices[0]) in choices for name, choices in CHOICES.items())
            and model["reg_max"] >= HEADS[model.get("head", "gfl")].least_reg_max
            and all(type(side) is int and 32 <= side <= 1e5 for side in pixels)
            and is_value_range(preprocessing.get("value_range"))
            and 0 < len(value["classes"]) <= 10000)
