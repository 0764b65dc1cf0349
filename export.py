"""A trained network for use elsewhere: as ONNX, as a torch.export program, or as a small checkpoint to publish.

    python export.py onnx    --weights runs/FGSC-23/student/best.pt my_images/
    python export.py program --weights runs/FGSC-23/student/best.pt my_images/
    python export.py publish --weights runs/FGSC-23/student/best.pt --output published/

`onnx` and `program` write NAME.onnx or NAME.pt2, one file that holds weights, class names, groups and preprocessing.
Its input is `images`, any number of grey squares as bytes (batch, 1, size, size), which it scales itself; its output
is `logits` (batch, classes). The file is kept only if it agrees with the network on your images. `onnx` needs the
packages of requirements-export.txt.

`publish` writes NAME-12345678.pt: weights and description alone, with the first digits of the file's SHA-256 in its
name. The weights may be a checkpoint (best.pt, last.pt) or the authors' released files."""

from common.runtime import UserError, run_script  # before torch: Ctrl-C during the imports is no error

# isort: split
import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from common import exported
from common.files import atomic_path, publish_checkpoint, sha256_of, without_paths
from common.images import ValueRange, decode_squares, find_images
from common.weights import fold_batch_norm
from dataset import folder_of_list, network_input
from recognition.exported import LogitsFunction, read_exported
from recognition.inference import load_classifier
from resnet50 import ResNet50

LIMIT = 1e-4  # largest difference between file and network, as a part of the largest logit; rounding makes 1e-6
CHECKED = 64  # images to compare on at most
DYNAMIC = {0: torch.export.Dim("batch")}  # dimensions of the input


