"""The ships of the demo data set: the parts of ships, and a table of the parts of each of FGSC-23's 23 classes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from demo.pen import Pen, sample, smooth_noise


def box(pen: Pen, rng: np.random.Generator, x: float, length: float, width: float, y: float = 0.0, tone: float = 40.0,
        height: float = 0.03, tiers: int = 1) -> None:
    """A house centred at (x, y), built of tiers that get smaller and brighter; width in beams; flat if height is 0."""
    for tier in range(tiers):
        along, across = (1 - 0.28 * tier) * length / 2, (1 - 0.28 * tier) * width
        pen.rectangle(x - along, x + along, y - across, y + across, tone + 14 * tier, height)


def grid(pen: Pen, rng: np.random.Generator, start: float, end: float, columns: int, rows: int, width: float = 0.85,
         y: float = 0.0, tone: float = 0.0, spread: float = 5.0, gap: float = 0.15, fill: float = 1.0,
         height: float = 0.01) -> None:
    """Rows of boxes (containers, hatches, missile cells); gap is the bare share, fill the share of boxes drawn."""
    step, row_step = (end - start) / columns, 2 * width / rows
    for x in start + step * np.arange(columns):
        for low in y - width + row_step * np.arange(rows):
            shade, is_drawn = tone + spread * rng.normal(), rng.random() < fill
            if is_drawn:
                pen.rectangle(x, x + step * (1 - gap), low, low + row_step * (1 - min(gap, 0.2)), shade, height)


def discs(pen: Pen, rng: np.random.Generator, start: float, end: float, count: int, radius: float, y: float = 0.0,
          tone: float = 30.0, height: float = 0.0, core: float | None = None) -> None:
    """Discs in a line (tanks, fans, pools, radomes), each with an inner disc of another tone if core is given."""
    for x in np.linspace(start, end, count):
        pen.disc(x, y, radius, tone, height)
        if core is not None:
            pen.disc(x, y, 0.6 * radius, tone + core)


def line(pen: Pen, rng: np.random.Generator, points: ArrayLike, width: float = 0.08, tone: float = 60.0) -> None:
    """A mark or a pipe on the deck."""
    pen.stroke(points, width, tone)


def plate(pen: Pen, rng: np.random.Generator, points: ArrayLike, tone: float = 0.0) -> None:
    """A flat polygon, such as the angled part of a flight deck."""
    pen.polygon(points, tone)


def gun(pen: Pen, rng: np.random.Generator, x: float, size: float = 0.35, ahead: int = 1, tone: float = 35.0) -> None:
    """A turret with its barrel trained roughly ahead (1) or astern (-1)."""
    pen.disc(x, 0, size, tone, 0.02)
    pen.stroke([(x, 0), (x + ahead * 0.05, rng.uniform(-0.25, 0.25))], 0.12, tone + 20)


def helipad(pen: Pen, rng: np.random.Generator, x: float, radius: float = 0.65, tone: float = -15.0,
            mark: float = 75.0) -> None:
    """A landing circle with a cross stroke, sometimes with a helicopter on it."""
    pen.disc(x, 0, radius, tone + mark)
    pen.disc(x, 0, radius * 0.78, tone)
    pen.stroke([(x, -radius / 2), (x, radius / 2)], 0.12, tone + mark)
    if rng.random() < 0.3:
        aircraft(pen, rng, x, x, 0.0, 0.0, 1, 0.05, -35)


def aircraft(pen: Pen, rng: np.random.Generator, start: float, end: float, low: float, high: float, count: int,
             size: float = 0.055, tone: float = 60.0) -> None:
    """Parked aircraft scattered over the area, as darts about size hull lengths long."""
    dart = np.array([(0.6, 0), (0.1, 0.12), (-0.3, 0.55), (-0.3, 0.12), (-0.6, 0.25)])
    dart = np.concatenate([dart, dart[::-1] * (1, -1)]) * size
    for angle, x, y in rng.uniform((0, start, low), (2 * np.pi, end, high), (count, 3)):
        turned = dart @ [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
        pen.polygon(turned * (1, pen.slenderness) + (x, y), tone + 10 * rng.normal(), 0.008)


def cross(pen: Pen, rng: np.random.Generator, x: float, size: float = 0.55, tone: float = -120.0) -> None:
    """An upright cross; size is the length of an arm in half beams."""
    along = size / pen.slenderness
    pen.rectangle(x - along, x + along, -0.3 * size, 0.3 * size, tone)
    pen.rectangle(x - 0.3 * along, x + 0.3 * along, -size, size, tone)


def boats(pen: Pen, rng: np.random.Generator, start: float, end: float, count: int, tone: float = 45.0) -> None:
    """Lifeboats along both sides."""
    for side in (-0.86, 0.86):
        grid(pen, rng, start, end, count, 1, 0.12, side, tone, gap=0.4)


def cranes(pen: Pen, rng: np.random.Generator, start: float, end: float, count: int, reach: float = 0.08,
           tone: float = 50.0) -> None:
    """Deck cranes or derricks on the centre line: a post and a jib in a random direction."""
    for x in np.linspace(start, end, count):
        angle = rng.uniform(0, 2 * np.pi)
        pen.disc(x, 0, 0.16, tone, 0.03)
        pen.stroke([(x, 0), (x + reach * math.cos(angle), reach * pen.slenderness * math.sin(angle))], 0.14, tone)


def heap(pen: Pen, rng: np.random.Generator, x: float, y: float, length: float, width: float, tone: float,
         spread: float = 14.0) -> None:
    """An irregular blot (bulk cargo, nets, an island) with rings of other tones; width in beams."""
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    circle = np.stack([length / 2 * np.cos(angle), width * np.sin(angle)], axis=1)
    for shrink in (1.0, 0.75, 0.45):
        wobble = 1 + 0.22 * np.sin(angle * 2 + rng.uniform(0, 6)) + 0.14 * np.sin(angle * 3 + rng.uniform(0, 6))
        pen.polygon(circle * (shrink * wobble)[:, None] + (x, y), tone + spread * rng.normal())


def quay(pen: Pen, rng: np.random.Generator, gap: float) -> None:
    """A pier along one side, gap half beams from the centre line, with sheds, containers and cranes on it."""
    side, concrete = rng.choice([-1, 1]), rng.uniform(95, 190) - pen.deck
    edge = side * gap
    pen.rectangle(-4, 4, edge, side * 60, concrete, 0.012)
    pen.stroke([(-4, edge), (4, edge)], 0.12, concrete + rng.uniform(-45, 40))
    for _ in range(rng.integers(1, 7)):
        x, inland = rng.uniform(-0.9, 0.9), edge + side * pen.slenderness * rng.uniform(0.06, 0.4)
        depth, tone, kind = pen.slenderness * rng.uniform(0.02, 0.07), concrete + rng.uniform(-80, 60), rng.integers(3)
        if kind == 0:
            box(pen, rng, x, rng.uniform(0.08, 0.4), depth, inland, tone, 0.02)
        elif kind == 1:
            grid(pen, rng, x, x + 0.24, 6, 3, depth, inland, tone, 30.0)
        else:
            pen.stroke([(x, inland), (x, edge - side * rng.uniform(0.2, 1.2))], 0.25, tone)


def buoys(pen: Pen, rng: np.random.Generator, count: int) -> None:
    """Floating marks scattered over the water."""
    for x, y in rng.uniform((-0.55, -1.6), (0.55, 1.6), (count, 2)):
        pen.disc(x, y, rng.uniform(0.06, 0.2), rng.uniform(-40, 110), 0.02)


def clouds(pen: Pen, rng: np.random.Generator) -> None:
    """Broken cloud over the water."""
    side = pen.image.width
    thickness = 60 + 110 * smooth_noise(rng, side, 4) + 40 * smooth_noise(rng, side, 9)
    cover = Image.fromarray(np.clip(thickness, 0, 235).astype(np.uint8))
    pen.image.paste(int(rng.uniform(190, 245)), (0, 0), cover)


def part(primitive: Callable[..., None], chance: float = 1.0,
         **numbers: Any) -> tuple[Callable[..., None], float, dict[str, Any]]:
    """An item of a design: a primitive, the share of ships that have it, its arguments (a pair is a range)."""
    return primitive, chance, numbers


@dataclass(frozen=True)
class Design:
    """The common features of the ships of a class; each (low, high) pair is a range.

    length is a share of the side of the chip, ratio is length over beam. bow and stern are (taper in hull lengths,
    roundness from 1 for straight to 3 for full, width of the tip in beams). tone is the grey of the deck, rim the tone
    of its edge. A list among the parts holds alternatives, each a tuple of parts; a ship gets one of them.
    """

    name: str
    length: tuple[float, float]
    ratio: tuple[float, float]
    tone: tuple[float, float]
    parts: tuple
    bow: tuple = ((0.22, 0.3), (1.6, 2.1), 0.02)
    stern: tuple = ((0.06, 0.12), 2.0, (0.65, 0.85))
    rim: tuple[float, float] = (-35.0, 15.0)
    quay_chance: float = 0.25
    opacity: float | tuple[float, float] = 1.0
    hull: bool = True


# ---- a ship of a design ----------------------------------------------------------------------------------------------


def hull_outline(rng: np.random.Generator, bow: tuple[Any, Any, Any], stern: tuple[Any, Any, Any]) -> np.ndarray:
    """Points (36, 2) around a hull in the frame of Pen."""
    position, halves = np.linspace(0, 1, 9), []
    for end in (stern, bow):
        taper, roundness, tip = (sample(rng, value) for value in end)
        halves.append(np.stack([0.5 - taper * (1 - position), 1 - (1 - tip) * position**roundness], axis=1))
    side = np.concatenate([halves[0][::-1] * (-1, 1), halves[1]])
    return np.concatenate([side, side[::-1] * (1, -1)])


def draw_parts(pen: Pen, rng: np.random.Generator, parts: Sequence[Any]) -> None:
    """Draw the parts of a design for one ship, with random alternatives, numbers, positions and paint."""
    for item in parts:
        if isinstance(item, list):
            draw_parts(pen, rng, item[rng.integers(len(item))])
            continue
        primitive, chance, numbers = item
        pen.shift, pen.tint = rng.uniform(-0.02, 0.02), rng.uniform(-20, 20)
        if rng.random() < chance:
            primitive(pen, rng, **{key: sample(rng, value) for key, value in numbers.items()})


# ---- the 23 classes --------------------------------------------------------------------------------------------------

FLAT_END, FULL_BOW = ((0.01, 0.05), 2.0, (0.8, 0.97)), ((0.08, 0.14), (1.9, 2.4), 0.05)
SHARP_BOW = ((0.3, 0.42), (1.6, 2.0), 0.02)
ANGLED_DECK = [(-0.36, -0.9), (-0.3, -1.5), (0.08, -1.5), (0.2, -0.9), (0.2, 0.0), (-0.36, 0.0)]
AFT_BRIDGE = (part(box, x=-0.4, length=(0.06, 0.1), width=(0.7, 0.95), tone=65, height=0.05, tiers=2),
              part(box, x=-0.46, length=0.03, width=0.25, tone=-35, height=0.05))

DESIGNS = (
    Design("non-ship", (0.7, 0.9), (3.0, 5.0), (60.0, 150.0), ([
        (), (part(buoys, count=(1, 6)),), (part(quay, gap=(-0.8, 1.0)),), (part(clouds),),
        (part(box, x=0, length=6, width=(0.25, 0.6), height=(0.03, 0.12)), part(line, points=[(-3, 0), (3, 0)]),
         part(grid, start=-0.8, end=0.8, columns=22, rows=4, width=0.22, tone=40, spread=50, gap=0.4, fill=0.5)),
        (part(heap, x=(-0.2, 0.2), y=(-0.7, 0.7), length=(0.3, 0.9), width=(0.8, 2.0), tone=20),)],), hull=False),
    Design("aircraft-carrier", (0.82, 0.97), (4.8, 5.5), (65.0, 120.0), (
        part(plate, points=ANGLED_DECK), part(line, points=[(-0.47, -0.1), (0.14, -1.2)], width=0.1, tone=85),
        part(line, points=[(-0.47, 0.35), (0.18, -0.65)], tone=60), part(line, points=[(0.2, -0.3), (0.46, -0.2)]),
        part(box, x=(-0.16, 0.06), y=0.8, length=0.1, width=0.14, tone=80, height=0.06, tiers=2),
        part(aircraft, start=-0.4, end=0.1, low=0.45, high=0.85, count=(1, 8)),
        part(aircraft, start=0.15, end=0.42, low=-0.4, high=0.8, count=(0, 7))), ((0.05, 0.12), 3.0, (0.5, 0.75))),
    Design("destroyer", (0.72, 0.92), (6.3, 7.2), (100.0, 155.0), (
        part(gun, x=0.31), part(grid, start=0.19, end=0.26, columns=4, rows=4, width=0.4, tone=-45),
        part(box, x=0.09, length=(0.15, 0.2), width=(0.65, 0.8), tiers=3), part(box, x=-0.1, length=0.22, width=0.45),
        part(discs, start=-0.17, end=-0.03, count=2, radius=0.32, tone=-70, height=0.03),
        part(grid, 0.6, start=-0.27, end=-0.2, columns=4, rows=4, width=0.4, tone=-45),
        part(helipad, x=-0.4)), SHARP_BOW),
    Design("landing-craft", (0.5, 0.78), (3.4, 4.6), (85.0, 150.0), (
        part(box, x=0.12, length=(0.5, 0.58), width=0.7, tone=-50, height=0),
        part(box, x=0.47, length=0.11, width=0.55),
        part(box, x=-0.28, length=(0.1, 0.18), width=(0.5, 0.85), y=(-0.2, 0.2), tiers=2),
        part(grid, 0.5, start=-0.1, end=0.35, columns=(2, 4), rows=(1, 2), width=0.5, spread=25, fill=0.7)),
        ((0.04, 0.1), 2.0, (0.6, 0.85))),
    Design("frigate", (0.6, 0.85), (6.2, 7.3), (100.0, 155.0), (
        part(gun, x=0.29, size=0.3), part(box, x=0.12, length=(0.1, 0.14), width=(0.6, 0.85), tiers=2),
        part(box, x=-0.11, length=(0.2, 0.28), width=(0.5, 0.85)),
        part(box, x=-0.06, length=0.06, width=0.25, tone=-70),
        part(box, x=0.03, length=0.02, width=0.5, height=0.05), part(helipad, x=-0.39)), SHARP_BOW),
    Design("amphibious-transport-dock", (0.75, 0.95), (5.2, 6.2), (100.0, 155.0), (
        part(box, x=0.12, length=(0.3, 0.38), width=(0.8, 0.92), tone=30, tiers=2),
        part(box, x=0.22, length=0.05, width=0.22, tone=85, height=0.07),
        part(box, x=0.01, length=0.05, width=0.22, tone=85, height=0.07),
        part(box, x=-0.29, length=0.38, width=0.8, tone=-30, height=0), part(cranes, 0.6, start=-0.07, end=0, count=1),
        part(discs, start=-0.38, end=-0.2, count=2, radius=0.42, tone=30, core=-50)), stern=FLAT_END),
    Design("cruiser", (0.8, 0.97), (7.1, 8.3), (100.0, 155.0), (
        part(gun, x=0.33), part(grid, start=0.21, end=0.28, columns=4, rows=4, width=0.45, tone=-45),
        part(box, x=0.13, length=(0.11, 0.15), width=(0.75, 0.9), tone=45, height=0.05, tiers=2),
        part(box, x=-0.14, length=(0.12, 0.17), width=(0.75, 0.9), tone=45, height=0.05, tiers=2),
        part(discs, start=-0.03, end=0.03, count=2, radius=0.3, tone=-65, height=0.03),
        part(grid, start=-0.36, end=-0.3, columns=4, rows=4, width=0.45, tone=-45),
        part(helipad, x=-0.26, radius=0.5), part(gun, x=-0.42, ahead=-1)), SHARP_BOW),
    Design("tarawa-class-amphibious-assault-ship", (0.8, 0.96), (5.6, 6.4), (65.0, 120.0), (
        part(box, x=0.05, y=0.64, length=(0.24, 0.3), width=0.19, tone=70, height=0.05, tiers=2),
        part(line, points=[(-0.48, -0.3), (0.48, -0.3)], width=0.1, tone=80),
        part(box, x=-0.15, y=-1.15, length=0.1, width=0.2, tone=0),
        part(box, x=-0.46, y=0.5, length=0.08, width=0.3, tone=-40),
        part(aircraft, start=-0.45, end=0.4, low=-0.8, high=-0.2, count=(0, 7))), FLAT_END, FLAT_END),
    Design("amphibious-assault-ship", (0.75, 0.95), (5.4, 6.6), (65.0, 125.0), (
        part(box, x=(-0.08, 0.1), y=0.74, length=(0.1, 0.19), width=0.14, tone=70, height=0.06, tiers=2),
        part(discs, start=-0.4, end=0.36, count=(5, 7), radius=0.27, y=-0.35, tone=65, core=-55),
        part(line, 0.6, points=[(-0.48, 0.2), (0.44, 0.2)]),
        part(box, 0.6, x=-0.3, y=1.12, length=0.1, width=0.14, tone=0),
        part(aircraft, start=-0.45, end=0.4, low=-0.5, high=0.6, count=(0, 6))), ((0.08, 0.14), 2.2, (0.3, 0.5))),
    Design("command-ship", (0.75, 0.95), (5.4, 6.4), (100.0, 155.0), (
        part(box, x=0, length=(0.16, 0.22), width=(0.5, 0.7), height=0.05, tiers=3), part(helipad, x=-0.38, radius=0.6),
        part(box, x=0.3, length=0.015, width=0.45, height=0.06),
        part(box, x=-0.22, length=0.015, width=0.5, height=0.06),
        part(discs, start=0.18, end=0, count=1, radius=0.38, tone=80, height=0.04),
        part(discs, start=-0.14, end=0, count=1, radius=0.3, tone=80, height=0.04, y=(-0.4, 0.4)),
        part(boats, start=-0.15, end=0.12, count=(3, 5), tone=70)), ((0.2, 0.28), 2.0, 0.1)),
    Design("submarine", (0.55, 0.92), (7.2, 9.5), (18.0, 50.0), (
        part(box, x=-0.43, length=0.04, width=0.8, tone=0, height=0),
        part(line, 0.5, points=[(-0.4, 0), (0.42, 0)], tone=20),
        part(box, x=(0.1, 0.22), length=(0.08, 0.13), width=0.24, tone=22, height=0.035),
        part(grid, 0.35, start=-0.25, end=0.02, columns=(6, 8), rows=2, width=0.35, tone=18)),
        ((0.1, 0.18), 2.2, 0.1), ((0.3, 0.45), 1.5, 0.05), (5.0, 70.0), quay_chance=0.2, opacity=(0.8, 1.0)),
    Design("medical-ship", (0.75, 0.95), (6.0, 7.0), (190.0, 220.0), (
        part(box, x=0.27, length=(0.1, 0.15), width=0.85, tone=15, height=0.05, tiers=2),
        part(box, x=-0.31, length=(0.14, 0.2), width=0.85, tone=15, height=0.05, tiers=2), part(cross, x=-0.13),
        part(helipad, x=0.03, radius=0.7, tone=-75, mark=60), part(cross, x=0.16),
        part(boats, start=-0.3, end=0.25, count=(4, 7), tone=-50)), rim=(-10.0, 20.0)),
    Design("combat-boat", (0.42, 0.68), (4.4, 5.8), (95.0, 155.0), (
        part(gun, x=0.23, size=0.38), part(box, x=0.04, length=(0.14, 0.24), width=(0.5, 0.75), height=0.05, tiers=2),
        [(part(grid, start=-0.4, end=-0.16, columns=2, rows=2, width=0.75, tone=25, spread=10, height=0.03),),
         (part(gun, x=-0.28, ahead=-1, size=0.3),), (part(box, x=-0.25, length=0.14, width=0.4, tone=-50),)]),
        SHARP_BOW),
    Design("auxiliary-ship", (0.7, 0.95), (5.6, 6.8), (90.0, 160.0), (
        part(grid, start=-0.14, end=0.3, columns=(3, 5), rows=1, width=(0.6, 0.9), tone=55, gap=0.8, height=0.045),
        part(line, points=[(-0.15, 0), (0.3, 0)], width=0.2, tone=-5), part(helipad, 0.7, x=-0.42, radius=0.6),
        part(box, x=-0.25, length=(0.12, 0.18), width=(0.75, 0.9), tone=55, height=0.05, tiers=2),
        part(box, 0.4, x=0.33, length=0.07, width=0.6, height=0.04))),
    Design("container-ship", (0.75, 0.97), (5.8, 7.4), (65.0, 125.0), (
        part(grid, start=-0.24, end=(0.3, 0.36), columns=(9, 13), rows=(4, 6), width=0.9, tone=25, spread=50,
             fill=(0.75, 1.0), height=0.02), part(box, x=-0.31, length=0.05, width=0.95, tone=85, height=0.06),
        part(grid, start=-0.47, end=-0.38, columns=2, rows=5, tone=20, spread=50, fill=0.8)), ((0.14, 0.2), 2.0, 0.05)),
    Design("car-carrier", (0.75, 0.95), (5.2, 6.2), (130.0, 215.0), (
        part(box, x=0.36, length=0.05, width=0.85, tone=25, height=0.02),
        part(grid, start=-0.4, end=0.28, columns=(6, 10), rows=2, width=0.75, tone=-30, gap=0.8),
        part(box, x=-0.36, length=0.07, width=0.2, y=(-0.3, 0.3), tone=-50),
        part(box, 0.5, x=-0.53, y=0.6, length=0.07, width=0.25, tone=-50)),
        ((0.06, 0.12), (2.0, 2.6), 0.35), FLAT_END, (-60.0, 10.0)),
    Design("hovercraft", (0.45, 0.75), (1.7, 2.2), (90.0, 160.0), (
        part(box, x=0.06, length=0.72, width=0.4, tone=-28, height=0),
        part(box, x=0.05, y=-0.58, length=(0.4, 0.6), width=0.09, tone=30),
        part(box, x=0.05, y=0.58, length=(0.4, 0.6), width=0.09, tone=30),
        part(discs, start=-0.42, end=0, count=1, radius=0.24, y=-0.45, tone=70, core=-110, height=0.04),
        part(discs, start=-0.42, end=0, count=1, radius=0.24, y=0.45, tone=70, core=-110, height=0.04),
        part(grid, 0.5, start=-0.2, end=0.3, columns=(2, 3), rows=1, width=0.22, tone=10, spread=25, height=0.02)),
        ((0.2, 0.3), (2.2, 3.0), 0.35), ((0.06, 0.12), 2.0, 0.75), (-75.0, -45.0), 0.15),
    Design("bulk-carrier", (0.7, 0.97), (5.4, 6.8), (70.0, 140.0), AFT_BRIDGE + (
        part(grid, start=-0.32, end=0.38, columns=(5, 9), rows=1, width=(0.5, 0.62), tone=(-50.0, 60.0), gap=0.28),
        part(cranes, 0.4, start=-0.25, end=0.3, count=(3, 5), tone=60)), FULL_BOW),
    Design("oil-tanker", (0.7, 0.97), (5.2, 6.6), (65.0, 135.0), AFT_BRIDGE + (
        part(line, points=[(-0.34, 0), (0.4, 0)], width=(0.16, 0.3), tone=60),
        part(grid, start=-0.03, end=0.07, columns=2, rows=1, width=0.7, tone=50, gap=0.7),
        part(line, 0.6, points=[(-0.34, 0.5), (0.36, 0.5)], width=0.06, tone=40),
        part(discs, 0.4, start=0.32, end=0, count=1, radius=0.35, tone=50, core=-45)), FULL_BOW),
    Design("fishing-boat", (0.4, 0.68), (3.4, 4.6), (80.0, 190.0), (
        [(part(box, x=0.15, length=(0.14, 0.22), width=(0.45, 0.7), tone=55, height=0.05),
          part(heap, x=-0.25, y=0, length=0.2, width=0.35, tone=-40)),
         (part(box, x=-0.26, length=(0.16, 0.24), width=(0.45, 0.7), tone=55, height=0.05),
          part(grid, start=0.0, end=0.2, columns=2, rows=1, width=0.4, tone=-45))],
        part(cranes, start=-0.1, end=0.0, count=(1, 2), reach=0.22, tone=70)), ((0.3, 0.42), (1.8, 2.4), 0.05)),
    Design("passenger-ship", (0.7, 0.95), (5.6, 7.0), (165.0, 220.0), (
        part(box, x=-0.04, length=0.7, width=0.78, tone=-20, tiers=2),
        part(boats, start=-0.3, end=0.25, count=(6, 10), tone=-70),
        part(discs, start=0.06, end=0.13, count=(1, 2), radius=0.3, tone=-110, core=25),
        part(box, x=-0.2, length=0.08, width=0.3, tone=-80, height=0.05),
        part(discs, 0.6, start=-0.4, end=0, count=1, radius=0.35, tone=-100)), rim=(-25.0, 15.0)),
    Design("liquefied-gas-ship", (0.75, 0.97), (5.2, 6.2), (70.0, 130.0), AFT_BRIDGE + (
        [(part(discs, start=-0.23, end=0.32, count=(4, 5), radius=0.72, tone=75, core=22, height=0.03),),
         (part(grid, start=-0.3, end=0.34, columns=(3, 4), rows=1, width=0.7, tone=60, gap=0.08, height=0.03),)],
        part(line, points=[(-0.32, 0), (0.4, 0)], width=0.12, tone=20)), FULL_BOW),
    Design("barge", (0.45, 0.85), (2.4, 4.6), (70.0, 165.0), ([
        (), (part(heap, x=0, y=0.0, length=0.7, width=0.55, tone=(-50.0, 50.0)),),
        (part(box, x=0, length=0.86, width=0.7, tone=-48, height=0),),
        (part(grid, start=-0.4, end=0.35, columns=(2, 5), rows=(1, 2), width=0.7, tone=-10, spread=30, fill=0.7),)],
        part(cranes, 0.25, start=-0.2, end=0, count=1, reach=0.3)), FLAT_END, FLAT_END),
)
