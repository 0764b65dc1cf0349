"""From a trained detector to the boxes of an image."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from common.runtime import autocast
from common.weights import fold_batch_norm
from detection.data.transforms import normalise
from detection.geometry.anchors import Anchors
from detection.geometry.oriented import regularise
from detection.geometry.suppression import Selection
from detection.network.detector import Detector


def inference_network(network: Detector, device: torch.device) -> Detector:
    """A copy of a detector for inference: in eval mode, its batch norms folded into the convolutions before them."""
    return fold_batch_norm(network).to(device, memory_format=torch.channels_last)


@torch.inference_mode()
def detect(network: Detector, images: torch.Tensor, sizes: Sequence[tuple[int, int]],
           scales: Sequence[tuple[float, float]], device: torch.device, precision: str,
           suppression: str = "auto") -> list[dict[str, torch.Tensor]]:
    """The detections of a batch, [{"boxes": (M, 4) xyxy, or (M, 5) oriented, in pixels of the original image, "scores":
    (M,) descending, "labels": (M,)}], on the CPU.

    images: (N, 3, H, W) uint8. sizes: [(h, w)] of the images without padding. scales: [(x, y)] of the images to the
    original ones. suppression: as of `Selection.named`."""
    batch = normalise(images.to(device), sizes).contiguous(memory_format=torch.channels_last)
    with autocast(device, precision):
        outputs = network(batch)
    anchors = network.anchors(outputs.sizes, device)
    return detections(outputs, anchors, sizes, scales, network.architecture.kind.selection, suppression)


def detections(outputs: Any, anchors: Anchors, sizes: Sequence[tuple[int, int]], scales: Sequence[tuple[float, float]],
               selection: Selection, suppression: str = "auto") -> list[dict[str, torch.Tensor]]:
    """What `detect` returns, of the outputs of a batch and their Anchors."""
    boxes = outputs.boxes(anchors)  # (N, A, 4 or 5)
    scores = outputs.scores  # (N, A, C)
    return [_detections_of_image(boxes[i], scores[i], anchors, sizes[i], scales[i], selection, suppression)
            for i in range(len(sizes))]


def _detections_of_image(boxes: torch.Tensor, scores: torch.Tensor, anchors: Anchors, size: tuple[int, int],
                         scale: tuple[float, float], selection: Selection,
                         suppression: str) -> dict[str, torch.Tensor]:
    best = scores.amax(dim=1)
    kept, start = [], 0
    for level in best.split(anchors.counts):
        kept.append(level.topk(min(selection.candidates, len(level))).indices + start)
        start += len(level)
    kept = torch.cat(kept)
    boxes, scores = in_original(boxes[kept], size, scale), scores[kept]
    candidate, label = (scores > selection.least_score).nonzero(as_tuple=True)
    found = (boxes[candidate], scores[candidate, label], label)
    if boxes.device.type == "mps":  # it has no float64, which the votes are counted in
        found = (part.cpu() for part in found)
    found = selection.suppressions[selection.named(suppression)](*found, selection.overlap, selection.most)
    return dict(zip(("boxes", "scores", "labels"), (part.cpu() for part in found), strict=True))


def in_original(boxes: torch.Tensor, size: tuple[int, int], scale: tuple[float, float]) -> torch.Tensor:
    """Boxes (M, 4), clipped to an image of `size` (height, width), or oriented ones (M, 5), their centres clipped, in
    pixels of the original image, of which it is `scale` (x, y)."""
    (height, width), (x, y) = size, scale
    if boxes.shape[1] == 4:
        return boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height])) / boxes.new_tensor(
            [x, y, x, y])
    centres, rest = boxes.split([2, 3], dim=1)
    centres = centres.clamp(min=0).minimum(boxes.new_tensor([width, height]))
    side = math.sqrt(x * y)  # as detection.data.transforms.resize scales the sides
    return regularise(torch.cat([centres, rest], dim=1) / boxes.new_tensor([x, y, side, side, 1]))
