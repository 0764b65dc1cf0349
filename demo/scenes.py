"""The scenes of the detection demo set: the placing of objects, light, sensor."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageFilter

from demo.ground import (
    CONCRETE,
    FIELD,
    GRAVEL,
    LAND,
    MARKING,
    OPEN_LAND,
    ROAD,
    SHORTEST,
    SHORTEST_SHIP,
    SUPERSAMPLING,
    WATER,
    Scene,
    add_countryside,
    add_quay,
    add_runway,
    cover,
    new_scene,
    paint_ground,
    rectangle,
)
from demo.objects import (
    TANK_PAINTS,
    Sprite,
    building_sprite,
    car_sprite,
    one_of,
    plane_sprite,
    ship_sprite,
    tank_sprite,
    tree_sprite,
)
from demo.pen import Pen, smooth_noise
from demo.water import draw_wake

CLASSES = ("plane", "ship", "storage_tank")
PLANE, SHIP, TANK = range(3)
SPLITS = ("train", "test")
EMPTY_SHARE = 0.05
MOST_OBJECTS = 12
MOST_OVERLAP = 0.05  # intersection over union of two boxes
# Tried distances of a moored ship's centre from the quay, in ship lengths.
BERTH_GAPS = np.arange(0.08, 0.3, 0.015)
# Share of scenes, the range of `shore` (9: all is land, -9: all is water) and how ragged it is (see new_scene), and the
# shares of planes, ships and tanks among the objects.
KINDS = {
    "harbour": (0.3, (-0.15, 0.25), 0.0, (0.15, 0.6, 0.25)),
    "coast": (0.2, (-0.15, 0.2), 0.09, (0.2, 0.45, 0.35)),
    "sea": (0.1, (-9.0, -9.0), 0.0, (0.0, 1.0, 0.0)),
    "airfield": (0.22, (9.0, 9.0), 0.0, (0.92, 0.0, 0.08)),
    "depot": (0.18, (9.0, 9.0), 0.0, (0.08, 0.0, 0.92)),
}


def silhouette_box(sprite: Sprite, left: int, top: int) -> np.ndarray:
    """Box (4,) xyxy of the silhouette of a sprite whose patch begins at (left, top), in the same pixels."""
    return np.array(sprite.silhouette.getbbox(), float) + (left, top, left, top)


def overlap(box: np.ndarray, boxes: ArrayLike) -> np.ndarray:
    """Intersection over union of a box (4,) with each of boxes (n, 4), xyxy."""
    boxes = np.reshape(boxes, (-1, 4))
    common = np.clip(np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2]), 0, None).prod(1)
    return common / ((box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1) - common)


def place(scene: Scene, sprite: Sprite, centre: ArrayLike, grounds: Sequence[int], label: int | None = None) -> bool:
    """Place a sprite around `centre` (2,) if the spot is free, all ground under it is one of `grounds` (so that it is
    wholly in the picture), and, for an object of class `label`, its box keeps clear of the others'. Returns whether it
    was placed."""
    patch, inside = sprite.silhouette.width, np.asarray(sprite.silhouette) > 0
    left, top = np.rint(np.asarray(centre) - patch / 2).astype(int).tolist()
    ground, occupied = (np.asarray(layer.crop((left, top, left + patch, top + patch)))[inside]
                        for layer in (scene.ground, scene.occupied))
    if occupied.any() or not np.isin(ground, grounds).all():
        return False
    if label is not None:
        box = silhouette_box(sprite, left, top)
        if (overlap(box, scene.boxes) > MOST_OVERLAP).any():
            return False
        scene.boxes.append(box)
        scene.corners.append(sprite.corners + (left, top))
        scene.labels.append(label)
    scene.placed.append((sprite, left, top))
    around = sprite.silhouette.filter(ImageFilter.BoxBlur(scene.side / 200)).point(lambda level: 255 * (level > 0))
    scene.occupied.paste(255, (left, top), around)
    return True


def scatter(scene: Scene, sprite: Sprite, grounds: Sequence[int], label: int | None = None, tries: int = 20) -> bool:
    """Place a sprite at random. Returns whether a free spot was found."""
    return any(place(scene, sprite, scene.rng.uniform(0, scene.side, 2), grounds, label) for _ in range(tries))


def lay_out(scene: Scene, columns: int, rows: int, pitch: float, kind: int) -> np.ndarray:
    """Cover a yard of rows and columns with ground of a kind; of 20 random places, the one with most of the yard on
    land and in the picture. Returns the spots in it, (n, 2), in random order."""
    rng, side = scene.rng, scene.side
    grid = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=2).reshape(-1, 2) + 0.5
    grid = (grid - (columns / 2, rows / 2)) * pitch

    def room(centre: np.ndarray) -> int:
        spots = scene.on_ground(grid + centre).astype(int)
        seen = spots[((spots >= pitch / 2) & (spots < side - pitch / 2)).all(1)]
        return sum(scene.ground.getpixel((int(x), int(y))) in (*OPEN_LAND, ROAD) for x, y in seen)

    centre = max(rng.uniform(-0.5, 0.5, (20, 2)) * side, key=room)
    cover(scene, [rectangle(*centre, (columns + 0.3) * pitch, (rows + 0.3) * pitch)], kind,
          (*OPEN_LAND, ROAD, MARKING))
    return scene.on_ground(rng.permutation(grid) + centre)


def put_planes(scene: Scene, count: int) -> None:
    """Park up to `count` planes on an apron, most of them in rows, nose to nose."""
    rng, pitch = scene.rng, 1.3 * scene.unit
    columns = rng.integers(2, 6)
    rows = max(rng.integers(1, 4), -(-count // columns))
    facing, before = scene.angle + np.pi / 2 * rng.integers(4), len(scene.boxes)
    for spot in lay_out(scene, columns, rows, pitch, CONCRETE):
        heading = facing + np.pi * rng.integers(2) + 0.1 * rng.normal() if rng.random() < 0.75 else rng.uniform(0, 6.3)
        if len(scene.boxes) < before + count:
            place(scene, plane_sprite(rng, scene.length(0.7, 1.2), heading, scene.sun), spot, (CONCRETE,), PLANE)


def put_tanks(scene: Scene, count: int) -> None:
    """Build up to `count` tanks, of one diameter and paint or of several, in a yard of gravel."""
    rng, diameter = scene.rng, scene.length(0.45, 0.95)
    columns, before = rng.integers(2, 6), len(scene.boxes)
    rows = max(rng.integers(1, 4), -(-count // columns))
    colour, mixed, floating = one_of(rng, TANK_PAINTS), rng.random() < 0.4, rng.choice([0.0, 0.5, 1.0])
    for spot in lay_out(scene, columns, rows, 1.4 * diameter, (GRAVEL, CONCRETE)[rng.integers(2)]):
        if len(scene.boxes) < before + count:
            width = max(diameter * (rng.uniform(0.55, 1) if mixed else 1), SHORTEST * scene.side)
            tank = tank_sprite(rng, width, rng.random() < floating, colour, scene.sun)
            place(scene, tank, spot, (GRAVEL, CONCRETE), TANK)


def put_ships(scene: Scene, count: int, edges: Sequence[tuple[Any, ...]]) -> None:
    """Up to `count` ships: some moored at an edge, the others under way or at anchor anywhere on the water."""
    rng = scene.rng
    for _ in range(count):
        length = scene.length(0.8, 2.2, SHORTEST_SHIP)
        if edges and rng.random() < 0.6:
            start, direction, outward, reach = (np.array(value) for value in edges[rng.integers(len(edges))])
            heading = scene.angle + np.arctan2(direction[1], direction[0]) + np.pi * rng.integers(2)
            ship = ship_sprite(rng, length, heading, scene.sun)
            berths = start + rng.uniform(0, reach, (4, 1, 1)) * direction + BERTH_GAPS[:, None] * length * outward
            if any(place(scene, ship, berth, (WATER,), SHIP) for berth in scene.on_ground(berths.reshape(-1, 2))):
                continue
        heading = rng.uniform(0, 2 * np.pi)
        if scatter(scene, ship_sprite(rng, length, heading, scene.sun), (WATER,), SHIP) and rng.random() < 0.6:
            add_wake(scene, length, heading)


def add_wake(scene: Scene, length: float, heading: float) -> None:
    """Foam behind the last ship placed, in a patch with room for the wake and the ship at one end."""
    sprite, left, top = scene.placed[-1]
    patch, ahead = int(3.2 * length), 0.6 * length * np.array([np.cos(heading), np.sin(heading)])
    wake = Image.new("L", (patch, patch))
    draw_wake(Pen(wake, patch / 2 + ahead, heading, length, 5, 0, scene.sun), scene.rng)
    corner = np.add((left, top), (sprite.silhouette.width - patch) / 2) - ahead
    scene.foam.paste(255, tuple(np.rint(corner).astype(int).tolist()), wake)


def put_distractors(scene: Scene) -> None:
    """Buildings, containers, cars and trees on the free ground."""
    rng, unit, least, square = scene.rng, scene.unit, 0.017 * scene.side, (scene.angle, scene.angle + np.pi / 2)
    for _ in range(rng.integers(0, 12)):
        heading = square[rng.integers(2)] + (rng.random() < 0.2) * rng.uniform(0, 1.5)
        block = building_sprite(rng, scene.length(0.3, 1.1), rng.uniform(1, 3.5), heading, scene.sun)
        scatter(scene, block, (LAND, FIELD, CONCRETE), tries=6)
    for _ in range(rng.integers(0, 25)):
        car = car_sprite(rng, max(least, 0.11 * unit), square[rng.integers(2)], scene.sun)
        scatter(scene, car, (ROAD, CONCRETE, GRAVEL), tries=4)
    for _ in range(rng.integers(0, 40)):
        tree = tree_sprite(rng, max(least, rng.uniform(0.1, 0.4) * unit), scene.sun)
        scatter(scene, tree, (LAND,), tries=2)


# ---- the picture -----------------------------------------------------------------------------------------------------


def sense(rng: np.random.Generator, picture: Image.Image) -> np.ndarray:
    """Array (size, size, 3) uint8 of a supersampled RGB picture: blur, haze, gain, tint and noise of a sensor."""
    picture = picture.reduce(SUPERSAMPLING).filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.6)))
    light = np.asarray(picture, dtype=float)  # (size, size, 3)
    haze = np.clip(rng.uniform(-0.2, 0.2) + 0.05 * smooth_noise(rng, len(light), 4), 0, 0.5)[..., None]
    light = light * (1 - haze) + np.array([196, 204, 214]) * haze
    light = 112 + (light - 112) * rng.uniform(0.85, 1.15) + rng.uniform(-10, 10) + rng.normal(0, 3, 3)
    return np.clip(np.rint(light + rng.uniform(1, 4) * rng.normal(size=light.shape)), 0, 255).astype(np.uint8)


def render(scene: Scene) -> np.ndarray:
    """Array (size, size, 3) uint8 of a laid-out scene."""
    picture, shadows = paint_ground(scene), Image.new("L", scene.ground.size)
    for sprite, left, top in scene.placed:
        for reach in np.linspace(0.25, 1, 4) * sprite.shadow:
            x, y = np.rint(scene.sun * reach).astype(int).tolist()
            shadows.paste(150, (left + x, top + y), sprite.silhouette)
    picture.paste((14, 18, 28), mask=shadows)
    for sprite, left, top in scene.placed:
        picture.paste(sprite.colours, (left, top), sprite.silhouette)
    return sense(scene.rng, picture)


def lay_out_scene(rng: np.random.Generator, size: int) -> Scene:
    """Scene of `size` pixels a side with 1 to MOST_OBJECTS objects on it, a few scenes with none."""
    shares = np.array([share for share, *_ in KINDS.values()])
    kind = list(KINDS)[rng.choice(len(KINDS), p=shares / shares.sum())]
    _, shores, ragged, mix = KINDS[kind]
    wanted = 0 if rng.random() < EMPTY_SHARE else rng.integers(1, MOST_OBJECTS, endpoint=True)
    while True:
        shore = rng.uniform(*shores)
        scene = new_scene(rng, SUPERSAMPLING * size, shore, ragged)
        add_countryside(scene)
        edges = add_quay(scene, shore) if kind == "harbour" else []
        if kind == "airfield" and rng.random() < 0.6:
            add_runway(scene)
        planes, ships, tanks = rng.multinomial(wanted, mix)
        if planes:
            put_planes(scene, planes)
        if tanks:
            put_tanks(scene, tanks)
        put_ships(scene, ships, edges)
        # There may be no room for any object, such as ships at a coast without much water: then try another scene.
        if scene.boxes or not wanted:
            put_distractors(scene)
            return scene


def draw_scene(split: str, index: int, seed: int = 0, size: int = 256) -> tuple[np.ndarray, ...]:
    """Draw one scene: its picture (size, size, 3) uint8, the boxes (G, 4) float64 xyxy in its pixels, tight around
    hull, wings and fuselage, or tank, without shadow and wake, their labels (G,) int64, indices of CLASSES, and the
    corners (G, 4, 2) float64 of the rectangles around the same along the objects' headings.

    split is "train" or "test". split, index and seed determine all random choices, so that a scene does not depend on
    the scenes drawn before it."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    scene = lay_out_scene(rng, size)
    boxes = np.reshape(scene.boxes, (-1, 4)) / SUPERSAMPLING
    corners = np.reshape(scene.corners, (-1, 4, 2)) / SUPERSAMPLING
    return render(scene), boxes, np.array(scene.labels, np.int64), corners
