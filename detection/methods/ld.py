"""LD: a GFL detector that also learns from a frozen teacher (Localization Distillation, Zheng et al., CVPR 2022)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from common.flags import expects, setting
from detection.distillers.imitation import IMITATIONS, imitation_loss
from detection.distillers.ld import LD_NORMS, ld_losses
from detection.distillers.regions import VLR_METRICS
from detection.distillers.teacher import GRID, load_teacher
from detection.methods import gfl
from detection.methods.method import Method, Step

COCO_CLASSES, COCO_KD_WEIGHT = 80, 10.0  # the published weight of KD, and the classes that it was tuned for


@expects("auto or a number")
def auto_or_number(text: str) -> float | str:
    """"auto" -> "auto"; "1.25" -> 1.25. The type of --lambda-kd-main."""
    return text if text == "auto" else float(text)


def kd_weight(settings: "LDSettings", num_classes: int) -> float:
    """The weight of `kd_main`: as set, or for `auto` as strong as the published one on COCO."""
    if settings.lambda_kd_main == "auto":
        return COCO_KD_WEIGHT * num_classes / COCO_CLASSES
    return settings.lambda_kd_main


@dataclass(frozen=True)
class LDSettings(gfl.GFLSettings):
    """The settings of a GFL detector that a frozen teacher teaches."""

    teacher: str = setting("runs/{data}/teacher/final.pt", "checkpoint of the teacher")
    lambda_ld_main: float = setting(0.25, "weight of LD on the main region, the positive anchors")
    lambda_ld_vlr: float = setting(0.25, "weight of LD on the valuable localization region")
    lambda_kd_main: float | str = setting(
        "auto", "weight of the classification's distillation on the main region; auto: the published 10 of COCO's 80 "
                "classes, in proportion to their number, as its loss is a mean over them", type=auto_or_number)
    lambda_kd_vlr: float = setting(0.0, "... on the valuable localization region (the released code has 0)")
    ld_temperature: float = setting(10.0, "temperature of LD")
    kd_temperature: float = setting(2.0, "temperature of the classification's distillation")
    ld_norm: str = setting("none", "what LD's sums are divided by: none (published), or avg_factor as GFL's box losses",
                           choices=LD_NORMS)
    gamma: float = setting(0.25, "how far down the valuable region reaches, as a share of ATSS's threshold")
    vlr_metric: str = setting("diou", "measure of the valuable region: diou (paper) or iof_parity (released code)",
                              choices=VLR_METRICS)
    imitation: str = setting("none", "where the features of the pyramid imitate the teacher's",
                             choices=("none", *IMITATIONS))
    lambda_imitation: float = setting(2.0, "weight of the imitation")

    def ranges(self) -> tuple[tuple[str, float, float], ...]:
        weights = ["lambda_ld_main", "lambda_ld_vlr", "lambda_kd_vlr", "lambda_imitation"]
        if self.lambda_kd_main != "auto":
            weights.append("lambda_kd_main")
        return (*super().ranges(), *((name, 0, 1e6) for name in weights),
                ("ld_temperature", 1e-3, 1e6), ("kd_temperature", 1e-3, 1e6), ("gamma", 0, 1))


def teacher(settings: LDSettings, description: dict[str, Any], device: torch.device, precision: str) -> torch.nn.Module:
    """The frozen teacher, whose distributions the student can imitate, and its features if that is asked for."""
    shared = (*GRID, "reg_max") if settings.imitation == "none" else (*GRID, "reg_max", "channels")
    return load_teacher(settings.teacher, description, device, precision, shared)


def losses(step: Step, settings: LDSettings) -> dict[str, torch.Tensor]:
    """The terms of GFL, those of LD, and the imitation of features if it is asked for."""
    terms = gfl.losses(step, settings) | ld_losses(step.outputs, step.teacher, step.targets, step.anchors, settings)
    if settings.imitation != "none":
        terms["imitation"] = imitation_loss(settings.imitation, step.outputs, step.teacher, step.targets, step.anchors)
    return terms


def weights(settings: LDSettings, num_classes: int) -> dict[str, float]:
    """{name: weight} of every term."""
    return {**gfl.WEIGHTS, "ld_main": settings.lambda_ld_main, "ld_vlr": settings.lambda_ld_vlr,
            "kd_main": kd_weight(settings, num_classes), "kd_vlr": settings.lambda_kd_vlr,
            "imitation": settings.lambda_imitation}


def notes(settings: LDSettings, num_classes: int, images_per_process: int) -> Iterator[str]:
    """What of the settings is tuned for other data than these."""
    summed = settings.ld_norm == "none" and (settings.lambda_ld_main or settings.lambda_ld_vlr)
    if images_per_process > 3 and summed:
        yield (f"LD's terms are sums over the {images_per_process} images of a process, and their weights are tuned "
               "for 2 or 3; lower --lambda-ld-main and --lambda-ld-vlr in proportion, or see --ld-norm")
    if num_classes == 1 and (settings.lambda_kd_main or settings.lambda_kd_vlr):
        yield "with one class the classification's distillation is 0: its softmax has nothing to compare"
    elif settings.lambda_kd_main == "auto":
        yield f"--lambda-kd-main auto is {kd_weight(settings, num_classes):g} for {num_classes} classes"
    elif settings.lambda_kd_main / num_classes > 2 * COCO_KD_WEIGHT / COCO_CLASSES:
        as_strong = COCO_KD_WEIGHT * num_classes / COCO_CLASSES
        yield (f"the classification's distillation is a mean over the {num_classes} classes, and its weight of 10 was "
               f"tuned for {COCO_CLASSES}; as strong here is --lambda-kd-main {as_strong:g}, which auto would be")


LD = Method(name="ld", architecture=gfl.architecture, assign=gfl.assign, losses=losses, weights=weights,
            load_teacher=teacher, notes=notes)
