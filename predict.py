"""Classify your own images: the most probable classes of each, as lines, CSV or JSON.

    python predict.py --weights runs/FGSC-23/student/best.pt photo.png folder_of_chips/
    python predict.py --weights baselinestuweight_alpha_29 list.txt --csv predictions.csv --top 5
    python predict.py --weights runs/FGSC-23/student/best.onnx my_images/

A list is a text file (.txt) with one path a line, relative to its own folder; a label after the path is ignored. The
lists of a data set, as its test.txt, are relative to the folder of its images.
Checkpoints of this project bring their class names and image size, and so do the files that export.py made of them,
which run here on the CPU in fp32. Released weights of the authors have neither: files of 23 classes are taken for
FGSC-23, of 15 for DOTA, at 224 pixels; --data-root names another data set. An image that cannot be read is reported
and skipped, and makes the exit status 1."""

from common.runtime import UserError, run_script  # before torch: Ctrl-C during the imports is no error

# isort: split
import argparse
import contextlib
import csv
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import torch

from common.files import check_output_file, write_json
from common.images import decode_squares, find_images, low_and_high, range_to_predict_with
from common.workers import in_processes
from dataset import folder_of_list
from recognition.inference import Classifier, open_classifier


class Prediction(NamedTuple):
    """The most probable classes of an image, [(class id, probability)], or the reason why it could not be read."""

    file: Path
    ranking: list[tuple[int, float]]
    reason: str | None


def predict(classifier: Classifier, files: list[Path], top: int) -> Iterator[Prediction]:
    """Yield the Prediction of each file, in order. top: the number of classes, most probable first."""
    together = classifier.batch_size
    chunks = [files[start:start + together] for start in range(0, len(files), together)]
    jobs = [(chunk, classifier.image_size, classifier.value_range) for chunk in chunks]
    for chunk, decoded in zip(chunks, in_processes(decode_squares, jobs), strict=True):
        readable = [torch.from_numpy(image.copy()) for image, _ in decoded if image is not None]
        rankings = most_probable(classifier, readable, top) if readable else []
        remaining = iter(rankings)
        for file, (_, reason) in zip(chunk, decoded, strict=True):
            yield Prediction(file, [] if reason else next(remaining), reason)


def most_probable(classifier: Classifier, images: list[torch.Tensor], top: int) -> list[list[tuple[int, float]]]:
    """For each of the images, (size, size) uint8, the `top` most probable classes: [(class id, probability)]."""
    logits = classifier.logits_of(torch.stack(images).unsqueeze(1))  # (images, classes)
    probabilities, ids = logits.softmax(1).topk(top)
    return [list(zip(ids_of_image, probabilities_of_image, strict=True))
            for ids_of_image, probabilities_of_image in zip(ids.tolist(), probabilities.tolist(), strict=True)]


def open_csv(path: str, top: int) -> TextIO:
    """A CSV file with its header: path, class and probability, then the next most probable classes and probabilities.
    Each row is on disk at once. Bytes of a path that are not UTF-8 are written as \\udc.. escapes."""
    file = open(path, "w", newline="", encoding="utf-8", errors="backslashreplace", buffering=1)  # noqa: SIM115
    header = [f"{name}_{number}" for number in range(2, top + 1) for name in ("class", "probability")]
    csv.writer(file).writerow(["path", "class", "probability", *header])
    return file


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", help="image files, folders that are searched for them, or lists (.txt)")
    parser.add_argument("--weights", required=True, help="checkpoint of this project, released weights, or a "
                        "file that export.py made of them (.onnx, .pt2)")
    parser.add_argument("--csv", metavar="FILE", help="also write path, class, probability, ... of each image, row by "
                        "row")
    parser.add_argument("--json", metavar="FILE", help="also write all predictions, and unreadable images, at the end")
    parser.add_argument("--data-root", help="data set whose class names to use, for weights that hold none")
    parser.add_argument("--image-size", type=int, help="default: the training size of the checkpoint, or 224")
    parser.add_argument("--value-range", type=low_and_high, metavar="LOW,HIGH", help="of images of more than 8 bits, "
                        "the values that become black and white (default: as in training)")
    parser.add_argument("--top", type=int, default=3, help="number of classes for each image, most probable first "
                        "(default: 3)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    parser.add_argument("--precision", default="auto", help="fp32, bf16 or auto (default: auto)")
    args = parser.parse_args(argv)
    if args.top < 1 or not 32 <= (args.image_size or 32) <= 4096:
        raise UserError("--top must be at least 1 and --image-size 32 to 4096")
    for output in filter(None, (args.csv, args.json)):
        check_output_file(output)

    classifier = open_classifier(args.weights, args.data_root, args.image_size, args.device, args.precision)
    classes = classifier.classes
    files, top, rows = find_images(args.images, folder_of_list), min(args.top, len(classes)), []
    value_range = range_to_predict_with(files, args.value_range, classifier.value_range)
    with contextlib.ExitStack() as outputs:  # what was predicted before Ctrl-C or an error is kept
        if args.json:
            outputs.callback(write_json, args.json, rows)
        table = csv.writer(outputs.enter_context(open_csv(args.csv, top))) if args.csv else None
        for file, ranking, reason in predict(classifier._replace(value_range=value_range), files, top):
            if reason:
                print(f"{file}: {reason}", file=sys.stderr)
                rows.append({"path": str(file), "error": reason})
                continue
            rows.append({"path": str(file), "predictions": [
                {"id": class_id, "class": classes[class_id], "probability": value} for class_id, value in ranking]})
            print(f"{file}: " + ", ".join(f"{classes[class_id]} {value:.3f}" for class_id, value in ranking))
            if table:
                cells = [(classes[class_id], f"{value:.6f}") for class_id, value in ranking]
                table.writerow([file, *itertools.chain.from_iterable(cells)])
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    run_script(main)