class BytesToLogits(nn.Module):
    """The exported module: the network with folded batch norms, and the scaling of its input."""

    def __init__(self, network: ResNet50):
        super().__init__()
        self.network = fold_batch_norm(network).requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images: (B, 1, H, W) uint8. Returns the logits (B, classes)."""
        logits, _ = self.network(network_input(images))
        return logits


def trace(network: ResNet50, size: int) -> torch.export.ExportedProgram:
    """The torch.export program of a network for batches of any number of images of size x size pixels."""
    images = torch.zeros(2, 1, size, size, dtype=torch.uint8)  # a batch of 1 could be taken for a constant
    return exported.trace(BytesToLogits(network).eval(), images, DYNAMIC)


def onnx_bytes(program: torch.export.ExportedProgram, description: str) -> bytes:
    """The content of an ONNX file."""
    return exported.onnx_bytes(program, DYNAMIC, ["logits"], description)


def program_bytes(program: torch.export.ExportedProgram, description: str) -> bytes:
    """The content of a .pt2 file, which `torch.export.load` reads."""
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={exported.METADATA: description})
    return content.getvalue()


# ---- the check -----------------------------------------------------------------------------------------------------


def read_images(files: list[Path], size: int, value_range: ValueRange | None) -> torch.Tensor:
    """(N, 1, size, size) uint8. Raises UserError for the first file that cannot be read as an image."""
    images = []
    for file, (image, reason) in zip(files, decode_squares((files, size, value_range)), strict=True):
        if image is None:
            raise UserError(f"{file}: {reason}; give readable images to check the exported file on")
        images.append(torch.from_numpy(image.copy()))
    return torch.stack(images).unsqueeze(1)


def batches(images: torch.Tensor) -> list[torch.Tensor]:
    """`images` in batches of different sizes: 1, 2, and up to 16. Fewer than 3 images are repeated."""
    images = images if len(images) > 2 else images.repeat(3, 1, 1, 1)
    parts = [images[:1], images[1:3], *images[3:].split(16)]
    return [part for part in parts if len(part)]


@torch.inference_mode()
def compare(network: ResNet50, logits_of: LogitsFunction, images: torch.Tensor, path: Path) -> str:
    """A message on the agreement between the logits of an exported file and of the network. Raises UserError where they
    differ by more than LIMIT times the largest logit, or in the most probable class.

    logits_of: the exported file as a function. images: (N, 1, size, size) uint8. path: of the file, for messages."""
    parts = batches(images)
    expected = torch.cat([network(network_input(part))[0] for part in parts])  # (N, classes)
    found = torch.cat([logits_of(part) for part in parts])
    limit = LIMIT * expected.abs().max()
    difference = (found - expected).abs().max() / expected.abs().max()
    # Rounding may swap two classes whose logits differ by less than the limit.
    chosen = expected.gather(1, found.argmax(1, keepdim=True)).squeeze(1)
    others = int((expected.amax(1) - chosen > limit).sum())
    sizes = ", ".join(str(size) for size in sorted({len(part) for part in parts}))
    message = (f"{len(images)} images in batches of {sizes}: the largest difference is {difference:.1e} of the largest "
               f"logit (limit {LIMIT:.0e})")
    if others or not difference <= LIMIT:  # not "difference > LIMIT", which is false for NaN
        raise UserError(f"{path}: not written: it disagrees with the network on {message}; another class for {others}")
    return f"agrees with the network on {message}, and the most probable classes are the same"


# ---- the program ---------------------------------------------------------------------------------------------------


def export(args: argparse.Namespace) -> None:
    """`onnx` and `program`."""
    exported.require_torch()
    suffix = {"onnx": ".onnx", "program": ".pt2"}[args.form]
    if args.form == "onnx":
        exported.require_packages("onnx", "onnxscript", "onnxruntime")
    network, description = load_classifier(args.weights, args.data_root, args.image_size)
    size = description["preprocessing"]["image_size"]
    value_range = description["preprocessing"].get("value_range")
    images = read_images(find_images(args.images, folder_of_list)[:CHECKED], size, value_range)
    description = json.dumps({
        **without_paths(description), "weights_sha256": sha256_of(args.weights),
        "input": f"images: uint8 (batch, 1, {size}, {size}), grey; mean and std are applied inside",
        "output": "logits: float32 (batch, classes)"})
    program = trace(network, size)
    content = onnx_bytes(program, description) if args.form == "onnx" else program_bytes(program, description)
    path = folder_of(args) / f"{Path(args.weights).stem}{suffix}"
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
        logits_of, _ = read_exported(temporary, suffix)
        agreement = compare(network, logits_of, images, path)
    print(f"{path}: {len(content) / 1e6:.1f} MB; {agreement}")


def publish(args: argparse.Namespace) -> None:
    """`publish`."""
    network, description = load_classifier(args.weights, args.data_root, args.image_size)
    publish_checkpoint(network, description, folder_of(args), Path(args.weights).stem)


def folder_of(args: argparse.Namespace) -> Path:
    return Path(args.output or Path(args.weights).parent)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    forms = parser.add_subparsers(dest="form", required=True, metavar="onnx | program | publish")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--weights", required=True, help="checkpoint of this project, or released weights")
    common.add_argument("--output", metavar="FOLDER", help="where to write (default: beside the weights)")
    common.add_argument("--data-root", help="data set whose class names to use, for weights that hold none")
    common.add_argument("--image-size", type=int, help="default: the training size of the checkpoint, or 224")
    for form, text in (("onnx", "an ONNX file"), ("program", "a torch.export program"),
                       ("publish", "a checkpoint of weights and description alone")):
        subparser = forms.add_parser(form, parents=[common], help=text, description=f"Write {text}.")
        if form != "publish":
            subparser.add_argument("images", nargs="+", help="image files, folders that are searched for them, or "
                                   f"lists (.txt); the file is checked on the first {CHECKED}")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if not 32 <= (args.image_size or 32) <= 4096:
        raise UserError("--image-size must be 32 to 4096")
    if args.form == "publish":
        publish(args)
    else:
        export(args)


if __name__ == "__main__":
    run_script(main)
