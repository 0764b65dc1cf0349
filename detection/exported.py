"""Running the ONNX files that detection.export writes, in fp32 on the CPU. Such a file holds no code."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from common.exported import RunFunction, read_onnx
from common.runtime import UserError
from detection.checkpoint import empty_detector, is_description
from detection.data.transforms import PAD_MULTIPLE
from detection.geometry.anchors import Anchors, pyramid_sizes
from detection.network.detector import Detector


@dataclass
class ExportedOutputs:
    """The outputs of an exported detector for a batch, with what `inference.detections` asks of outputs."""

    decoded: torch.Tensor  # (N, A, 4) boxes in pixels, fp32
    scores: torch.Tensor  # (N, A, C) in 0..1, fp32

    def boxes(self, anchors: Anchors) -> torch.Tensor:
        """(N, A, 4) boxes in pixels."""
        return self.decoded


class ExportedDetector:
    """A detector in an ONNX file.

    description: the metadata of the checkpoint that it was made of."""

    def __init__(self, path: str | Path):
        """Raises UserError for a file that detection.export does not write."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        try:
            self._run, self.description = read_onnx(path)
            if not is_description(self.description):
                raise ValueError("its description is not one of a detector")
            self._network = empty_detector(path, self.description)  # for its anchors
            _check_that_it_works(self._run, self._network)
        except UserError:
            raise
        # A damaged file can raise any exception, here or in the libraries.
        except Exception as error:
            reason = str(error).split("\n")[0][:200] or type(error).__name__
            raise UserError(
                f"{path}: truncated, damaged, or not a file that detection.export wrote ({reason})") from None

    def __call__(self, images: torch.Tensor) -> tuple[ExportedOutputs, Anchors]:
        """images: (N, 3, h, w) uint8, of any size. Returns the outputs, and the anchors that they belong to."""
        return ExportedOutputs(*self._run(images)), anchors_of(self._network, images)


def anchors_of(network: Detector, images: torch.Tensor) -> Anchors:
    """The Anchors of images (N, 3, h, w) that are yet to be padded."""
    height, width = (PAD_MULTIPLE * math.ceil(side / PAD_MULTIPLE) for side in images.shape[2:])
    return network.anchors(pyramid_sizes(height, width), images.device)


def _check_that_it_works(run: RunFunction, network: Detector) -> None:
    """Raise an exception unless two black images give scores of every class, and boxes, for every anchor."""
    images = torch.zeros(2, 3, 64, 96, dtype=torch.uint8)
    boxes, scores = run(images)
    anchors = len(anchors_of(network, images).boxes)
    if boxes.shape[:2] != (2, anchors) or scores.shape != (2, anchors, network.num_classes):
        raise ValueError("its outputs do not fit its anchors and class names")
