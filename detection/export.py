"""A trained detector as an ONNX file, for use elsewhere.

    python -m detection.export --weights runs/mine/ld/final.pt my_images/
    python -m detection.predict --weights runs/mine/ld/final.onnx my_images/

Writes NAME.onnx, one file that holds weights, class names and preprocessing. Its input is `images`, colours as bytes
(batch, 3, height, width): any number of images of one size, resized as in the detector's tests; it pads and normalises
them itself. Its outputs are `boxes` (batch, anchors, 4), x1, y1, x2, y2 in pixels of the input, or of a detector of
oriented boxes (batch, anchors, 5), cx, cy, w, h, theta, and `scores` (batch, anchors, classes), 0 to 1, of every
anchor: what overlaps is thinned out by whoever runs the file. Batch, height and width are free, and the number of
anchors follows from them.

The file is kept only if it agrees with the detector on your images. It needs the packages of
requirements-export.txt."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from common.exported import onnx_bytes, require_packages, require_torch, trace
from common.files import atomic_path, sha256_of, without_paths
from common.images import find_images, unreadable
from common.runtime import UserError, run_script
from common.weights import fold_batch_norm
from detection.checkpoint import load_detector
from detection.data.transforms import (
    PAD_MULTIPLE,
    decode_rgb,
    normalise,
    normalise_colours,
    pad_to_batch,
    resize_for_test,
)
from detection.exported import ExportedDetector
from detection.network.detector import Detector

# Dimensions of the input. The exporter wants every level of the pyramid larger than one location; the file does not.
DYNAMIC = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=129, max=1 << 15),
           3: torch.export.Dim("width", min=129, max=1 << 15)}
EXAMPLE = (2, 3, 200, 300)
CHECKED = 8  # images to compare on at most
SCORE_LIMIT, BOX_LIMIT = 1e-3, 0.1  # largest differences between file and network, boxes in pixels


class BytesToBoxes(nn.Module):
    """The exported module: the network with folded batch norms, padding and normalising before it, decoding after."""

    def __init__(self, network: Detector):
        super().__init__()
        self.network = fold_batch_norm(network).requires_grad_(False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """images: (N, 3, h, w) uint8. Returns the boxes (N, A, 4) and the scores (N, A, C)."""
        height, width = images.shape[2:]
        batch = F.pad(normalise_colours(images), (0, -width % PAD_MULTIPLE, 0, -height % PAD_MULTIPLE))
        outputs = self.network(batch)
        return outputs.boxes(self.network.anchors(outputs.sizes, images.device)), outputs.scores


def to_onnx(network: Detector, description: str) -> bytes:
    """The content of the ONNX file. description: kept in its metadata."""
    # The exporter cannot prove that the sizes of the levels fit each other: the file would check it when it runs.
    program = trace(BytesToBoxes(network).eval(), torch.zeros(EXAMPLE, dtype=torch.uint8), DYNAMIC,
                    prefer_deferred_runtime_asserts_over_guards=True)
    return onnx_bytes(program, DYNAMIC, ["boxes", "scores"], description)


def read_images(files: Sequence[Path], preprocessing: dict[str, Any]) -> list[torch.Tensor]:
    """[(3, h, w) uint8] as in the detector's tests. Raises UserError for the first file that cannot be read."""
    images = []
    for file in files:
        try:
            images.append(resize_for_test(decode_rgb(file, preprocessing.get("value_range")), preprocessing)[0])
        except Exception as error:  # a damaged file can make a decoder raise anything
            raise UserError(f"{file}: {unreadable(error)}; give readable images to check the file on") from None
    return images


@torch.inference_mode()
def compare(network: Detector, exported: ExportedDetector, images: Sequence[torch.Tensor], path: Path) -> str:
    """A message on the agreement between an exported file and the network. Raises UserError where a score differs by
    more than SCORE_LIMIT or a side of a box by more than BOX_LIMIT.

    images: [(3, h, w) uint8]; a batch of two, upright where the first image is wide, is compared as well. path: of the
    file, for messages."""
    batches = [torch.stack([images[0], images[0].flip(1)]).transpose(2, 3), *(image[None] for image in images)]
    differences = []
    for batch in batches:
        padded, sizes = pad_to_batch(list(batch))
        outputs, (found, anchors) = network(normalise(padded, sizes)), exported(batch)
        differences.append([(found.scores - outputs.scores).abs().max(),
                            (found.boxes(anchors) - outputs.boxes(anchors)).abs().max()])
    scores, boxes = torch.tensor(differences).amax(dim=0).tolist()
    message = (f"{len(images)} images: the largest difference of a score is {scores:.1e} (limit {SCORE_LIMIT:.0e}), of "
               f"a box {boxes:.1e} pixels (limit {BOX_LIMIT})")
    if not (scores <= SCORE_LIMIT and boxes <= BOX_LIMIT):  # also where one is NaN
        raise UserError(f"{path}: not written: it disagrees with the network on {message}")
    return f"agrees with the network on {message}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", help="image files, folders that are searched for them, or lists (.txt); "
                        f"the file is checked on the first {CHECKED}")
    parser.add_argument("--weights", required=True, help="checkpoint of a detector")
    parser.add_argument("--output", metavar="FOLDER", help="where to write (default: beside the weights)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    require_torch()
    require_packages("onnx", "onnxscript", "onnxruntime")
    network, description = load_detector(args.weights)
    images = read_images(find_images(args.images)[:CHECKED], description["preprocessing"])
    content = to_onnx(network, json.dumps({
        **without_paths(description), "weights_sha256": sha256_of(args.weights),
        "input": "images: uint8 (batch, 3, height, width), R, G, B; padding, mean and std are applied inside",
        "output": "boxes: float32 (batch, anchors, 4), x1 y1 x2 y2 in pixels of the input, or (batch, anchors, 5), cx "
                  "cy w h theta, of oriented boxes, before suppression; scores: "
                  "float32 (batch, anchors, classes)"}))
    path = Path(args.output or Path(args.weights).parent) / f"{Path(args.weights).stem}.onnx"
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
        agreement = compare(network, ExportedDetector(temporary), images, path)
    print(f"{path}: {len(content) / 1e6:.1f} MB; {agreement}")


if __name__ == "__main__":
    run_script(main)
