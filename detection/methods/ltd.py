"""LTD: a detector that a frozen teacher teaches by its pyramid and by its answers (layer-calibration and
task-disentangle distillation, IEEE TGRS 2023). `docs/ltd.md` says what is published of it and what is our reading."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from common.flags import setting
from common.runtime import UserError, say, world_size
from detection.assigners.targets import Targets
from detection.distillers.calibration import POOL_SOURCES, calibration_losses
from detection.distillers.tasd import CLS_REGIONS, ROW_WEIGHTS, tasd_losses
from detection.distillers.teacher import GRID, load_teacher
from detection.geometry.anchors import STRIDES
from detection.methods import ld
from detection.methods.method import Method, Step
from detection.network.calibration import CalibratedMaps, CalibrationNetwork
from detection.settings import Settings

TUNED_FOR = 8  # images a process, and NWPU VHR-10's 10 classes


# ---- CCD and LIC: of any detector with a feature pyramid -------------------------------------------------------------


@dataclass(frozen=True)
class CCDSettings(Settings):
    """The settings of a detector whose pyramid a calibration network compares with its teacher's."""

    ccd: bool = setting(True, "cross-layer calibration distillation of the feature pyramid")
    lic: bool = setting(True, "local implicit calibration: CCD's network samples at learned places")
    lic_zero_offsets: bool = setting(True, "these places begin as those of an ordinary convolution; in the released "
                                           "code they begin at random")
    lambda_fuse: float = setting(0.5, "weight of CCD's fused and of its pooled term")
    lambda_attention: float = setting(1e-3, "weight of CCD's term under the mask of attention")
    ltd_pool_source: str = setting("raw", "what CCD's pooled term compares with the teacher: raw (released code), the "
                                          "student's pyramid, or fused, the calibrated one", choices=POOL_SOURCES)

    def ranges(self) -> tuple[tuple[str, float, float], ...]:
        return (*super().ranges(), ("lambda_fuse", 0, 1e6), ("lambda_attention", 0, 1e6))


@dataclass
class CalibratedOutputs:
    """The outputs of a student, and of the calibration network beside it, None without CCD."""

    detector: Any
    calibrated: CalibratedMaps | None


def calibrated(method: Method) -> Method:
    """`method` with CCD and LIC beside its own losses, by its settings' CCDSettings.

    They ask nothing of a detector but `features` in its outputs, the maps of a pyramid from P3 to P7; so does its
    teacher, which the method must load, with as many channels."""
    def of_detector(step: Step) -> Step:
        return replace(step, outputs=step.outputs.detector) if step.outputs is not None else step

    def companions(num_classes: int, settings: Any) -> dict[str, torch.nn.Module]:
        return {**method.companions(num_classes, settings), **calibration_network(settings)}

    def forward(student: torch.nn.Module, companions: torch.nn.ModuleDict, images: torch.Tensor,
                teacher: Any) -> CalibratedOutputs:
        outputs = method.forward(student, companions, images, teacher)
        maps = companions["calibration"](outputs.features) if "calibration" in companions else None
        return CalibratedOutputs(outputs, maps)

    def assign(step: Step) -> Targets:
        return method.assign(of_detector(step))

    def losses(step: Step, settings: Any) -> dict[str, torch.Tensor]:
        terms = method.losses(of_detector(step), settings)
        if step.outputs.calibrated is not None:
            terms |= calibration_losses(step.outputs.detector.features, step.outputs.calibrated, step.teacher.features,
                                        settings.ltd_pool_source)
        return terms

    def weights(settings: Any, num_classes: int) -> dict[str, float]:
        return {**method.weights(settings, num_classes), "ccd_fused": settings.lambda_fuse,
                "ccd_pooled": settings.lambda_fuse, "ccd_attention": settings.lambda_attention}

    return replace(method, assign=assign, losses=losses, weights=weights, companions=companions, forward=forward)


