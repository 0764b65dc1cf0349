"""The ground of the scenes of the detection demo set: water, land, beaches, islands, fields, roads, runways, quays."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageChops, ImageDraw

from demo.objects import Sprite, circle
from demo.pen import smooth_noise
from demo.water import sea

SUPERSAMPLING = 2
# Lengths of objects, as shares of the side of a scene: 14, 26 and 120 pixels of 256.
SHORTEST, SHORTEST_SHIP, LONGEST = 14 / 256, 26 / 256, 120 / 256

# The ground resolution, as the length of an average plane in sides of a scene: 22 to 77 pixels of 256.
UNITS = (0.085, 0.3)

# Kinds of ground; 0 lies beyond the border of the picture.
WATER, LAND, SAND, FIELD, CONCRETE, GRAVEL, ROAD, MARKING = range(1, 9)
OPEN_LAND = (LAND, SAND, FIELD)
# Pairs of colours that are blended for a kind of ground; a scene takes one pair of each.
PALETTES = {
    WATER: (((20, 50, 78), (36, 76, 100)), ((16, 36, 58), (28, 54, 76)), ((46, 86, 94), (70, 108, 106))),
    LAND: (((58, 84, 48), (96, 106, 64)), ((86, 88, 54), (132, 118, 82)), ((42, 64, 40), (76, 94, 54))),
    SAND: (((186, 172, 134), (212, 200, 164)), ((150, 136, 104), (180, 164, 130))),
    FIELD: (((160, 148, 92), (184, 168, 108)), ((116, 92, 66), (138, 110, 82)), ((88, 120, 56), (108, 140, 72))),
    CONCRETE: (((146, 144, 138), (172, 170, 164)), ((124, 126, 126), (146, 148, 148))),
    GRAVEL: (((128, 116, 96), (152, 140, 118)), ((100, 106, 88), (124, 128, 108)), ((152, 136, 108), (174, 158, 128))),
    ROAD: (((82, 82, 84), (102, 102, 102)), ((108, 106, 104), (124, 122, 120))),
    MARKING: (((206, 206, 200), (224, 224, 220)),),
}


@dataclass
class Scene:
    """A scene while it is drawn, on `side` x `side` supersampled pixels, the unit of all lengths and positions."""

    rng: np.random.Generator
    side: int
    unit: float  # the ground resolution: the length of an average plane
    angle: float  # of quays, runways and rows with the x axis, in radians
    sun: np.ndarray  # (2,) direction of shadows, of length 0.3 to 1.1
    ground: Image.Image  # mode L, kinds of ground
    occupied: Image.Image  # mode L, 255 where an object stands
    foam: Image.Image  # mode L
    placed: list[tuple[Sprite, int, int]] = field(default_factory=list)  # (sprite, left, top)
    boxes: list[np.ndarray] = field(default_factory=list)  # (4,) float64 xyxy
    corners: list[np.ndarray] = field(default_factory=list)  # (4, 2) float64, of the rectangles along the headings
    labels: list[int] = field(default_factory=list)

    @property
    def axes(self) -> np.ndarray:
        """Rows (2, 2): the direction of quays, and the one across it, from water to land."""
        return np.array([(np.cos(self.angle), np.sin(self.angle)), (-np.sin(self.angle), np.cos(self.angle))])

    def on_ground(self, points: ArrayLike) -> np.ndarray:
        """Positions (n, 2) of points given along the axes, in pixels from the middle of the scene."""
        return self.side / 2 + np.asarray(points, float) @ self.axes

    def length(self, low: float, high: float, shortest: float = SHORTEST) -> float:
        """A random length between two multiples of the unit, within the limits of a scene."""
        return float(np.clip(self.unit * self.rng.uniform(low, high), shortest * self.side, LONGEST * self.side))


# ---- the ground ------------------------------------------------------------------------------------------------------


def cover(scene: Scene, polygons: Sequence[np.ndarray], kind: int, over: Sequence[int]) -> None:
    """Turn the ground inside polygons, each (n, 2) points along the axes, into `kind` where it was one of `over`."""
    area = Image.new("L", scene.ground.size)
    for points in polygons:
        ImageDraw.Draw(area).polygon(list(map(tuple, scene.on_ground(points))), fill=255)
    scene.ground.paste(kind, mask=ImageChops.darker(area, scene.ground.point(lambda old: 255 * (old in over))))


def rectangle(x: float, y: float, length: float, width: float) -> np.ndarray:
    """Corners (4, 2) of a rectangle around (x, y)."""
    return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (length / 2, width / 2) + (x, y)


def new_scene(rng: np.random.Generator, side: int, shore: float, ragged: float) -> Scene:
    """Scene of bare water and land. The shore passes the middle at `shore` sides towards the water; it is straight,
    or it varies by `ragged` sides and has a beach."""
    unit, angle, away = side * np.exp(rng.uniform(*np.log(UNITS))), *rng.uniform(0, 2 * np.pi, 2)
    sun = rng.uniform(0.3, 1.1) * np.array([np.cos(away), np.sin(away)])
    ground, occupied, foam = (Image.new("L", (side, side)) for _ in range(3))
    scene = Scene(rng, side, unit, angle, sun, ground, occupied, foam)
    down, right = np.mgrid[:side, :side].astype(np.float32) / side - 0.5
    inland = right * scene.axes[1, 0] + down * scene.axes[1, 1] + shore
    if ragged:
        inland = inland + ragged * smooth_noise(rng, side, 4) + 0.2 * ragged * smooth_noise(rng, side, 14)
        scene.foam = Image.fromarray(np.uint8(150 * np.exp(-np.square(inland / 0.006))))
    scene.ground = Image.fromarray(np.uint8([WATER, SAND, LAND])[np.digitize(inland, (0, 0.2 * ragged))])
    return scene


def add_countryside(scene: Scene) -> None:
    """Lay out islands, fields and roads."""
    rng, side = scene.rng, scene.side
    for _ in range(rng.poisson(0.5)):
        blob = circle(24) * side * rng.uniform(0.06, 0.2) * (1 + 0.2 * rng.normal(size=(24, 1)).cumsum(0) / 4)
        centre = rng.uniform(-0.5, 0.5, 2) * side
        cover(scene, [blob * 1.2 + centre], SAND, (WATER,))
        cover(scene, [blob + centre], LAND, (SAND,))
    for _ in range(rng.poisson(2)):
        cover(scene, [rectangle(*rng.uniform(-0.5, 0.5, 2) * side, *rng.uniform(0.15, 0.6, 2) * side)], FIELD, (LAND,))
    for turned in rng.integers(2, size=rng.integers(0, 3)):
        road = rectangle(0, rng.uniform(-0.5, 0.5) * side, 3 * side, rng.uniform(0.1, 0.25) * scene.unit)
        cover(scene, [road[:, ::-1] if turned else road], ROAD, OPEN_LAND)


def add_runway(scene: Scene) -> None:
    """Lay out a runway through the whole scene."""
    rng, side, unit = scene.rng, scene.side, scene.unit
    y, width = rng.uniform(-0.6, 0.6) * side, rng.uniform(0.5, 0.9) * unit
    cover(scene, [rectangle(0, y, 3 * side, width)], ROAD, OPEN_LAND)
    dashes = [rectangle(x, y, 0.4 * unit, 0.05 * unit) for x in np.arange(-0.7 * side, 0.7 * side, 0.7 * unit)]
    cover(scene, dashes, MARKING, (ROAD,))


def add_quay(scene: Scene, shore: float) -> list[tuple[Any, ...]]:
    """Lay out a quay along the straight shore, with or without piers. Returns the edges for ships to moor at: start
    (2,), direction (2,) and direction to the water (2,), all along the axes, and the length."""
    rng, side, unit = scene.rng, scene.side, scene.unit
    quay, depth = -shore * side, rng.uniform(0.3, 1.2) * unit
    cover(scene, [rectangle(0, quay + depth / 2, 3 * side, depth)], CONCRETE, (*OPEN_LAND, ROAD))
    edges = [((-0.7 * side, quay), (1, 0), (0, -1), 1.4 * side)]
    piers = np.arange(rng.uniform(-0.5, 0), 0.6, rng.uniform(0.3, 0.8)) * side
    for x in piers if rng.random() < 0.6 else ():
        length, width = rng.uniform(0.8, 2.0) * unit, rng.uniform(0.15, 0.4) * unit
        cover(scene, [rectangle(x, quay - length / 2, width, length)], CONCRETE, (WATER,))
        edges += [((x + turn * width / 2, quay), (0, -1), (turn, 0), length) for turn in (-1, 1)]
    return edges


def paint_ground(scene: Scene) -> Image.Image:
    """RGB picture (side x side) of the ground: a blend of two colours for each kind, with swell on water and the
    joints of slabs on concrete."""
    rng, side = scene.rng, scene.side
    size, picture = side // SUPERSAMPLING, Image.new("RGB", (side, side))
    places = np.mgrid[:size, :size][::-1].transpose(1, 2, 0) * SUPERSAMPLING  # (size, size, 2), x and y
    blend = 0.5 + sum(part * smooth_noise(rng, size, cells) for part, cells in ((0.3, 4), (0.2, 14), (0.15, 50)))
    blend, grain = np.clip(blend, 0, 1)[..., None], rng.normal(size=(size, size))
    for kind in np.flatnonzero(scene.ground.histogram()).tolist():
        first, second = np.array(PALETTES[kind][rng.integers(len(PALETTES[kind]))], float)
        light = grain * (7 if kind == LAND else 3)
        if kind == WATER:
            waves = sea(rng, size)
            light = 0.35 * (waves - waves.mean())
        elif kind == CONCRETE:
            slabs = places @ scene.axes.T / (rng.uniform(0.15, 0.3) * scene.unit + 0.02 * side) % 1
            light = light - 10 * (slabs < 0.08).any(2)
        colours = first + (second - first) * blend + light[..., None]
        texture = Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8))
        here = scene.ground.point([255 * (level == kind) for level in range(256)])
        picture.paste(texture.resize((side, side), Image.Resampling.BILINEAR), mask=here)
    foam = ImageChops.darker(scene.foam, scene.ground.point(lambda level: 255 * (level == WATER)))
    picture.paste((226, 234, 236), mask=foam)
    return picture
