"""The seam between the engine and what it trains. `docs/adding_a_method.md` shows how a new method fits in."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from detection.assigners.targets import GroundTruth
from detection.geometry.anchors import Anchors
from detection.network.detector import Architecture


@dataclass
class Step:
    """A batch on its way through a training step. The engine fills in one field after the other, in this order but for
    `targets`, which come first where the anchors alone decide them.

    images: (N, 3, H, W), normalised. settings: those of the run. teacher: the outputs of the frozen teacher, None
    without one. outputs: those that `Method.forward` returns. targets: those that `Method.assign` returns."""

    images: torch.Tensor
    truth: GroundTruth
    anchors: Anchors
    settings: Any = None
    teacher: Any = None
    outputs: Any = None
    targets: Any = None


def student_alone(student: torch.nn.Module, companions: torch.nn.ModuleDict, images: torch.Tensor, teacher: Any) -> Any:
    """The forward pass of a method that trains one network."""
    return student(images)


def no_companions(num_classes: int, settings: Any) -> dict[str, torch.nn.Module]:
    """Nothing is trained beside the student."""
    return {}


def no_notes(settings: Any, num_classes: int, images_per_process: int) -> Iterable[str]:
    """Nothing to tell."""
    return ()


@dataclass(frozen=True)
class Method:
    """A way to train a detector. `settings` are those of the method's stage script.

    name: of the stage.
    architecture(settings): the Architecture of the published network. Its head determines the network's outputs, their
        decoding, and the anchors at a location.
    assign(step): the target of each anchor. It is called before the forward pass, unless assigns_by_outputs.
    losses(step, settings): {name: scalar}, unweighted. A term of weight 0 may be left out.
    weights(settings, num_classes): {name: weight} of every loss. The loss of a step is their weighted sum.
    load_teacher(settings, description, device, precision): the frozen teacher of `settings.teacher`, in eval mode, or a
        UserError if a student of this description cannot learn from it. None for a method without a teacher.
    companions(num_classes, settings): {name: nn.Module} trained beside the student: optimised and saved for --resume. A
        Detector is also kept as NAME/final.pt and tested; nothing else is published.
    forward(student, companions, images, teacher): the forward pass, under autocast and, with several processes,
        DistributedDataParallel. companions: an nn.ModuleDict. teacher: the teacher's outputs.
    notes(settings, num_classes, images_per_process): sentences about settings that do not do what they seem to."""

    name: str
    architecture: Callable[[Any], Architecture]
    assign: Callable[[Step], Any]
    losses: Callable[[Step, Any], dict[str, torch.Tensor]]
    weights: Callable[[Any, int], dict[str, float]]
    assigns_by_outputs: bool = False
    load_teacher: Callable[..., torch.nn.Module] | None = None
    companions: Callable[[int, Any], dict[str, torch.nn.Module]] = no_companions
    forward: Callable[..., Any] = student_alone
    notes: Callable[[Any, int, int], Iterable[str]] = no_notes
