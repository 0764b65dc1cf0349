"""Name what is in images of your own: class and probability for each, as lines and as JSON.

    python predict.py --weights runs/FGSC-23/student/best.pt photo.png folder_of_chips/
    python predict.py --weights baselinestuweight_alpha_29 chips/ --json predictions.json

Checkpoints of this project bring their class names and image size. Released weights of the authors have neither: files
of 23 classes are taken for FGSC-23, of 15 for DOTA, at 224 pixels; --data-root names another data set. An image that
cannot be read is reported and left out, and makes the exit status 1."""

import argparse
import os
import sys
from pathlib import Path

import torch
from PIL import Image

from dataset import network_input, read_info
from image_cache import decode_square, in_processes, unreadable
from published import DOTA, FGSC23
from resnet50 import ResNet50, load_state, read_weights
from runtime import UserError, autocast, resolve_device, resolve_precision, run_script, write_json

BATCH = 64


def find_images(paths):
    """Every image file among `paths`, folders searched through, in a stable order. Raises UserError for a path that
    does not exist or if there is no image at all."""
    suffixes = tuple(Image.registered_extensions())
    images = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
            images += [file for file in found if not file.name.startswith(".")]
        elif path.is_file():
            images.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    if not images:
        raise UserError(f"{' '.join(map(str, paths))}: no image here")
    return images


def class_names(description, num_classes, data_root, weights):
    """The names of the network's classes, from --data-root, the checkpoint, or the published data sets."""
    if data_root:
        classes = read_info(data_root).classes
        if description and description["classes"] != classes:
            raise UserError(f"{weights}: was trained for other classes than those of {data_root}")
    elif description:
        classes = description["classes"]
    else:
        published = {len(data["classes"]): data for data in (FGSC23, DOTA)}.get(num_classes)
        if not published:
            raise UserError(f"{weights}: holds no class names; give the data set it was trained on with --data-root")
        print(f"note: {weights} holds no class names; taken for {published['name']}, as it has {num_classes} classes",
              file=sys.stderr)
        classes = published["classes"]
    if len(classes) != num_classes:
        raise UserError(f"{weights}: is for {num_classes} classes; {data_root} has {len(classes)}")
    return classes


def _decode(job):
    path, size = job
    try:
        return decode_square(path, size), None
    except Exception as error:  # a damaged file can make a decoder raise anything
        return None, unreadable(error)


@torch.inference_mode()
def probabilities(network, images, device, precision):
    """(B, 1, H, W) uint8 images -> (B, classes) fp32 softmax probabilities on the CPU."""
    with autocast(device, precision):
        logits, _ = network(network_input(images.to(device)))
    return logits.float().softmax(1).cpu()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", help="image files, or folders that are searched for them")
    parser.add_argument("--weights", required=True, help="checkpoint of this project, or released weights")
    parser.add_argument("--json", help="also write all predictions to this file")
    parser.add_argument("--data-root", help="data set whose class names to use, for weights that hold none")
    parser.add_argument("--image-size", type=int, help="default: what the checkpoint was trained at, or 224")
    parser.add_argument("--top", type=int, default=3, help="classes to give for each image, the likeliest first")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", help="fp32, bf16 or auto")
    args = parser.parse_args(argv)

    device = resolve_device(args.device)
    precision = resolve_precision(args.precision, device)
    state, description = read_weights(args.weights)
    if getattr(state.get("fc.bias"), "ndim", 0) != 1:
        raise UserError(f"{args.weights}: lacks fc.bias; expected the weights of a ResNet-50")
    network = ResNet50(len(state["fc.bias"]))
    load_state(network, state, args.weights)
    network.eval().to(device, memory_format=torch.channels_last)
    classes = class_names(description, network.fc.out_features, args.data_root, args.weights)
    size = args.image_size or (description["preprocessing"]["image_size"] if description else 224)
    top = min(max(args.top, 1), len(classes))

    files = find_images(args.images)
    predictions, batch = [], []
    decoded = in_processes(_decode, [(os.fspath(file), size) for file in files])
    for number, (file, (image, reason)) in enumerate(zip(files, decoded, strict=True), 1):
        if reason:
            print(f"{file}: {reason}", file=sys.stderr)
            predictions.append({"image": str(file), "error": reason})
        else:
            batch.append((file, torch.from_numpy(image.copy())))
        if batch and (len(batch) == BATCH or number == len(files)):
            values, ids = probabilities(network, torch.stack([image for _, image in batch]).unsqueeze(1), device,
                                        precision).topk(top)
            for (path, _), row, row_ids in zip(batch, values.tolist(), ids.tolist(), strict=True):
                ranked = [{"id": i, "class": classes[i], "probability": value}
                          for value, i in zip(row, row_ids, strict=True)]
                predictions.append({"image": str(path), "predictions": ranked})
                print(f"{path}: " + ", ".join(f"{each['class']} {each['probability']:.3f}" for each in ranked))
            batch = []
    if args.json:
        write_json(args.json, predictions)
    return int(any("error" in prediction for prediction in predictions))


if __name__ == "__main__":
    run_script(main)
