"""A pen that draws in the frame of an object, and the random numbers of drawings."""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw


class Pen:
    """Draws on a grey image in the frame of one ship or other object.

    Points are (x, y): x in hull lengths with the stern at -0.5 and the bow at 0.5, y in half beams with port at -1 and
    starboard at 1. Tones are offsets from the grey of the deck (0 to 255). Heights are in hull lengths. shift (in x)
    and tint (a tone) are added to everything that is drawn, so that the parts of two ships of a class differ.
    """

    def __init__(self, image: Image.Image, centre: np.ndarray, heading: float, length: float, ratio: float, deck: float,
                 sun: np.ndarray):
        self.image, self.draw = image, ImageDraw.Draw(image)
        self.centre, self.length, self.half_beam, self.deck, self.sun = centre, length, length / (2 * ratio), deck, sun
        self.slenderness = 2 * ratio
        self.rotation = np.array([[math.cos(heading), math.sin(heading)], [-math.sin(heading), math.cos(heading)]])
        self.shift = self.tint = 0.0

    def pixels(self, points: ArrayLike) -> np.ndarray:
        """Pixel positions (n, 2) of points (n, 2) in the frame of the ship."""
        return self.centre + (np.add(points, (self.shift, 0)) * (self.length, self.half_beam)) @ self.rotation

    def grey(self, tone: float) -> int:
        """Grey level of a tone, kept off pure black and white."""
        return int(np.clip(self.deck + self.tint + tone, 6, 250))

    def polygon(self, points: ArrayLike, tone: float, height: float = 0.0) -> None:
        """Fill a polygon; one with a height first throws a shadow away from the sun."""
        corners = self.pixels(points)
        for reach in (0.5, 1.0) if height else ():
            shadow = corners + self.sun * (reach * height * self.length)
            self.draw.polygon(list(map(tuple, shadow)), fill=30)
        self.draw.polygon(list(map(tuple, corners)), fill=self.grey(tone))

    def rectangle(self, start: float, end: float, low: float, high: float, tone: float, height: float = 0.0) -> None:
        """Fill the rectangle from x = start to end and y = low to high."""
        self.polygon([(start, low), (end, low), (end, high), (start, high)], tone, height)

    def disc(self, x: float, y: float, radius: float, tone: float, height: float = 0.0) -> None:
        """Fill a disc whose radius is given in half beams, round in the picture for ships of any slenderness."""
        angle = np.linspace(0, 2 * np.pi, 18, endpoint=False)
        circle = np.stack([np.cos(angle) / self.slenderness, np.sin(angle)], axis=1)
        self.polygon(circle * radius + (x, y), tone, height)

    def stroke(self, points: ArrayLike, width: float, tone: float) -> None:
        """Draw a line through points; width in half beams, at least a pixel of the supersampled image."""
        thickness = max(1, round(width * self.half_beam))
        self.draw.line(list(map(tuple, self.pixels(points))), fill=self.grey(tone), width=thickness)


def smooth_noise(rng: np.random.Generator, side: int, cells: int) -> np.ndarray:
    """Noise (side, side) of unit deviation, smooth over side / cells pixels."""
    coarse = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))


def sample(rng: np.random.Generator, value: Any) -> Any:
    """A random number in a (low, high) range, both ends included if they are integers; any other value unchanged."""
    if not isinstance(value, tuple):
        return value
    return int(rng.integers(*value, endpoint=True)) if isinstance(value[0], int) else float(rng.uniform(*value))
