"""The frozen teacher of a detector."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.runtime import UserError, say
from common.weights import cast_convolutions, fold_batch_norm
from detection.checkpoint import load_detector

# What a pair shares: the kind of head, the anchors.
GRID = ("head", "strides", "anchor_scale", "anchor_ratios", "anchor_offset")


def load_teacher(path: str | Path, student: dict[str, Any], device: torch.device, precision: str,
                 shared: Sequence[str] = GRID) -> torch.nn.Module:
    """The detector of a checkpoint as a teacher: frozen, in eval mode, its batch norms part of its convolutions.

    student: the description of the student. shared: entries of the models' descriptions that must be equal. Raises
    UserError for a teacher that no such student can learn from."""
    try:
        teacher, description = load_detector(path)
        check_pair(student, description, shared)
    except UserError as error:
        raise UserError(f"--teacher {path}: {error}") from None
    say(f"teacher: {path}, {description['stage']} at epoch {description['epoch']}, {teacher.backbone.name}")
    if start_alike(student, description):
        say("note: the teacher began with the student's own weights, so their features are alike by themselves; for a "
            "fair comparison give one of the two another --seed")
    teacher = fold_batch_norm(teacher).requires_grad_(False).to(device, memory_format=torch.channels_last)
    if precision == "bf16":
        cast_convolutions(teacher, torch.bfloat16)
    return teacher


def start_alike(student: dict[str, Any], teacher: dict[str, Any]) -> bool:
    """Whether two runs, by the descriptions in their checkpoints, began with the same weights: they train the same
    network from the same start with the same seed."""
    starts = [[description.get("settings", {}).get(name) for name in ("seed", "init", "init_detector")]
              for description in (student, teacher)]
    return student["model"] == teacher["model"] and starts[0] == starts[1] != [None] * 3


def check_pair(student: dict[str, Any], teacher: dict[str, Any], shared: Sequence[str] = GRID) -> None:
    """Raise UserError, naming the first difference, unless a student can learn from a teacher.

    student, teacher: descriptions {"classes": [names], "model": {"strides": [..], "anchor_scale": .., ...}}, as in
    their checkpoints. shared: the entries of "model" that must be equal."""
    pairs = [("the number of classes", len(student["classes"]), len(teacher["classes"]))]
    pairs += [(f"the name of class {number}", *names)
              for number, names in enumerate(zip(student["classes"], teacher["classes"], strict=False))]
    pairs += [(name, student["model"][name], teacher["model"][name]) for name in shared]
    ranges = (description.get("preprocessing", {}).get("value_range") for description in (student, teacher))
    pairs.append(("the value range", *ranges))
    for what, of_student, of_teacher in pairs:
        if of_student != of_teacher:
            raise UserError(f"teacher and student differ in {what}: {of_teacher!r} in the teacher, {of_student!r} in "
                            "the student; distillation expects the same in both")
