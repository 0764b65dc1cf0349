"""Draw the demo data set of detection: small aerial scenes with planes, ships and storage tanks, as a COCO data set, or
with oriented boxes in DOTA's layout.

    python -m demo.draw_scenes DESTINATION [--seed 0] [--train 120] [--test 40] [--size 256]
    python -m demo.draw_scenes DESTINATION --oriented

No real image is used. A scene is a harbour, a coast, open sea, an airfield or a tank farm, at its own ground
resolution, so that the sizes of its objects fit each other; buildings, containers, cars, trees, islands and fields are
distractors. The result is DESTINATION/train.json, DESTINATION/test.json, DESTINATION/images, and a contact sheet,
DESTINATION/sheet.png; with --oriented images/ and labelTxt/ in DESTINATION/train and DESTINATION/test, and the sheet.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from common.files import write_json
from common.runtime import UserError, run_script
from demo.folder import write_whole
from demo.scenes import CLASSES, SPLITS, draw_scene

# Raise it when the drawing changes, so that a folder drawn by an older version is not taken for a new one.
DRAWING_VERSION = 1
ORIENTED = "detection of oriented boxes"
SHEET_COLUMNS, SHEET_ROWS = 6, 6
BOX_COLOURS = ((255, 70, 70), (255, 235, 0), (0, 255, 255))


def contact_sheet(scenes: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], size: int) -> Image.Image:
    """RGB image of scenes (picture, boxes, labels) in rows, the boxes in the colours of their classes: (G, 4) xyxy, or
    their corners (G, 4, 2)."""
    rows, pitch = -(-len(scenes) // SHEET_COLUMNS), size + 4
    sheet = Image.new("RGB", (SHEET_COLUMNS * pitch, rows * pitch + 20), (255, 255, 255))
    pencil = ImageDraw.Draw(sheet)
    for label, name in enumerate(CLASSES):
        pencil.rectangle((4 + 120 * label, 4, 14 + 120 * label, 14), BOX_COLOURS[label], (0, 0, 0))
        pencil.text((20 + 120 * label, 4), name, fill=(0, 0, 0))
    for number, (picture, boxes, labels) in enumerate(scenes):
        left, top = pitch * (number % SHEET_COLUMNS), 20 + pitch * (number // SHEET_COLUMNS)
        sheet.paste(Image.fromarray(picture), (left, top))
        for box, label in zip(boxes, labels, strict=True):
            if box.shape == (4,):
                pencil.rectangle(tuple(np.rint(box + [left, top, left - 1, top - 1])), outline=BOX_COLOURS[label])
            else:
                pencil.polygon(list(map(tuple, box + [left, top])), outline=BOX_COLOURS[label])
    return sheet


def coco_annotations(names: Sequence[str], scenes: Sequence[tuple[Any, np.ndarray, np.ndarray]],
                     size: int) -> dict[str, Any]:
    """The COCO dict of images called `names` (in the folder "images") of `scenes`."""
    annotations = []
    for image_id, (_, boxes, labels) in enumerate(scenes, 1):
        for (left, top, right, bottom), label in zip(boxes.round(2).tolist(), labels.tolist(), strict=True):
            width, height = round(right - left, 2), round(bottom - top, 2)
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": label + 1,
                                "bbox": [left, top, width, height], "area": round(width * height, 2), "iscrowd": 0})
    return {"images": [{"id": image_id, "file_name": name, "width": size, "height": size}
                       for image_id, name in enumerate(names, 1)],
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)]}


def dota_labels(corners: np.ndarray, labels: np.ndarray) -> str:
    """The label file of a scene's objects. corners: (G, 4, 2). labels: (G,)."""
    lines = [" ".join(f"{value:.2f}" for value in box.flatten()) + f" {CLASSES[label]} 0\n"
             for box, label in zip(corners, labels, strict=True)]
    return "imagesource:drawn\ngsd:null\n" + "".join(lines)


def write_files(folder: Path, settings: dict[str, Any]) -> None:
    """Draw all scenes, the contact sheet and, last, demo.json into an empty folder."""
    shown, size, oriented = [], settings["size"], settings["demo"] == ORIENTED
    for split in SPLITS:
        root = folder / split if oriented else folder
        for kind in ("images", "labelTxt") if oriented else ("images",):
            (root / kind).mkdir(parents=True, exist_ok=True)
        names, scenes = [f"{split}_{index:04d}.jpg" for index in range(settings[split])], []
        for index, name in enumerate(tqdm(names, desc=f"drawing {split}", disable=None, unit="scene")):
            picture, boxes, labels, corners = draw_scene(split, index, settings["seed"], size)
            Image.fromarray(picture).save(root / "images" / name, quality=92)
            if oriented:
                label_file = root / "labelTxt" / name.replace(".jpg", ".txt")
                label_file.write_text(dota_labels(corners, labels), encoding="utf-8")
            scenes.append((None, boxes, labels))
            if len(shown) < SHEET_COLUMNS * SHEET_ROWS:
                shown.append((picture, corners if oriented else boxes, labels))
        if not oriented:
            write_json(folder / f"{split}.json", coco_annotations(names, scenes, size))
    contact_sheet(shown, size).save(folder / "sheet.png")
    write_json(folder / "demo.json", settings)


def write_demo(destination: str | Path, seed: int = 0, train: int = 120, test: int = 40, size: int = 256,
               oriented: bool = False) -> bool:
    """Write the demo set into the folder `destination`; returns False, drawing nothing, if it is there already.

    train, test: numbers of scenes; size: their side in pixels, 32 to 1024; oriented: in DOTA's layout. Raises UserError
    for a value out of range, a destination that holds anything else, and a disk that cannot be written."""
    if seed < 0 or train < 1 or test < 1 or not 32 <= size <= 1024:
        raise UserError("seed must be 0 or more, train and test 1 or more, size 32 to 1024")
    settings = {"demo": ORIENTED if oriented else "detection", "drawing_version": DRAWING_VERSION, "seed": seed,
                "train": train, "test": test, "size": size}
    return write_whole(destination, settings, write_files)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and write the demo set."""
    parser = argparse.ArgumentParser(prog="python -m demo.draw_scenes",
                                     description="Draw the demo data set of planes, ships and storage tanks.")
    parser.add_argument("destination", help="folder to make; must be new or empty")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other scenes (default %(default)s)")
    parser.add_argument("--train", type=int, default=120, help="scenes to train on (default %(default)s)")
    parser.add_argument("--test", type=int, default=40, help="scenes to test on (default %(default)s)")
    parser.add_argument("--size", type=int, default=256, help="side of a scene in pixels (default %(default)s)")
    parser.add_argument("--oriented", action="store_true", help="write oriented boxes, in DOTA's layout")
    arguments = parser.parse_args(argv)
    fresh = write_demo(**vars(arguments))
    print(f"{'drawn in' if fresh else 'already there:'} {arguments.destination}")


if __name__ == "__main__":
    run_script(main)
