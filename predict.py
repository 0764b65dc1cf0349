"""Name what is in images of your own: the likeliest classes of each, as lines, CSV or JSON.

    python predict.py --weights runs/FGSC-23/student/best.pt photo.png folder_of_chips/
    python predict.py --weights baselinestuweight_alpha_29 list.txt --csv predictions.csv --top 5

A list is a text file (.txt) with one path a line, seen from its own folder; a label after the path is ignored.
Checkpoints of this project bring their class names and image size. Released weights of the authors have neither: files
of 23 classes are taken for FGSC-23, of 15 for DOTA, at 224 pixels; --data-root names another data set. An image that
cannot be read is reported and left out, and makes the exit status 1."""

import argparse
import csv
import os
import sys
from pathlib import Path

import torch
from PIL import Image

from dataset import list_lines, network_input, read_info
from image_cache import decode_square, in_processes, unreadable
from published import DOTA, FGSC23
from resnet50 import ResNet50, load_state, read_weights
from runtime import UserError, atomic_path, autocast, resolve_device, resolve_precision, run_script, write_json

CHUNK = 64  # images that are decoded, and pass through the network, together


def find_images(paths):
    """Every image among `paths` in a stable order: files, folders searched through, lists (.txt). Raises UserError for
    a path that does not exist or if there is no image at all."""
    suffixes = tuple(Image.registered_extensions())
    images = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
            images += [file for file in found if not file.name.startswith(".")]
        elif path.suffix.lower() == ".txt" and path.is_file():
            for _, line in list_lines(path):
                name, _, label = line.rpartition(" ")
                images.append(path.parent / (name if name and label.isdigit() else line))
        elif path.is_file():
            images.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    if not images:
        raise UserError(f"{' '.join(map(str, paths))}: no image here")
    return images


def load_classifier(weights, data_root=None):
    """(network in eval mode, class names, image size) of a checkpoint or released weights."""
    state, description = read_weights(weights)
    if getattr(state.get("fc.bias"), "ndim", 0) != 1:
        raise UserError(f"{weights}: lacks fc.bias; expected the weights of a ResNet-50")
    network = ResNet50(len(state["fc.bias"]))
    load_state(network, state, weights)
    size = description["preprocessing"]["image_size"] if description else 224
    return network.eval(), class_names(description, network.fc.out_features, data_root, weights), size


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
    """[(uint8 array or None, what is wrong or None)] of a chunk of files."""
    files, size = job
    decoded = []
    for file in files:
        try:
            decoded.append((decode_square(file, size), None))
        except Exception as error:  # a damaged file can make a decoder raise anything
            decoded.append((None, unreadable(error) if os.path.isfile(file) else "no such image"))
    return decoded


@torch.inference_mode()
def predict(network, files, size, top, device, precision):
    """Yield (file, [(class id, probability), ...] or None, what is wrong or None) for each file, in order.

    top: how many classes, the likeliest first."""
    chunks = [files[start:start + CHUNK] for start in range(0, len(files), CHUNK)]
    for chunk, decoded in zip(chunks, in_processes(_decode, [(chunk, size) for chunk in chunks]), strict=True):
        readable = [torch.from_numpy(image.copy()) for image, _ in decoded if image is not None]
        ranked = iter(())
        if readable:
            images = torch.stack(readable).unsqueeze(1).to(device)  # (B, 1, size, size)
            with autocast(device, precision):
                logits, _ = network(network_input(images))
            probabilities, ids = logits.float().softmax(1).topk(top)
            ranked = zip(ids.tolist(), probabilities.tolist(), strict=True)
        for file, (_, reason) in zip(chunk, decoded, strict=True):
            yield file, None if reason else list(zip(*next(ranked), strict=True)), reason


def write_csv(path, rows, top):
    """One line an image: path, class and probability, then those of the next likeliest classes."""
    header = ["path", "class", "probability"]
    header += [f"{name}_{number}" for number in range(2, top + 1) for name in ("class", "probability")]
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for row in rows:
            if "error" not in row:
                writer.writerow([row["path"], *(value for each in row["predictions"]
                                                for value in (each["class"], f"{each['probability']:.6f}"))])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", help="image files, folders that are searched for them, or lists (.txt)")
    parser.add_argument("--weights", required=True, help="checkpoint of this project, or released weights")
    parser.add_argument("--csv", metavar="FILE", help="also write path, class, probability, ... of each image")
    parser.add_argument("--json", metavar="FILE", help="also write all predictions, and what could not be read")
    parser.add_argument("--data-root", help="data set whose class names to use, for weights that hold none")
    parser.add_argument("--image-size", type=int, help="default: what the checkpoint was trained at, or 224")
    parser.add_argument("--top", type=int, default=3, help="classes to give for each image, the likeliest first")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--precision", default="auto", help="fp32, bf16 or auto")
    args = parser.parse_args(argv)
    if args.top < 1 or not 32 <= (args.image_size or 32) <= 4096:
        raise UserError("--top must be at least 1 and --image-size 32 to 4096")

    device = resolve_device(args.device)
    precision = resolve_precision(args.precision, device)
    network, classes, size = load_classifier(args.weights, args.data_root)
    network.to(device, memory_format=torch.channels_last)
    top, rows = min(args.top, len(classes)), []
    files = find_images(args.images)
    for file, ranked, reason in predict(network, files, args.image_size or size, top, device, precision):
        if reason:
            print(f"{file}: {reason}", file=sys.stderr)
            rows.append({"path": str(file), "error": reason})
            continue
        rows.append({"path": str(file), "predictions": [
            {"id": class_id, "class": classes[class_id], "probability": value} for class_id, value in ranked]})
        print(f"{file}: " + ", ".join(f"{classes[class_id]} {value:.3f}" for class_id, value in ranked))
    if args.csv:
        write_csv(args.csv, rows, top)
    if args.json:
        write_json(args.json, rows)
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    run_script(main)
