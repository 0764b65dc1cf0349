"""Draw the demo data set: small grey pictures of 22 kinds of ship, and of no ship, seen from above.

    python -m demo.draw_ships DESTINATION [--seed 0] [--scale 0.125] [--test-per-class 12] [--size 96]

The classes and the shape of the long tail are those of FGSC-23. No real image is used: each chip is drawn from the
design of its class (DESIGNS in demo/ships.py) with random pose, paint, deck layout, light, sea and sensor. The result
is DESTINATION/train and DESTINATION/test, one folder a class ("00_non-ship"), and a contact sheet,
DESTINATION/sheet.png.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from common.files import write_json
from common.runtime import UserError, run_script
from demo.folder import write_whole
from demo.pen import Pen, sample, smooth_noise
from demo.ships import DESIGNS, Design, draw_parts, hull_outline, quay
from demo.water import draw_wake, sea
from recognition.published import FGSC23

SPLITS = ("train", "test")
# Raise it when the drawing changes, so that a folder drawn by an older version is not taken for a new one.
DRAWING_VERSION = 1
SUPERSAMPLING = 3
SHEET_CHIPS = 12


def train_count(class_id: int, scale: float) -> int:
    """Training chips of a class (id 0 to 22) when the counts of FGSC-23 are multiplied by scale; never below 3."""
    return max(3, round(scale * FGSC23["train"][class_id]))


def class_folder(class_id: int) -> str:
    """Name of the folder of a class, "00_non-ship": the names sort by class id."""
    return f"{class_id:02d}_{DESIGNS[class_id].name}"


def draw_ship(pen: Pen, rng: np.random.Generator, design: Design) -> None:
    """Draw a ship of a design, at a quay or under way or at rest."""
    if rng.random() < design.quay_chance:
        quay(pen, rng, rng.uniform(1.05, 1.7))
    elif rng.random() < 0.6:
        draw_wake(pen, rng)
    around, outline = pen.image.copy(), hull_outline(rng, design.bow, design.stern)
    pen.polygon(outline, sample(rng, design.rim), rng.uniform(0.01, 0.035))
    pen.polygon(outline * (0.98, 0.86), 0)
    draw_parts(pen, rng, design.parts)
    # A hull that lies low shows through the water that washes over it.
    pen.image.paste(Image.blend(around, pen.image, sample(rng, design.opacity)))


def sense(rng: np.random.Generator, picture: Image.Image, size: int) -> np.ndarray:
    """Picture (size, size) uint8 of a supersampled grey image: blur, haze, gain and noise of a sensor."""
    picture = picture.filter(ImageFilter.GaussianBlur(SUPERSAMPLING * size / 72 * rng.uniform(0.2, 0.7)))
    light = np.asarray(picture.resize((size, size), Image.Resampling.BOX), dtype=float)
    haze = np.clip(rng.uniform(-0.2, 0.2) + 0.05 * smooth_noise(rng, size, 4), 0, 0.5)
    light = light * (1 - haze) + rng.uniform(150, 220) * haze
    light = 110 + (light - 110) * rng.uniform(0.9, 1.2) + rng.uniform(-10, 10)
    return np.clip(np.rint(light + rng.uniform(1, 4) * rng.normal(size=light.shape)), 0, 255).astype(np.uint8)


def object_box(pen: Pen, rng: np.random.Generator, size: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a ship's chip in a picture of `size` pixels: the horizontal box of its hull with
    random margins, clipped to the picture."""
    corners = pen.pixels([(x, y) for x in (-0.5, 0.5) for y in (-1.2, 1.2)]) * size / pen.image.width
    low, high = corners.min(0), corners.max(0)
    margin = rng.uniform(0.03, 0.12, (2, 2)) * (high - low)
    (left, top), (right, bottom) = np.clip(np.rint([low - margin[0], high + margin[1]]), 0, size).astype(int)
    return left, top, right, bottom


