"""A trained network for use elsewhere: as ONNX, as a torch.export program, or as a small checkpoint to publish.

    python export.py onnx    --weights runs/FGSC-23/student/best.pt my_images/
    python export.py program --weights runs/FGSC-23/student/best.pt my_images/
    python export.py publish --weights runs/FGSC-23/student/best.pt --output published/

`onnx` and `program` write NAME.onnx or NAME.pt2, one file that holds weights, class names, groups and preprocessing.
It takes `images`, any number of grey squares as bytes (batch, 1, size, size), scales them inside, and gives `logits`
(batch, classes). It is kept only if it agrees with the network on your images. `onnx` needs the packages of
requirements-export.txt.

`publish` writes NAME-12345678.pt: weights and description alone, with the first digits of the file's SHA-256 in its
name. The weights may be a checkpoint (best.pt, last.pt) or the authors' released files."""

import argparse
import io
import json
from pathlib import Path

import torch
from torch import nn

from common.files import atomic_path, publish_checkpoint, sha256_of, without_paths
from common.images import find_images
from common.runtime import UserError, run_script
from common.weights import fold_batch_norm
from dataset import network_input
from predict import decode
from recognition.exported import METADATA, read_exported, require_packages, require_torch
from recognition.inference import load_classifier

LIMIT = 1e-4  # of the largest logit: how far an exported file may be from the network; rounding makes about 1e-6
CHECKED = 64  # images to compare on, at most


class BytesToLogits(nn.Module):
    """What is exported: the network, its batch norm folded, with the scaling of its input."""

    def __init__(self, network):
        super().__init__()
        self.network = fold_batch_norm(network).requires_grad_(False)

    def forward(self, images):
        """images: (B, 1, H, W) uint8. Returns the logits (B, classes)."""
        logits, _ = self.network(network_input(images))
        return logits


def trace(network, size):
    """The torch.export program of a network for images of size x size pixels and any batch."""
    images = torch.zeros(2, 1, size, size, dtype=torch.uint8)  # a batch of 1 could be taken for a constant
    shapes = {"images": {0: torch.export.Dim("batch")}}
    program = torch.export.export(BytesToLogits(network).eval(), (images,), dynamic_shapes=shapes)
    for node in program.graph.nodes:  # the rest are traces of the source, with paths of this machine
        node.meta = {key: value for key, value in node.meta.items() if key == "val"}
    return program


def onnx_bytes(program, description):
    """The content of an ONNX file."""
    exported = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["images"], output_names=["logits"],
                                 dynamic_shapes={"images": {0: "batch"}})
    for node in exported.model.graph:
        node.metadata_props.clear()  # as in `trace`
    exported.model.metadata_props[METADATA] = description
    return exported.model_proto.SerializeToString()


def program_bytes(program, description):
    """The content of a .pt2 file, which `torch.export.load` reads."""
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={METADATA: description})
    return content.getvalue()


# ---- the check -----------------------------------------------------------------------------------------------------


def read_images(files, size):
    """(N, 1, size, size) uint8. Raises UserError for the first file that is no image."""
    images = []
    for file, (image, reason) in zip(files, decode((files, size)), strict=True):
        if reason:
            raise UserError(f"{file}: {reason}; give images that can be read, to check the exported file on")
        images.append(torch.from_numpy(image.copy()))
    return torch.stack(images).unsqueeze(1)


def batches(images):
    """`images` in batches of different sizes: 1, 2, and up to 16. Fewer than 3 images are repeated."""
    images = images if len(images) > 2 else images.repeat(3, 1, 1, 1)
    parts = [images[:1], images[1:3], *images[3:].split(16)]
    return [part for part in parts if len(part)]


@torch.inference_mode()
def compare(network, logits_of, images, path):
    """In words, how near the logits of an exported file are to those of the network. Raises UserError where they
    differ by more than LIMIT times the largest logit, or name another class.

    logits_of: the exported file as a function. images: (N, 1, size, size) uint8. path: the file's, for messages."""
    parts = batches(images)
    expected = torch.cat([network(network_input(part))[0] for part in parts])  # (N, classes)
    found = torch.cat([logits_of(part) for part in parts])
    limit = LIMIT * expected.abs().max()
    difference = (found - expected).abs().max() / expected.abs().max()
    # Where the two best classes are as near to each other as the limit, rounding may swap them.
    chosen = expected.gather(1, found.argmax(1, keepdim=True)).squeeze(1)
    others = int((expected.amax(1) - chosen > limit).sum())
    sizes = ", ".join(str(size) for size in sorted({len(part) for part in parts}))
    said = (f"{len(images)} images in batches of {sizes}: the largest difference is {difference:.1e} of the largest "
            f"logit (limit {LIMIT:.0e})")
    if others or not difference <= LIMIT:  # not "difference > LIMIT": it may be no number
        raise UserError(f"{path}: not written: it disagrees with the network on {said}; another class for {others}")
    return f"agrees with the network on {said}, and the likeliest classes are the same"


# ---- the program ---------------------------------------------------------------------------------------------------


def export(args):
    """`onnx` and `program`."""
    require_torch()
    suffix = {"onnx": ".onnx", "program": ".pt2"}[args.form]
    if args.form == "onnx":
        require_packages("onnx", "onnxscript", "onnxruntime")
    network, description = load_classifier(args.weights, args.data_root, args.image_size)
    size = description["preprocessing"]["image_size"]
    images = read_images(find_images(args.images)[:CHECKED], size)
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
        said = compare(network, logits_of, images, path)
    print(f"{path}: {len(content) / 1e6:.1f} MB; {said}")


def publish(args):
    """`publish`."""
    network, description = load_classifier(args.weights, args.data_root, args.image_size)
    publish_checkpoint(network, description, folder_of(args), Path(args.weights).stem)


def folder_of(args):
    return Path(args.output or Path(args.weights).parent)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    forms = parser.add_subparsers(dest="form", required=True, metavar="onnx | program | publish")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--weights", required=True, help="checkpoint of this project, or released weights")
    common.add_argument("--output", metavar="FOLDER", help="where to write (default: beside the weights)")
    common.add_argument("--data-root", help="data set whose class names to use, for weights that hold none")
    common.add_argument("--image-size", type=int, help="default: what the checkpoint was trained at, or 224")
    for form, text in (("onnx", "an ONNX file"), ("program", "a torch.export program"),
                       ("publish", "a checkpoint of weights and description alone")):
        own = forms.add_parser(form, parents=[common], help=text, description=f"Write {text}.")
        if form != "publish":
            own.add_argument("images", nargs="+", help="image files, folders that are searched for them, or lists "
                             f"(.txt); the file is checked on the first {CHECKED}")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if not 32 <= (args.image_size or 32) <= 4096:
        raise UserError("--image-size must be 32 to 4096")
    if args.form == "publish":
        publish(args)
    else:
        export(args)


if __name__ == "__main__":
    run_script(main)
