"""Water: its surface, and the wake of a ship."""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from demo.pen import Pen, smooth_noise


def sea(rng: np.random.Generator, side: int) -> np.ndarray:
    """Grey levels (side, side) of water: swell from one direction, patches of wind, glint on the crests."""
    down, right = np.mgrid[:side, :side] / side
    swell, height, waves = rng.uniform(0, 2 * np.pi), rng.uniform(1, 15), 0
    for _ in range(5):
        angle, cycles = swell + 0.3 * rng.normal(), rng.uniform(5, 22)
        phase = 2 * np.pi * cycles * (right * math.cos(angle) + down * math.sin(angle))
        waves = waves + np.sin(phase + rng.uniform(0, 6) + 1.5 * smooth_noise(rng, side, 5)) / 5
    water = rng.uniform(50, 105) + height * waves + rng.uniform(1, 8) * smooth_noise(rng, side, 4)
    glint = rng.random((side, side)) < rng.uniform(0, 0.4) * (waves > 0.4)
    return np.clip(water + glint * rng.uniform(5, 50), 0, 255).astype(np.uint8)


def draw_wake(pen: Pen, rng: np.random.Generator) -> None:
    """Foam behind the stern and along the bow of a ship under way."""
    foam = Image.new("L", pen.image.size)
    streak = ImageDraw.Draw(foam)
    length, spread = rng.uniform(0.6, 2.0), rng.uniform(1.2, 3.0)
    for behind, level in ((spread, rng.uniform(15, 70)), (0.9, rng.uniform(40, 150))):
        corners = pen.pixels([(-0.4, -0.6), (-length, -behind), (-length, behind), (-0.4, 0.6)])
        streak.polygon(list(map(tuple, corners)), fill=int(level))
    for side in (-1, 1):
        crest = pen.pixels([(0.48, 0), (0.2, 1.1 * side), (-0.6, 2.0 * side)])
        streak.line(list(map(tuple, crest)), fill=int(rng.uniform(0, 160)), width=max(1, pen.image.width // 100))
    foam = foam.filter(ImageFilter.GaussianBlur(pen.image.width / 80))
    broken = np.asarray(foam) * np.clip(0.9 + 0.5 * smooth_noise(rng, foam.width, 24), 0.2, 1.3)
    pen.image.paste(225, (0, 0), Image.fromarray(np.clip(broken, 0, 255).astype(np.uint8)))
