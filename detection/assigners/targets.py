"""The input and the output of an assigner."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GroundTruth:
    """The annotated objects of a batch of N images: T objects of all images together, image after image."""

    boxes: torch.Tensor  # (T, 4) xyxy in pixels, or (T, 5): see detection.geometry.oriented
    labels: torch.Tensor  # (T,) int64
    image_of: torch.Tensor  # (T,) int64 the image of each object
    image_sizes: list[tuple[int, int]]  # (height, width) of the images before they were padded to the size of the batch
    num_classes: int


@dataclass(frozen=True)
class Targets:
    """What every anchor of a batch is to predict. N images, A anchors, T objects of all images together."""

    labels: torch.Tensor  # (N, A) int64 class of the matched object, num_classes for background
    boxes: torch.Tensor  # (N, A, 4 or 5) box of the matched object in pixels, zeros for background
    matched: torch.Tensor  # (N, A) int64 index of the matched object among the T, -1 for background, -2 for ignored
    valid: torch.Tensor  # (N, A) bool: whether the anchor lies on its image
    positives: tuple[torch.Tensor, ...]  # image (P,) and anchor (P,) of the positive anchors, int64
    gt_boxes: torch.Tensor  # (T, 4 or 5) pixels
    image_of: torch.Tensor  # (T,) int64 the image of each object
    thresholds: torch.Tensor  # (T,) the IoU from which an anchor is positive for each object

    @property
    def positive(self) -> torch.Tensor:
        """(N, A) bool: the main region, the anchors that are assigned to an object."""
        return self.matched >= 0


def ground_truth(boxes: torch.Tensor, labels: torch.Tensor, counts: Sequence[int], image_sizes: list[tuple[int, int]],
                 num_classes: int) -> GroundTruth:
    """The GroundTruth of a batch. counts: how many of the T objects each image has; for the rest see GroundTruth."""
    image_of = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(boxes.device, non_blocking=True)
    return GroundTruth(boxes, labels, image_of, image_sizes, num_classes)


def targets_of_matches(matched: torch.Tensor, valid: torch.Tensor, thresholds: torch.Tensor,
                       truth: GroundTruth) -> Targets:
    """The Targets of anchors matched (N, A) to the objects of `truth`, -1 for background, -2 for ignored, which have
    the label and the box of background; for the rest see Targets."""
    # One more entry, for the index -1 of the background.
    labels = torch.cat([truth.labels, truth.labels.new_full((1,), truth.num_classes)])
    boxes = torch.cat([truth.boxes, truth.boxes.new_zeros(1, truth.boxes.shape[1])])
    index = matched.clamp(min=-1)
    return Targets(labels[index], boxes[index], matched, valid, (matched >= 0).nonzero(as_tuple=True), truth.boxes,
                   truth.image_of, thresholds)
