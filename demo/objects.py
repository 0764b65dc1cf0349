"""The objects of the scenes of the detection demo set: planes, ships and storage tanks, which are to be detected, and
buildings, containers, cars and trees as distractors. Each is drawn once, in its own patch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from demo.pen import Pen, sample
from demo.ships import DESIGNS, draw_parts, grid, hull_outline

PLANE_PAINTS = ((226, 230, 236), (206, 212, 220), (236, 234, 226), (176, 184, 192))
SHIP_PAINTS = ((128, 132, 138), (122, 66, 54), (96, 84, 74), (74, 104, 88), (88, 104, 128), (176, 164, 140))
TANK_PAINTS = ((226, 228, 226), (204, 206, 206), (216, 206, 184), (186, 198, 186))
ROOF_PAINTS = ((150, 150, 154), (142, 92, 76), (110, 116, 122), (196, 194, 188), (96, 108, 136))
CAR_PAINTS = ((220, 220, 222), (40, 42, 46), (150, 40, 40), (50, 70, 130), (140, 142, 146))
# Designs of the recognition demo that still look like a ship at 20 pixels.
SHIP_DESIGNS = [design for design in DESIGNS
                if design.name not in ("non-ship", "submarine", "combat-boat", "hovercraft", "barge")]
# Of a rectangle of length 1 and half width 1.
CORNERS = np.array([(-0.5, -1), (0.5, -1), (0.5, 1), (-0.5, 1)])


@dataclass
class Sprite:
    """An object drawn in its own square patch: its colours (RGB), its silhouette (mode L, 255 inside), the length of
    its shadow in pixels of the patch, and the corners (4, 2) of the rectangle around it along its heading, in the same
    pixels, clockwise from the left end of its back."""

    colours: Image.Image
    silhouette: Image.Image
    shadow: float
    corners: np.ndarray


def one_of(rng: np.random.Generator, paints: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """A random one of `paints`, slightly varied."""
    return tuple(int(value) for value in np.clip(paints[rng.integers(len(paints))] + rng.normal(0, 6, 3), 0, 255))


def make_sprite(rng: np.random.Generator, outlines: Sequence[np.ndarray],
                paint: Callable[[Pen, np.random.Generator], None], colour: tuple[int, ...], deck: float, length: float,
                ratio: float, heading: float, sun: np.ndarray, shadow: float) -> Sprite:
    """Sprite of an object `length` pixels long in the frame of `demo.pen.Pen`.

    outlines: list of (n, 2) points, the silhouette. paint(pen, rng) draws in grey, which is then coloured: the grey
    level `deck` becomes `colour`, darker ones tend to black, lighter ones to white. Outside the silhouette nothing is
    shown. ratio: length over beam. heading: radians from the x axis to the y axis, which points down. sun:
    direction (2,) of shadows."""
    patch = 2 * math.ceil(0.75 * length) + 2
    grey, silhouette = Image.new("L", (patch, patch)), Image.new("L", (patch, patch))
    pen = Pen(grey, np.full(2, patch / 2), heading, length, ratio, deck, sun)
    for outline in outlines:
        ImageDraw.Draw(silhouette).polygon(list(map(tuple, pen.pixels(outline))), fill=255)
    paint(pen, rng)
    colours = ImageOps.colorize(grey, (14, 16, 20), (250, 250, 246), colour, midpoint=int(deck))
    points = np.concatenate(outlines)
    middle, sides = (points.max(axis=0) + points.min(axis=0)) / 2, np.ptp(points, axis=0)
    return Sprite(colours, silhouette, shadow, pen.pixels(middle + CORNERS * sides * (1, 0.5)))


def circle(corners: int = 48) -> np.ndarray:
    """Points (corners, 2) around a circle of diameter 1."""
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) / 2


def wing(x: float, chord: float, tip: float, span: float, sweep: float) -> np.ndarray:
    """Points (8, 2) around a pair of wings: chord at the root and at the tip, half span, sweep, all in lengths."""
    half = np.array([(x + chord / 2, 0), (x - sweep + tip / 2, span), (x - sweep - tip / 2, span), (x - chord / 2, 0)])
    return np.concatenate([half, half[::-1] * (1, -1)])


def plane_sprite(rng: np.random.Generator, length: float, heading: float, sun: np.ndarray) -> Sprite:
    """A plane: a jet with swept wings, a propeller plane with straight ones, or a fighter."""
    kind, width = rng.choice(3, p=(0.65, 0.2, 0.15)), rng.uniform(0.05, 0.065)
    x, chord, tip, span, sweep = (
        (0.1, 0.2, 0.07, rng.uniform(0.44, 0.52), rng.uniform(0.18, 0.26)),
        (0.1, 0.17, 0.11, rng.uniform(0.48, 0.56), rng.uniform(0, 0.04)),
        (-0.06, 0.46, 0.08, rng.uniform(0.34, 0.42), rng.uniform(0.2, 0.28)))[kind]
    body = hull_outline(rng, (0.14, 2.0, 0.1), (0.34, 1.6, 0.15)) * (1, width)
    wings, tail, engines = wing(x, chord, tip, span, sweep), wing(-0.42, 0.12, 0.07, 0.2, 0.05 + sweep / 4), []
    for y in ((0.16, -0.16), (0.14, -0.14, 0.3, -0.3), ())[kind]:
        nose = x + chord / 2 - sweep * abs(y) / span + 0.02
        engines.append(CORNERS * (0.12, 0.024) + (nose - 0.06, y))
    stripe = rng.uniform(-100, 20)

    def paint(pen: Pen, rng: np.random.Generator) -> None:
        for outline, tone in ((wings, -8), (tail, -8), *((engine, -45) for engine in engines), (body, 30)):
            pen.polygon(outline, tone)
        pen.rectangle(-0.5, -0.34, -0.016, 0.016, stripe)
        pen.rectangle(0.41, 0.44, -0.6 * width, 0.6 * width, -130)

    return make_sprite(rng, [wings, tail, *engines, body], paint, one_of(rng, PLANE_PAINTS), 190, length, 0.5, heading,
                       sun, 0.1 * length)


def ship_sprite(rng: np.random.Generator, length: float, heading: float, sun: np.ndarray) -> Sprite:
    """A ship of a random design of the recognition demo, in colour and somewhat broader."""
    design = SHIP_DESIGNS[rng.integers(len(SHIP_DESIGNS))]
    outline, ratio = hull_outline(rng, design.bow, design.stern), rng.uniform(0.65, 0.85) * sample(rng, design.ratio)

    def paint(pen: Pen, rng: np.random.Generator) -> None:
        pen.polygon(outline, sample(rng, design.rim))
        pen.polygon(outline * (0.98, 0.86), 0)
        draw_parts(pen, rng, design.parts)

    colour, deck = one_of(rng, SHIP_PAINTS), sample(rng, design.tone)
    return make_sprite(rng, [outline], paint, colour, deck, length, ratio, heading, sun, 0.035 * length)


def tank_sprite(rng: np.random.Generator, diameter: float, floating: bool, colour: tuple[int, ...],
                sun: np.ndarray) -> Sprite:
    """A storage tank with a cone for a roof, or with a floating roof, on which the wall throws its shadow."""
    away = sun / np.hypot(*sun)

    def paint(pen: Pen, rng: np.random.Generator) -> None:
        rim = circle()
        pen.polygon(rim, -60)
        if floating:
            pen.polygon(rim * 0.92, -150)
            pen.polygon(rim * 0.86 + 0.03 * away, -35)
            pen.polygon(rim * 0.25 + 0.03 * away, -50)
        else:
            for first, second in zip(rim, np.roll(rim, -1, axis=0), strict=True):
                pen.polygon(np.array([(0, 0), first, second]) * 0.93, -70 * float(first @ away))
            pen.polygon(rim * 0.1, -40)
        stair = rng.uniform(0, 2 * np.pi) + np.linspace(0, 1.2, 8)
        pen.stroke(0.46 * np.stack([np.cos(stair), np.sin(stair)], axis=1), 0.04, -110)

    return make_sprite(rng, [circle()], paint, colour, 190, diameter, 0.5, 0.0, sun, rng.uniform(0.2, 0.4) * diameter)


def building_sprite(rng: np.random.Generator, length: float, ratio: float, heading: float, sun: np.ndarray) -> Sprite:
    """A building with a gabled or a flat roof, or a stack of containers."""
    roof, shade = rng.integers(3), rng.uniform(10, 40) * rng.choice([-1, 1])

    def paint(pen: Pen, rng: np.random.Generator) -> None:
        pen.polygon(CORNERS, 0)
        if roof == 0:
            pen.rectangle(-0.5, 0.5, -1, 0, shade)
        elif roof == 1:
            pen.rectangle(-0.46, 0.46, -0.88, 0.88, shade / 2)
            for x, y in rng.uniform((-0.4, -0.7), (0.3, 0.4), (3, 2)):
                pen.rectangle(x, x + 0.08, y, y + 0.25, -shade, 0.02)
        else:
            grid(pen, rng, -0.5, 0.5, max(3, round(ratio * 3)), 4, 1.0, spread=50, height=0)

    return make_sprite(rng, [CORNERS], paint, one_of(rng, ROOF_PAINTS), 128, length, ratio, heading, sun,
                       rng.uniform(0.1, 0.4) * length / ratio)


def car_sprite(rng: np.random.Generator, length: float, heading: float, sun: np.ndarray) -> Sprite:
    """A car: a block with a windscreen."""
    def paint(pen: Pen, rng: np.random.Generator) -> None:
        pen.polygon(CORNERS, 0)
        pen.rectangle(0.1, 0.28, -0.8, 0.8, -70)

    return make_sprite(rng, [CORNERS], paint, one_of(rng, CAR_PAINTS), 128, length, 2.1, heading, sun, 0.2 * length)


def tree_sprite(rng: np.random.Generator, width: float, sun: np.ndarray) -> Sprite:
    """A dark, ragged crown."""
    crown, colour = circle(14) * rng.uniform(0.7, 1.0, (14, 1)), one_of(rng, ((38, 60, 34), (52, 70, 40)))

    def paint(pen: Pen, rng: np.random.Generator) -> None:
        pen.polygon(crown, 0)
        pen.polygon(crown * 0.55 - sun * 0.08, 25)

    return make_sprite(rng, [crown], paint, colour, 110, width, 0.5, 0.0, sun, 0.25 * width)
