"""From a trained detector to the boxes of an image."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from common.runtime import autocast
from common.weights import fold_batch_norm
from detection.data.transforms import normalise
from detection.geometry.anchors import Anchors
from detection.geometry.suppression import SUPPRESSIONS
from detection.network.detector import Detector

CANDIDATES = 1000  # of each level, by their highest class score
LEAST_SCORE = 0.05
OVERLAP = 0.6  # IoU above which the higher-scoring of two boxes of a class suppresses the other
MOST = 100  # detections of an image


def inference_network(network: Detector, device: torch.device) -> Detector:
    """A copy of a detector for inference: in eval mode, its batch norms folded into the convolutions before them."""
    return fold_batch_norm(network).to(device, memory_format=torch.channels_last)


@torch.inference_mode()
def detect(network: Detector, images: torch.Tensor, sizes: Sequence[tuple[int, int]],
           scales: Sequence[tuple[float, float]], device: torch.device, precision: str,
           suppression: str = "auto") -> list[dict[str, torch.Tensor]]:
    """The detections of a batch, [{"boxes": (M, 4) xyxy in pixels of the original image, "scores": (M,) descending,
    "labels": (M,)}], on the CPU.

    images: (N, 3, H, W) uint8. sizes: [(h, w)] of the images without padding. scales: [(x, y)] of the images to the
    original ones. suppression: a name of SUPPRESSIONS, or auto for the one of the network's head."""
    batch = normalise(images.to(device), sizes).contiguous(memory_format=torch.channels_last)
    with autocast(device, precision):
        outputs = network(batch)
    anchors = network.anchors(outputs.sizes, device)
    return detections(outputs, anchors, sizes, scales, network.suppression(suppression))


def detections(outputs: Any, anchors: Anchors, sizes: Sequence[tuple[int, int]],
               scales: Sequence[tuple[float, float]], suppression: str = "nms") -> list[dict[str, torch.Tensor]]:
    """What `detect` returns, of the Outputs of a batch and their Anchors."""
    boxes = outputs.boxes(anchors)  # (N, A, 4)
    scores = outputs.scores  # (N, A, C)
    return [_detections_of_image(boxes[i], scores[i], anchors, sizes[i], scales[i], SUPPRESSIONS[suppression])
            for i in range(len(sizes))]


def _detections_of_image(boxes: torch.Tensor, scores: torch.Tensor, anchors: Anchors, size: tuple[int, int],
                         scale: tuple[float, float],
                         suppress: Callable[..., tuple[torch.Tensor, ...]]) -> dict[str, torch.Tensor]:
    best = scores.amax(dim=1)
    kept, start = [], 0
    for level in best.split(anchors.counts):
        kept.append(level.topk(min(CANDIDATES, len(level))).indices + start)
        start += len(level)
    kept = torch.cat(kept)
    height, width = size
    limits = boxes.new_tensor([width, height, width, height])
    boxes, scores = boxes[kept].clamp(min=0).minimum(limits), scores[kept]
    candidate, label = (scores > LEAST_SCORE).nonzero(as_tuple=True)
    originals = boxes[candidate] / boxes.new_tensor([*scale, *scale])
    found = (originals, scores[candidate, label], label)
    if boxes.device.type == "mps":  # it has no float64, which the votes are counted in
        found = (part.cpu() for part in found)
    found = suppress(*found, OVERLAP, MOST)
    return dict(zip(("boxes", "scores", "labels"), (part.cpu() for part in found), strict=True))
