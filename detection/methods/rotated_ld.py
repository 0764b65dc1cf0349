"""Rotated-LD: a detector of oriented boxes that also learns from a frozen teacher (Zheng et al., Localization
Distillation for Object Detection, arXiv:2204.05957)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from common.flags import setting
from detection.distillers.imitation import imitation_loss
from detection.distillers.rotated_ld import REGION_BOXES, rotated_ld_losses
from detection.distillers.teacher import GRID, load_teacher
from detection.geometry.oriented import circumscribed
from detection.methods import rotated
from detection.methods.method import Method, Step
from detection.settings import SCHEDULES, settings_of_recipes

DOTA_CLASSES = 15  # that the published weights of KD are tuned for
STUDENT = {"depth": 18, **SCHEDULES["1x"]}
RECIPES = {
    "gwd-r34": {**STUDENT, "box_loss": "gwd", "lambda_ld": 10.0, "lambda_kd": 20.0},
    "kld-r34": {**STUDENT, "box_loss": "kld", "lambda_ld": 15.0, "lambda_kd": 15.0},
    "gwd-r50": {**STUDENT, "box_loss": "gwd", "lambda_ld": 30.0, "lambda_kd": 30.0, "imitation": "finegrained",
                "lambda_imitation": 2.0},
}


@dataclass(frozen=True)
class RotatedLDSettings(rotated.RotatedSettings):
    """The settings of a detector of oriented boxes that a frozen teacher teaches."""

    recipe: str = setting("", "the published settings of a ResNet-18 by box loss and ResNet of the teacher, in place "
                              "of the script's values for " + settings_of_recipes(RECIPES), choices=tuple(RECIPES))
    teacher: str = setting("runs/{data}/teacher/final.pt", "checkpoint of the teacher")
    lambda_ld: float = setting(10.0, "weight of LD")
    lambda_kd: float = setting(20.0, "weight of the classification's distillation for DOTA's 15 classes; for another "
                                     "number it is scaled in proportion, as the loss is a mean over them")
    temperature: float = setting(5.0, "temperature of both")
    gamma: float = setting(0.25, "how far down the region of distillation reaches, as a share of ATSS's threshold")
    region_boxes: str = setting("circumscribed", "horizontal boxes of the objects that the region is made with: "
                                                 "circumscribed, or upright, w x h whatever the angle (released code)",
                                choices=tuple(REGION_BOXES))
    imitation: str = setting("none", "where the features of the pyramid imitate the teacher's",
                             choices=("none", "finegrained"))
    lambda_imitation: float = setting(2.0, "weight of the imitation")

    @classmethod
    def recipes(cls) -> dict[str, dict[str, Any]]:
        return RECIPES

    def ranges(self) -> tuple[tuple[str, float, float], ...]:
        ranges = (each for each in super().ranges() if each[0] != "reg_max")
        return (*ranges, ("reg_max", 1, 64), *((f"lambda_{name}", 0, 1e6) for name in ("ld", "kd", "imitation")),
                ("temperature", 1e-3, 1e6), ("gamma", 0, 1))


def teacher(settings: RotatedLDSettings, description: dict[str, Any], device: torch.device,
            precision: str) -> torch.nn.Module:
    """The frozen teacher, whose distributions the student can imitate, and its features if that is asked for."""
    features = () if settings.imitation == "none" else ("channels",)
    return load_teacher(settings.teacher, description, device, precision, (*GRID, "reg_max", *features))


def losses(step: Step, settings: RotatedLDSettings) -> dict[str, torch.Tensor]:
    """The terms of the detector, those of Rotated-LD, and the imitation of features if it is asked for."""
    student, teacher, targets, anchors = step.outputs, step.teacher, step.targets, step.anchors
    terms = rotated.losses(step, settings) | rotated_ld_losses(student, teacher, targets, anchors, settings)
    if settings.imitation != "none":
        around = replace(targets, gt_boxes=circumscribed(targets.gt_boxes))
        terms["imitation"] = imitation_loss(settings.imitation, student, teacher, around, anchors)
    return terms


def weights(settings: RotatedLDSettings, num_classes: int) -> dict[str, float]:
    """{name: weight} of every term."""
    return {**rotated.weights(settings, num_classes), "ld": settings.lambda_ld,
            "kd": settings.lambda_kd * num_classes / DOTA_CLASSES, "imitation": settings.lambda_imitation}


def notes(settings: RotatedLDSettings, num_classes: int, images_per_process: int) -> Iterator[str]:
    """What of the settings is tuned for other data than these."""
    if num_classes == 1 and settings.lambda_kd:
        yield "with one class the classification's distillation is 0: its softmax has nothing to compare"
    elif num_classes != DOTA_CLASSES and settings.lambda_kd:
        yield (f"--lambda-kd {settings.lambda_kd:g}, for {DOTA_CLASSES} classes, is "
               f"{weights(settings, num_classes)['kd']:g} for {num_classes}")


ROTATED_LD = Method(name="rotated_ld", architecture=rotated.architecture, assign=rotated.assign, losses=losses,
                    weights=weights, load_teacher=teacher, notes=notes)