def calibration_network(settings: Any) -> dict[str, torch.nn.Module]:
    """The companion of CCD, {} without it. Raises UserError where its batch norms may see a single pixel."""
    if not settings.ccd:
        return {}
    if settings.batch_size == world_size() and min(settings.short[0], settings.long) <= STRIDES[-1]:
        raise UserError(f"--batch-size {settings.batch_size}: leaves each process one image, whose coarsest features "
                        "can be a single pixel: nothing for CCD's batch norms to average; give a larger one, images "
                        f"of more than {STRIDES[-1]} pixels, or --no-ccd")
    network = CalibrationNetwork(settings.channels, settings.lic, settings.lic_zero_offsets)
    say(f"calibration network: {sum(weight.numel() for weight in network.parameters()) / 1e6:.2f} M parameters, in "
        "training alone")
    return {"calibration": network}


# ---- TASD: of GFL, beside LD -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LTDSettings(CCDSettings, ld.LDSettings):
    """The settings of a GFL detector that a frozen teacher teaches by LTD, and also by LD where that has a weight."""

    lambda_ld_main: float = setting(0.0, "weight of LD's own term on the main region; LD's is 0.25")
    lambda_ld_vlr: float = setting(0.0, "... on the valuable localization region; LD's is 0.25")
    lambda_kd_main: float | str = setting(0.0, "weight of LD's own distillation of the classification; LD's is auto",
                                          type=ld.auto_or_number)
    tasd: bool = setting(True, "task-aware spatial disentangle distillation of boxes and classes")
    lambda_tasd_ld: float = setting(0.025, "weight of TASD's terms of the boxes, on either region")
    lambda_tasd_kd: float = setting(0.5, "weight of TASD's terms of the classes, on either region")
    tasd_cls_region: str = setting("centre", "where TASD distils classes besides the main region: centre (our reading) "
                                             "is the interior of the valuable region, shared (released code) all of it",
                                   choices=CLS_REGIONS)
    tasd_row_weights: str = setting("certainty", "what TASD weights the sides of boxes by: the teacher's certainty, or "
                                                 "logit_sum_parity (released code)", choices=ROW_WEIGHTS)

    def ranges(self) -> tuple[tuple[str, float, float], ...]:
        return (*super().ranges(), ("lambda_tasd_ld", 0, 1e6), ("lambda_tasd_kd", 0, 1e6))


def teacher(settings: LTDSettings, description: dict[str, Any], device: torch.device,
            precision: str) -> torch.nn.Module:
    """The frozen teacher, with the student's bins, and with as many channels where features are compared."""
    channels = ("channels",) if settings.ccd or settings.imitation != "none" else ()
    return load_teacher(settings.teacher, description, device, precision, (*GRID, "reg_max", *channels))


def losses(step: Step, settings: LTDSettings) -> dict[str, torch.Tensor]:
    """The terms of GFL, those of LD that have a weight, and those of TASD."""
    terms = ld.losses(step, settings)
    if settings.tasd:
        terms |= tasd_losses(step.outputs, step.teacher, step.targets, step.anchors, settings)
    return terms


def weights(settings: LTDSettings, num_classes: int) -> dict[str, float]:
    """{name: weight} of every term."""
    return {**ld.weights(settings, num_classes), "tasd_ld_main": settings.lambda_tasd_ld,
            "tasd_ld_vlr": settings.lambda_tasd_ld, "tasd_kd_main": settings.lambda_tasd_kd,
            "tasd_kd_vlr": settings.lambda_tasd_kd}


def notes(settings: LTDSettings, num_classes: int, images_per_process: int) -> Iterator[str]:
    """What of the settings is tuned for other data than these."""
    yield from ld.notes(settings, num_classes, images_per_process)
    if settings.tasd and images_per_process > TUNED_FOR:
        yield (f"TASD's terms are sums over the {images_per_process} images of a process, and their weights are tuned "
               f"for {TUNED_FOR}; lower --lambda-tasd-ld and --lambda-tasd-kd in proportion")
    if settings.tasd and num_classes == 1:
        yield "with one class TASD distils no classification: its softmax has nothing to compare"


LTD = calibrated(replace(ld.LD, name="ltd", losses=losses, weights=weights, load_teacher=teacher, notes=notes))
