"""Name what is in images of your own: the likeliest classes of each, as lines, CSV or JSON.

    python predict.py --weights runs/FGSC-23/student/best.pt photo.png folder_of_chips/
    python predict.py --weights baselinestuweight_alpha_29 list.txt --csv predictions.csv --top 5
    python predict.py --weights runs/FGSC-23/student/best.onnx my_images/

A list is a text file (.txt) with one path a line, seen from its own folder; a label after the path is ignored.
Checkpoints of this project bring their class names and image size, and so do the files that export.py made of them,
which run here on the CPU in fp32. Released weights of the authors have neither: files of 23 classes are taken for
FGSC-23, of 15 for DOTA, at 224 pixels; --data-root names another data set. An image that cannot be read is reported
and left out, and makes the exit status 1."""

import argparse
import csv
import os
import sys

import torch

from common.files import atomic_path, write_json
from common.images import decode_square, find_images, unreadable
from common.runtime import UserError, run_script
from common.workers import in_processes
from recognition.inference import open_classifier


def decode(job):
    """[((size, size) uint8 array or None, what is wrong or None)] of a job (files, size)."""
    files, size = job
    decoded = []
    for file in files:
        try:
            decoded.append((decode_square(file, size), None))
        except Exception as error:  # a damaged file can make a decoder raise anything
            decoded.append((None, unreadable(error) if os.path.isfile(file) else "no such image"))
    return decoded


def predict(classifier, files, top):
    """Yield (file, [(class id, probability), ...] or None, what is wrong or None) for each file, in order.

    classifier: an `inference.Classifier`. top: how many classes, the likeliest first."""
    together = classifier.batch_size
    chunks = [files[start:start + together] for start in range(0, len(files), together)]
    jobs = [(chunk, classifier.image_size) for chunk in chunks]
    for chunk, decoded in zip(chunks, in_processes(decode, jobs), strict=True):
        readable = [torch.from_numpy(image.copy()) for image, _ in decoded if image is not None]
        ranked = iter(())
        if readable:
            logits = classifier.logits_of(torch.stack(readable).unsqueeze(1))  # (readable images, classes)
            probabilities, ids = logits.softmax(1).topk(top)
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
    parser.add_argument("--weights", required=True, help="checkpoint of this project, released weights, or a "
                        "file that export.py made of them (.onnx, .pt2)")
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

    classifier = open_classifier(args.weights, args.data_root, args.image_size, args.device, args.precision)
    classes = classifier.classes
    top, rows = min(args.top, len(classes)), []
    for file, ranked, reason in predict(classifier, find_images(args.images), top):
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
