"""Charts as PNG files, drawn by matplotlib."""

import contextlib
import unicodedata
import warnings
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from common.files import atomic_path
from common.runtime import one_line, say

if TYPE_CHECKING:
    from matplotlib.figure import Figure


DPI = 110
LARGEST_SIDE = 40.0  # of a figure, in inches; matplotlib draws no picture of more than 65,535 pixels a side


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, its size in inches, at most LARGEST_SIDE each."""
    # Imported late: it takes half a second, and only a chart needs it. No pyplot, so no window and no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(width, LARGEST_SIDE), min(height, LARGEST_SIDE)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def as_label(name: str, width: int = 40) -> str:
    """A name for matplotlib: cut to `width` columns, of which a Chinese, Japanese or Korean letter takes two, and with
    `$`, which would begin a formula, escaped."""
    ends = list(accumulate(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in name))
    if ends and ends[-1] > width:
        name = name[:sum(end < width for end in ends)] + "…"
    return name.replace("$", r"\$")


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, atomically. Prints one note where the font lacks letters, which are drawn as boxes."""
    with atomic_path(path) as temporary, warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        figure.savefig(temporary, format="png", dpi=DPI)
    if any("missing from font" in str(warning.message) for warning in raised):  # matplotlib warns of each letter
        say(f"note: {path}: the font lacks letters of some names, which are drawn as boxes")


@contextlib.contextmanager
def optional_picture(path: Path) -> Iterator[Path]:
    """Yield the path of a picture to be drawn, after removing the picture of an earlier run. A picture is not a result:
    where it cannot be drawn, a note is printed and no error is raised."""
    path = Path(path)
    with contextlib.suppress(OSError):  # a file that cannot be removed cannot be replaced either: the note says so
        path.unlink(missing_ok=True)
    try:
        yield path
    except Exception as error:
        say(f"note: {path} was not drawn ({one_line(error) or type(error).__name__})")
