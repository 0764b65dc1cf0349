"""LAD: a PAA detector whose anchors a frozen teacher assigns (Label Assignment Distillation, Nguyen et al., WACV 2022);
Soft-Label, in which it imitates the teacher's scores and boxes instead; and SoLAD, both together."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from common.flags import setting
from common.runtime import UserError
from detection.assigners.paa import assign_by_paa
from detection.assigners.targets import Targets
from detection.distillers.lad import soft_label_losses
from detection.distillers.teacher import GRID, load_teacher
from detection.losses.paa import BOX_WEIGHT, paa_losses
from detection.methods import paa
from detection.methods.ld import auto_or_number
from detection.methods.ltd import CCDSettings, calibrated
from detection.methods.method import Method, Step


class Distillation(NamedTuple):
    """A published way of distillation."""

    assigns: bool  # whether the teacher assigns the anchors to the annotated objects, and those are learned
    soft_labels: bool  # whether the student imitates the teacher's scores and boxes
    lambda_kd_cls: float = 0.0  # weight of the imitation of the class scores
    kd_min_iou: float = 0.0  # IoU of the teacher's box with an object above which IoU and box are imitated


DISTILLATIONS = {"lad": Distillation(True, False), "soft-label": Distillation(False, True, 10.0, 0.1),
                 "solad": Distillation(True, True, 2.0, 0.5)}


@dataclass(frozen=True)
class LADSettings(paa.PAASettings, CCDSettings):
    """The settings of a PAA detector that a frozen teacher teaches, and whose pyramid LTD's calibration network can
    compare with the teacher's."""

    teacher: str = setting("runs/{data}/teacher_paa/final.pt", "checkpoint of the teacher")
    distill: str = setting("lad", "what the teacher gives: the assignment of the anchors (lad), its scores and boxes "
                                  "(soft-label), or both (solad)", choices=tuple(DISTILLATIONS))
    lambda_kd_cls: float | str = setting("auto", "weight of the imitation of the class scores; auto: the published "
                                                 "one, 10 of soft-label, 2 of solad", type=auto_or_number)
    lambda_kd_iou: float = setting(10.0, "... of the IoU")
    lambda_kd_box: float = setting(BOX_WEIGHT, "... of the boxes")
    kd_min_iou: float | str = setting("auto", "IoU and box are imitated where the teacher's box has a larger IoU with "
                                              "an object; auto: the published one, 0.1 of soft-label, 0.5 of solad",
                                      type=auto_or_number)
    ccd: bool = setting(False, "also LTD's cross-layer calibration distillation of the feature pyramid")

    def published(self, name: str) -> float:
        """A setting that may be auto, as a number."""
        value = getattr(self, name)
        return getattr(DISTILLATIONS[self.distill], name) if value == "auto" else value

    def ranges(self) -> tuple[tuple[str, float, float], ...]:
        numbers = (("lambda_kd_cls", 0, 1e6), ("kd_min_iou", 0, 1), ("lambda_kd_iou", 0, 1e6),
                   ("lambda_kd_box", 0, 1e6))
        return (*super().ranges(), *(each for each in numbers if getattr(self, each[0]) != "auto"))


def teacher(settings: LADSettings, description: dict[str, Any], device: torch.device,
            precision: str) -> torch.nn.Module:
    """The frozen teacher, a PAA detector of the same classes and anchors and of any size, but for --ccd of the same
    channels. Raises UserError for one that cannot teach all outputs of the student."""
    shared = (*GRID, "channels") if settings.ccd else GRID
    network = load_teacher(settings.teacher, description, device, precision, shared)
    if not DISTILLATIONS[settings.distill].assigns and "iou" in settings.auxiliary and network.head.iou is None:
        raise UserError(f"--teacher {settings.teacher}: has --auxiliary {network.architecture.auxiliary}, so that the "
                        f"IoU of --auxiliary {settings.auxiliary} has nothing to learn by soft-label; give the "
                        "student --auxiliary iop or cop, or --distill solad")
    return network


def assign(step: Step) -> Targets | None:
    """The Targets of a batch by the teacher's costs; None for soft-label, which learns no annotation."""
    if not DISTILLATIONS[step.settings.distill].assigns:
        return None
    return assign_by_paa(step.teacher, step.anchors, step.truth, step.settings.lone_candidate)


def losses(step: Step, settings: LADSettings) -> dict[str, torch.Tensor]:
    """The terms of PAA, boxes not weighted, and those of the soft labels, as far as --distill has them."""
    distillation, terms = DISTILLATIONS[settings.distill], {}
    if distillation.assigns:
        terms |= paa_losses(step.outputs, step.targets, step.anchors, weighted=False)
    if distillation.soft_labels:
        terms |= soft_label_losses(step.outputs, step.teacher, step.truth, step.anchors,
                                   settings.published("kd_min_iou"))
    return terms


def weights(settings: LADSettings, num_classes: int) -> dict[str, float]:
    """{name: weight} of every term."""
    return {**paa.WEIGHTS, "kd_cls": settings.published("lambda_kd_cls"), "kd_iou": settings.lambda_kd_iou,
            "kd_box": settings.lambda_kd_box}


def notes(settings: LADSettings, num_classes: int, images_per_process: int) -> Iterator[str]:
    """Settings without effect."""
    if not DISTILLATIONS[settings.distill].soft_labels:
        changed = [name for name in ("lambda_kd_cls", "lambda_kd_iou", "lambda_kd_box", "kd_min_iou")
                   if getattr(settings, name) != getattr(LADSettings, name)]
        yield from (f"--{name.replace('_', '-')} has no effect with --distill {settings.distill}" for name in changed)


LAD = calibrated(Method(name="lad", architecture=paa.architecture, assign=assign, assigns_by_outputs=True,
                        losses=losses, weights=weights, load_teacher=teacher, notes=notes))
