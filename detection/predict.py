"""Find objects in images of your own: a line an image, pictures with the boxes drawn, and JSON.

    python -m detection.predict --weights runs/mine/ld/final.pt photo.png folder_of_images/
    python -m detection.predict --weights FILE list.txt --output found/ --json found.json --least-score 0.5

Images may have any size; they are resized as in the detector's tests. A list is a text file (.txt) with one path a
line, seen from its own folder. Boxes are in pixels of the image as its file stores it: an EXIF orientation is not
applied.

Lines and pictures show the objects with a score of at least --least-score, the JSON all that the detector finds. A
picture keeps the name of its image; images of several folders keep their folders below the one that holds them all.
What is neither JPEG nor PNG becomes NAME.png. An image that cannot be read is reported and left out, and makes the exit
status 1."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from common.files import atomic_path, check_output_file, file_identity, write_json
from common.images import find_images, low_and_high, range_to_predict_with, unreadable
from common.precision import resolve_precision
from common.runtime import UserError, resolve_device, run_script
from common.text import counted
from detection.checkpoint import load_detector
from detection.data.transforms import decode_rgb, pad_to_batch, resize_for_test
from detection.geometry.suppression import SUPPRESSIONS
from detection.inference import LEAST_SCORE, MOST, detect, inference_network
from detection.network.detector import Detector
from detection.pictures import draw_boxes

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}  # of pictures, by suffix


def predict(network: Detector, files: Iterable[Path], preprocessing: dict[str, Any], device: torch.device,
            precision: str, suppression: str) -> Iterator[tuple[Path, Any, Any, str | None]]:
    """Yield (file, image, detections, None) for each file in order, or (file, None, None, the reason) for one that
    cannot be read.

    network: as `inference.inference_network` gives it. image: (3, height, width) uint8. detections: as `detect` gives
    them, of one image at a time, for the padding of a batch would be part of its group norms."""
    for file in files:
        try:
            image = decode_rgb(file, preprocessing.get("value_range"))
        except Exception as error:  # a damaged file can make a decoder raise anything
            yield file, None, None, unreadable(error) if os.path.isfile(file) else "no such image"
            continue
        small, scale = resize_for_test(image, preprocessing)
        images, sizes = pad_to_batch([small])
        yield file, image, detect(network, images, sizes, [scale], device, precision, suppression)[0], None


def picture_paths(files: Sequence[Path], folder: str | Path) -> dict[Path, Path]:
    """{file: path of its picture}, a path of its own for each file, and none of them that of an image.

    Raises UserError where a picture would take the place of an image."""
    places = {file: Path(os.path.abspath(file)) for file in files}
    root = os.path.commonpath([place.parent for place in places.values()])
    images = {file_identity(file) for file in files if os.path.isfile(file)}
    pictures, taken = {}, {}
    for file, place in places.items():
        picture = Path(folder) / place.relative_to(root)
        if picture.suffix.lower() not in FORMATS:
            picture = picture.with_name(f"{picture.name}.png")
        while taken.setdefault(picture, place) != place:  # ship.tif beside ship.tif.png
            picture = picture.with_name(f"{picture.stem}_{picture.suffix}")
        if os.path.isfile(picture) and file_identity(picture) in images:
            raise UserError(f"--output {folder}: {picture} is one of the images; give a folder of its own")
        pictures[file] = picture
    return pictures


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PIL image as the suffix of `path` says."""
    with atomic_path(path) as temporary:
        picture.save(temporary, format=FORMATS[path.suffix.lower()], quality=95)


def summary(labels: Sequence[int], classes: Sequence[str]) -> str:
    """`3 objects: 2 plane, 1 ship`. labels: ids of classes."""
    counts = Counter(labels).most_common()
    parts = ", ".join(f"{count} {classes[label]}" for label, count in counts)
    return counted(len(labels), "object") + (f": {parts}" if parts else "")


def as_rows(detections: dict[str, torch.Tensor], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Detections of an image as plain values, the highest-scoring first."""
    columns = (detections[name].tolist() for name in ("labels", "scores", "boxes"))
    return [{"id": label, "class": classes[label], "score": round(score, 6), "box": [round(side, 3) for side in box]}
            for label, score, box in zip(*columns, strict=True)]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", nargs="+", help="image files, folders that are searched for them, or lists (.txt)")
    add("--weights", required=True, help="checkpoint of a detector")
    add("--output", metavar="FOLDER", default="runs/detections", help="where to write the pictures (default: "
        "runs/detections)")
    add("--json", metavar="FILE", help=f"also write every detection with a score above {LEAST_SCORE}, at most {MOST} "
        "an image: class, score and box (x1, y1, x2, y2, in pixels)")
    add("--least-score", type=float, default=0.3, help="of what is counted and drawn, 0 to 1 (default: 0.3)")
    add("--suppression", default="nms", choices=tuple(SUPPRESSIONS), help="how overlapping boxes are thinned out")
    add("--value-range", type=low_and_high, metavar="LOW,HIGH", help="of images of more than 8 bits, the values that "
        "become black and white (default: as in training)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--precision", default="auto", help="fp32, bf16 or auto")
    args = parser.parse_args(argv)
    if not 0 <= args.least_score <= 1:
        raise UserError(f"--least-score {args.least_score:g}: expected 0 to 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if an image could not be read, else 0."""
    args = parse(argv)
    if args.json:
        check_output_file(args.json)
    device = resolve_device(args.device)
    precision = resolve_precision(args.precision, device)
    network, description = load_detector(args.weights)
    network, classes = inference_network(network, device), description["classes"]
    files, rows = find_images(args.images), []
    pictures, preprocessing = picture_paths(files, args.output), dict(description["preprocessing"])
    preprocessing["value_range"] = range_to_predict_with(files, args.value_range, preprocessing.get("value_range"))
    for file, image, detections, reason in predict(network, files, preprocessing, device, precision, args.suppression):
        if reason:
            print(f"{file}: {reason}", file=sys.stderr)
            rows.append({"path": str(file), "error": reason})
            continue
        confident = {name: values[detections["scores"] >= args.least_score] for name, values in detections.items()}
        print(f"{file}: {summary(confident['labels'].tolist(), classes)}", flush=True)
        save_picture(draw_boxes(image, **confident, classes=classes), pictures[file])
        rows.append({"path": str(file), "width": image.shape[2], "height": image.shape[1],
                     "detections": as_rows(detections, classes)})
    if args.json:
        write_json(args.json, rows)
    failed = sum("error" in row for row in rows)
    if failed < len(rows):
        print(f"pictures: {args.output}")
    return int(failed > 0)


if __name__ == "__main__":
    run_script(main)
