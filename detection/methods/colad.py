"""CoLAD: two PAA detectors that learn together and assign each other's anchors (Nguyen et al., WACV 2022). The
student is the published network; the peer is kept and tested beside it."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from common.flags import setting
from common.run_folder import is_resumed
from common.runtime import UserError, say
from detection.assigners.paa import assign_by_paa_of_two
from detection.assigners.targets import Targets
from detection.checkpoint import load_detector
from detection.losses.paa import paa_losses
from detection.methods import paa
from detection.methods.method import Method, Step
from detection.network.backbone import DEPTHS, initialise
from detection.network.detector import Architecture, Detector
from detection.network.paa_head import AUXILIARIES

NETWORKS = ("student", "peer")


@dataclass(frozen=True)
class CoLADSettings(paa.PAASettings):
    """The settings of two PAA detectors that learn together."""

    peer_depth: int = setting(50, "of the peer's backbone, a ResNet", choices=tuple(DEPTHS))
    peer_auxiliary: str = setting("iou", "--auxiliary of the peer", choices=AUXILIARIES)
    peer_init: str = setting("", "what the peer's backbone starts from (default: as --init)")
    init_peer: str = setting("", "checkpoint of a PAA detector of the same classes that the peer starts from; its "
                                 "depth, width and auxiliary predictions are in place of the settings")


def peer_architecture(settings: CoLADSettings) -> Architecture:
    """The peer that the settings describe."""
    return replace(paa.architecture(settings), depth=settings.peer_depth, auxiliary=settings.peer_auxiliary,
                   backbone="resnet", dcn="none")


def companions(num_classes: int, settings: CoLADSettings) -> dict[str, torch.nn.Module]:
    """The peer, with the weights that it starts from."""
    if settings.init_peer:
        return {"peer": peer_of_checkpoint(num_classes, settings)}
    init = settings.peer_init or settings.init
    peer = Detector(num_classes, peer_architecture(settings), settings.frozen and init != "none")
    if not is_resumed(settings):
        say(f"initialised: the peer's {peer.backbone.name} with {initialise(peer.backbone, init)}")
    return {"peer": peer}


def peer_of_checkpoint(num_classes: int, settings: CoLADSettings) -> Detector:
    """The peer that --init-peer holds."""
    source, description = load_detector(settings.init_peer)
    found = (source.architecture.head, source.num_classes, source.architecture.anchor_size)
    expected = ("paa", num_classes, settings.anchor_size)
    if found != expected:
        head, classes, size = found
        raise UserError(f"--init-peer {settings.init_peer}: a {head} detector of {classes} classes with anchors of "
                        f"size {size:g}; expected {expected[0]}, {expected[1]} and {expected[2]:g}")
    peer = Detector(num_classes, source.architecture, settings.frozen)
    peer.load_state_dict(source.state_dict())
    if not is_resumed(settings):
        say(f"initialised: the peer, {peer.backbone.name}, from {settings.init_peer}, {description['stage']} at epoch "
            f"{description['epoch']}")
    return peer


def forward(student: torch.nn.Module, companions: torch.nn.ModuleDict, images: torch.Tensor, teacher: Any) -> Any:
    """The outputs of both networks by name."""
    return {"student": student(images), "peer": companions["peer"](images)}


def assign(step: Step) -> Targets:
    """One assignment for both, by the costs of the one or the other for each object and level."""
    return assign_by_paa_of_two(step.outputs["student"], step.outputs["peer"], step.anchors, step.truth,
                                step.settings.lone_candidate)


def losses(step: Step, settings: CoLADSettings) -> dict[str, torch.Tensor]:
    """The terms of PAA, boxes not weighted, of each network."""
    return {f"{name}_{network}": loss for network in NETWORKS for name, loss in paa_losses(
        step.outputs[network], step.targets, step.anchors, weighted=False).items()}


def weights(settings: CoLADSettings, num_classes: int) -> dict[str, float]:
    """{name: weight} of every term."""
    return {f"{name}_{network}": weight for network in NETWORKS for name, weight in paa.WEIGHTS.items()}


COLAD = Method(name="colad", architecture=paa.architecture, assign=assign, assigns_by_outputs=True, losses=losses,
               weights=weights, companions=companions, forward=forward)
