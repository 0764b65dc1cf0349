"""The anchors that detectors make positive, side by side: what a teacher's assignment changes.

    python -m detection.show_assignment test.json --weights runs/mine/paa/final.pt runs/mine/teacher_paa/final.pt
    python -m detection.show_assignment test.json --weights A.pt B.pt --names 0003.png 0017.png --output assignment.png

A line of the picture is an image, a column a detector. Boxes are the annotated objects, each in a colour of its own; a
dot of its colour is the centre of an anchor that is positive for it, the larger the higher the anchor's level. A PAA
detector assigns by its own costs, in LAD those of the teacher; a GFL detector by ATSS, whatever its weights are."""

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from common.files import atomic_path
from common.runtime import UserError, autocast, resolve_device, run_script
from common.text import counted
from detection.assigners.targets import Targets, ground_truth
from detection.checkpoint import load_detector
from detection.data.annotations import for_training, read_annotations
from detection.data.batches import DetectionDataset, Draw, collate, read_image
from detection.data.records import Annotations, Record
from detection.data.transforms import normalise
from detection.inference import inference_network
from detection.methods.gfl import GFL
from detection.methods.method import Step
from detection.methods.paa import PAA, PAASettings
from detection.network.detector import Detector
from detection.pictures import CAPTION, GAP, TEXT, class_colour

ASSIGNS = {"gfl": GFL.assign, "paa": PAA.assign}  # by the head
WIDTH = 560  # pixels
RADII = (3, 5, 7, 9, 11)  # of the dots of each level, pixels
MOST = 4  # images, unless they are named


class Positives(NamedTuple):
    """The positive anchors of an image. centres: (P, 2) in pixels of its file. levels: (P,), 0 for P3. objects: (P,)
    number of the object of each."""

    centres: np.ndarray
    levels: np.ndarray
    objects: np.ndarray


@torch.inference_mode()
def positives(network: Detector, annotations: Annotations, index: int, preprocessing: dict[str, Any],
              device: torch.device) -> Positives:
    """The Positives of the image of the `index`-th record. network: in eval mode on the device. preprocessing: of the
    detector's description."""
    dataset = DetectionDataset(annotations, preprocessing.get("value_range"))
    batch = collate([dataset[Draw(index, preprocessing["short"], preprocessing["long"], False)]])
    (boxes,), (labels,) = batch.boxes, batch.labels
    truth = ground_truth(boxes.to(device), labels.to(device), [len(labels)], batch.sizes, network.num_classes)
    images = normalise(batch.images.to(device), batch.sizes).contiguous(memory_format=torch.channels_last)
    with autocast(device, "fp32"):
        outputs = network(images)
    anchors = network.anchors(outputs.sizes, device)
    targets: Targets = ASSIGNS[network.architecture.head](
        Step(images, truth, anchors, settings=PAASettings(), outputs=outputs))
    _, chosen = targets.positives
    centres = anchors.centres[chosen] / anchors.centres.new_tensor(batch.scales[0])
    return Positives(*(part.cpu().numpy() for part in (centres, anchors.levels[chosen], targets.matched[0, chosen])))


def draw(image: torch.Tensor, record: Record, found: Positives, title: str) -> Image.Image:
    """An image with its objects and positive anchors, WIDTH pixels wide, below its title."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    scale = WIDTH / picture.width
    picture = picture.resize((WIDTH, max(1, round(scale * picture.height))))
    tile = Image.new("RGB", (WIDTH, CAPTION + picture.height), "white")
    pen = ImageDraw.Draw(picture)
    for number, box in enumerate(record.boxes.tolist()):
        pen.rectangle([scale * side for side in box], outline=class_colour(number), width=2)
    for centre, level, number in sorted(zip(*(part.tolist() for part in found), strict=True), key=lambda row: -row[1]):
        pen.circle([scale * side for side in centre], RADII[level], fill=class_colour(number), outline="black")
    tile.paste(picture, (0, CAPTION))
    ImageDraw.Draw(tile).text((0, 3), f"{title}: {counted(len(found.levels), 'positive anchor')}", fill="black",
                              font=ImageFont.load_default(TEXT))
    return tile


def sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """The tiles of each line beside each other, line below line."""
    heights = [max(tile.height for tile in row) + GAP for row in rows]
    found = Image.new("RGB", (GAP + len(rows[0]) * (WIDTH + GAP), GAP + sum(heights)), "white")
    for line, row in enumerate(rows):
        for column, tile in enumerate(row):
            found.paste(tile, (GAP + column * (WIDTH + GAP), GAP + sum(heights[:line])))
    return found


def chosen_images(annotations: Annotations, names: Sequence[str]) -> list[int]:
    """The numbers of the records whose files have these names; without names the first MOST with objects."""
    numbers = {record.path.name: index for index, record in enumerate(annotations.records)}
    for name in names:
        if name not in numbers:
            raise UserError(f"--names {name}: {annotations.source} has no such image")
    with_objects = [index for index, record in enumerate(annotations.records) if len(record.labels)]
    return [numbers[name] for name in names] or with_objects[:MOST]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("annotations", help="a COCO .json or a Pascal VOC image set .txt")
    add("--images", default="", help="folder of the images (default: as in training)")
    add("--weights", nargs="+", required=True, metavar="FILE", help="checkpoints of detectors of the same classes")
    add("--names", nargs="+", default=[], metavar="NAME", help="file names of the images to show (default: the first "
        f"{MOST} with objects)")
    add("--output", default="assignment.png", metavar="PNG", help="where to write (default: assignment.png)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    device = resolve_device(args.device)
    detectors = [load_detector(path) for path in args.weights]
    classes = detectors[0][1]["classes"]
    for path, (network, description) in zip(args.weights, detectors, strict=True):
        if network.architecture.head not in ASSIGNS:
            raise UserError(f"{path}: a {network.architecture.head} detector; expected {' or '.join(ASSIGNS)}, whose "
                            "boxes are horizontal")
        if description["classes"] != classes:
            raise UserError(f"{path}: has other classes than {args.weights[0]}")
    annotations = for_training(read_annotations(args.annotations, args.images or None, classes))
    indices = chosen_images(annotations, args.names)
    if not indices:
        raise UserError(f"{args.annotations}: no image with an object")
    rows: list[list[Image.Image]] = [[] for _ in indices]
    for path, (network, description) in zip(args.weights, detectors, strict=True):
        network, preprocessing = inference_network(network, device), description["preprocessing"]
        for row, index in zip(rows, indices, strict=True):
            record = annotations.records[index]
            found = positives(network, annotations, index, preprocessing, device)
            image = read_image(record, preprocessing.get("value_range"))
            row.append(draw(image, record, found, f"{record.path.name}, {path}"))
    with atomic_path(args.output) as temporary:
        sheet(rows).save(temporary, format="PNG")
    print(f"{counted(len(indices), 'image')}: {args.output}")


if __name__ == "__main__":
    run_script(main)