def draw_chip(split: str, class_id: int, index: int, seed: int = 0, size: int = 96) -> np.ndarray:
    """Draw one chip, a uint8 array (height, width), both at most `size`: the box of the ship, cut out of a picture of
    size x size pixels as chips are cut out of annotated images.

    split is "train" or "test", class_id 0 to 22, index counts from 0 within the class. These and seed determine all
    random choices, so that a chip does not depend on the chips drawn before it.
    """
    design = DESIGNS[class_id]
    rng = np.random.default_rng([seed, SPLITS.index(split), class_id, index])
    side = SUPERSAMPLING * size
    picture = Image.fromarray(sea(rng, size)).resize((side, side), Image.Resampling.BICUBIC)
    # Bow left or right, within 20 degrees: a network needs more than the minutes of a demo to learn all 360.
    light_from, heading = rng.uniform(0, 2 * np.pi), rng.integers(2) * np.pi + rng.uniform(-0.35, 0.35)
    sun = rng.uniform(0.2, 1.1) * np.array([math.cos(light_from), math.sin(light_from)])
    length, ratio, deck = (sample(rng, value) for value in (design.length, design.ratio, design.tone))
    pen = Pen(picture, side * rng.uniform(0.47, 0.53, 2), heading, side * length, ratio, deck, sun)
    if design.hull:
        draw_ship(pen, rng, design)
    else:
        draw_parts(pen, rng, design.parts)
    pen.shift = 0.0
    left, top, right, bottom = object_box(pen, rng, size)
    return sense(rng, picture, size)[top:bottom, left:right]


def contact_sheet(rows: Sequence[Sequence[np.ndarray]], scale: float, size: int) -> Image.Image:
    """Grey image with a line for each class: name, training count and the chips in rows[class_id]."""
    label_width, pitch, height = 270, size + 4, max(28, *(len(chip) for chips in rows for chip in chips)) + 4
    sheet = Image.new("L", (label_width + SHEET_CHIPS * pitch, len(rows) * height), 255)
    pencil = ImageDraw.Draw(sheet)
    for class_id, chips in enumerate(rows):
        label = f"{class_folder(class_id)}\n{train_count(class_id, scale)} training images"
        pencil.text((6, class_id * height + height // 2 - 14), label, fill=0)
        for column, chip in enumerate(chips):
            sheet.paste(Image.fromarray(chip), (label_width + column * pitch, class_id * height + 2))
    return sheet


def write_files(folder: Path, settings: dict[str, Any]) -> None:
    """Draw all chips, the contact sheet and, last, demo.json into an empty folder."""
    seed, scale, size = settings["seed"], settings["scale"], settings["size"]
    wanted = [(split, class_id, index) for split in SPLITS for class_id in range(len(DESIGNS))
              for index in range(train_count(class_id, scale) if split == "train" else settings["test_per_class"])]
    shown = [[] for _ in DESIGNS]
    for split, class_id, index in tqdm(wanted, desc="drawing", disable=None, unit="chip"):
        chip = draw_chip(split, class_id, index, seed, size)
        class_path = folder / split / class_folder(class_id)
        class_path.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chip).save(class_path / f"{index:03d}.png")
        if len(shown[class_id]) < SHEET_CHIPS:
            shown[class_id].append(chip)
    contact_sheet(shown, scale, size).save(folder / "sheet.png")
    write_json(folder / "demo.json", settings)


def write_demo(destination: str | Path, seed: int = 0, scale: float = 0.125, test_per_class: int = 12,
               size: int = 96) -> bool:
    """Write the demo set into the folder `destination`; returns False, drawing nothing, if it is there already."""
    if seed < 0 or test_per_class < 1 or not 0 < scale <= 10 or not 32 <= size <= 512:
        raise UserError("seed must be 0 or more, test-per-class 1 or more, scale above 0 to 10, size 32 to 512")
    settings = {"drawing_version": DRAWING_VERSION, "seed": seed, "scale": scale,
                "test_per_class": test_per_class, "size": size}
    return write_whole(destination, settings, write_files)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and write the demo set."""
    parser = argparse.ArgumentParser(description="Draw the demo data set of ships seen from above.")
    parser.add_argument("destination", help="folder to make; must be new or empty")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other images (default %(default)s)")
    parser.add_argument("--scale", type=float, default=0.125, help="share of the training counts of FGSC-23 to draw"
                        " (default %(default)s, never below 3 images a class)")
    parser.add_argument("--test-per-class", type=int, default=12, help="test images a class (default %(default)s)")
    parser.add_argument("--size", type=int, default=96, help="side in pixels of the pictures that chips are cut out of "
                        "(default %(default)s)")
    arguments = parser.parse_args(argv)
    fresh = write_demo(**vars(arguments))
    print(f"{'drawn in' if fresh else 'already there:'} {arguments.destination}")


if __name__ == "__main__":
    run_script(main)
