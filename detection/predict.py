"""Find objects in images of your own: a line an image, pictures with the boxes drawn, and JSON.

    python -m detection.predict --weights runs/mine/ld/final.pt photo.png folder_of_images/
    python -m detection.predict --weights FILE list.txt --output found/ --json found.json --least-score 0.5
    python -m detection.predict --weights FILE large_images/ --tile 1024 --overlap 200
    python -m detection.predict --weights runs/mine/ld/final.onnx my_images/

Images may have any size; they are resized as in the detector's tests. In large ones objects would vanish: with --tile
they are cut into tiles, each resized so, and what several tiles have found is thinned out as in one. A file that
detection.export has made runs on the CPU in fp32. A list is a text file (.txt) with one path a line, seen from its own
folder. Boxes are in pixels of the image as its file stores it: an EXIF orientation is not applied.

Lines and pictures show the objects with a score of at least --least-score, the JSON all that the detector finds. A
picture keeps the name of its image; images of several folders keep their folders below the one that holds them all.
What is neither JPEG nor PNG becomes NAME.png. An image that cannot be read is reported and left out, and makes the exit
status 1."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tvF

from common.files import atomic_path, check_output_file, file_identity, write_json
from common.images import decode, find_images, low_and_high, range_to_predict_with, unreadable
from common.precision import resolve_precision
from common.runtime import UserError, resolve_device, run_script
from common.text import counted
from detection.checkpoint import architecture_of, load_detector
from detection.data.tiles import is_left_to_others, windows
from detection.data.transforms import pad_to_batch, resize_for_test
from detection.exported import ExportedDetector
from detection.geometry.oriented import circumscribed, corners
from detection.geometry.suppression import SUPPRESSIONS, Selection
from detection.inference import detect, detections, inference_network
from detection.pictures import draw_boxes

Finder = Callable[[torch.Tensor, tuple[float, float]], dict[str, torch.Tensor]]
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}  # of pictures, by suffix


def open_detector(weights: str | Path, device: str, precision: str, suppression: str) -> tuple[Finder, dict[str, Any]]:
    """(a function from an image as the detector sees it, (3, h, w) uint8, and its scale (x, y) to the original, to its
    detections as `detect` gives them; the description) of a checkpoint, or of a file that detection.export wrote.

    One image at a time: the padding of a batch would be part of its group norms."""
    if Path(weights).suffix.lower() == ".onnx":
        if device not in ("auto", "cpu") or precision not in ("auto", "fp32"):
            raise UserError(f"{weights}: an exported file runs on the CPU in fp32 here; for --device {device} "
                            f"--precision {precision} give the checkpoint")
        exported = ExportedDetector(weights)

        def find_exported(image: torch.Tensor, scale: tuple[float, float]) -> dict[str, torch.Tensor]:
            outputs, anchors = exported(image[None])
            return detections(outputs, anchors, [image.shape[1:]], [scale], selection_of(exported.description),
                              suppression)[0]

        return find_exported, exported.description
    on = resolve_device(device)
    computed_in = resolve_precision(precision, on)
    network, description = load_detector(weights)
    network = inference_network(network, on)

    def find(image: torch.Tensor, scale: tuple[float, float]) -> dict[str, torch.Tensor]:
        images, sizes = pad_to_batch([image])
        return detect(network, images, sizes, [scale], on, computed_in, suppression)[0]

    return find, description


def selection_of(description: dict[str, Any]) -> Selection:
    """The Selection of the detector of a description."""
    return architecture_of(description["model"]).kind.selection


def predict(find: Finder, files: Iterable[Path], preprocessing: dict[str, Any], selection: Selection, suppression: str,
            tile: int, overlap: int) -> Iterator[tuple[Path, Any, Any, str | None]]:
    """Yield (file, image, detections, None) for each file in order, or (file, None, None, the reason) for one that
    cannot be read.

    find: of `open_detector`. image: PIL image, RGB. tile, overlap: in pixels; a tile of 0 is the whole image."""
    for file in files:
        try:
            image = decode(file, preprocessing.get("value_range"))
        except Exception as error:  # a damaged file can make a decoder raise anything
            yield file, None, None, unreadable(error) if os.path.isfile(file) else "no such image"
            continue
        if image.mode != "RGB":
            image = image.convert("RGB")
        tiles = windows(image.height, image.width, tile, overlap) if tile else [(0, 0, *image.size)]
        yield file, image, find_in_tiles(find, image, preprocessing, selection, suppression, tiles), None
        del image  # before the next is decoded


def find_in_tiles(find: Finder, image: Image.Image, preprocessing: dict[str, Any], selection: Selection,
                  suppression: str, tiles: Sequence[tuple[int, int, int, int]]) -> dict[str, torch.Tensor]:
    """The detections of an image by its `tiles`, at most `selection.most` for each of them, as `detect` gives them."""
    parts = []
    for number, window in enumerate(tiles):
        found = find(*resize_for_test(tvF.to_image(image.crop(window)), preprocessing))
        oriented = found["boxes"].shape[1] == 5
        found["boxes"] = found["boxes"] + torch.tensor((*window[:2], 0, 0, 0) if oriented else window[:2] * 2)
        around = circumscribed(found["boxes"]) if oriented else found["boxes"]
        others = is_left_to_others(around, number, tiles)
        parts.append({name: values[~others] for name, values in found.items()})
    if len(parts) == 1:
        return parts[0]
    found = {name: torch.cat([part[name] for part in parts]) for name in ("boxes", "scores", "labels")}
    suppress = selection.suppressions[selection.named(suppression)]
    thinned = suppress(**found, threshold=selection.overlap, limit=selection.most * len(tiles))
    return dict(zip(found, thinned, strict=True))


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
    columns = [detections[name].tolist() for name in ("labels", "scores", "boxes")]
    rows = [{"id": label, "class": classes[label], "score": round(score, 6), "box": [round(side, 3) for side in box]}
            for label, score, box in zip(*columns, strict=True)]
    if detections["boxes"].shape[1] == 5:
        for row, points in zip(rows, corners(detections["boxes"]).tolist(), strict=True):
            row["corners"] = [[round(place, 3) for place in point] for point in points]
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", nargs="+", help="image files, folders that are searched for them, or lists (.txt)")
    add("--weights", required=True, help="checkpoint of a detector, or an .onnx file that detection.export made of it")
    add("--output", metavar="FOLDER", default="runs/detections", help="where to write the pictures (default: "
        "runs/detections)")
    add("--json", metavar="FILE", help="also write every detection as in the detector's tests (score above 0.05): "
        "class, score and box, x1, y1, x2, y2 in pixels; oriented ones cx, cy, w, h in pixels, the angle in radians, "
        "and the corners")
    add("--least-score", type=float, default=0.3, help="of what is counted and drawn, 0 to 1 (default: 0.3)")
    add("--tile", type=int, default=0, metavar="PIXELS", help="cut images into tiles of this side")
    add("--overlap", type=int, default=200, metavar="PIXELS", help="that neighbouring tiles share, more than most "
        "objects measure (default: 200)")
    add("--suppression", default="auto", choices=("auto", *SUPPRESSIONS), help="how overlapping boxes are thinned out "
        "(default: as in the detector's tests)")
    add("--value-range", type=low_and_high, metavar="LOW,HIGH", help="of images of more than 8 bits, the values that "
        "become black and white (default: as in training)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--precision", default="auto", help="fp32, bf16 or auto")
    args = parser.parse_args(argv)
    if not 0 <= args.least_score <= 1:
        raise UserError(f"--least-score {args.least_score:g}: expected 0 to 1")
    if args.tile and not 32 <= args.tile <= 1e5:
        raise UserError(f"--tile {args.tile}: expected 32 to 100000 pixels")
    if args.tile and not 0 <= args.overlap < args.tile:
        raise UserError(f"--overlap {args.overlap}: expected 0 to {args.tile - 1}, less than --tile")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if an image could not be read, else 0."""
    args = parse(argv)
    if args.json:
        check_output_file(args.json)
    find, description = open_detector(args.weights, args.device, args.precision, args.suppression)
    classes = description["classes"]
    files, rows = find_images(args.images), []
    pictures, preprocessing = picture_paths(files, args.output), dict(description["preprocessing"])
    preprocessing["value_range"] = range_to_predict_with(files, args.value_range, preprocessing.get("value_range"))
    for file, image, found, reason in predict(find, files, preprocessing, selection_of(description), args.suppression,
                                              args.tile, args.overlap):
        if reason:
            print(f"{file}: {reason}", file=sys.stderr)
            rows.append({"path": str(file), "error": reason})
            continue
        confident = {name: values[found["scores"] >= args.least_score] for name, values in found.items()}
        print(f"{file}: {summary(confident['labels'].tolist(), classes)}", flush=True)
        save_picture(draw_boxes(image, **confident, classes=classes), pictures[file])
        rows.append({"path": str(file), "width": image.width, "height": image.height,
                     "detections": as_rows(found, classes)})
        del image  # two large ones may not fit into memory
    if args.json:
        write_json(args.json, rows)
    failed = sum("error" in row for row in rows)
    if failed < len(rows):
        print(f"pictures: {args.output}")
    return int(failed > 0)


if __name__ == "__main__":
    run_script(main)
