"""Charts as PNG files, by matplotlib."""

import contextlib
import unicodedata
import warnings
from itertools import accumulate
from pathlib import Path

from common.files import atomic_path
from common.runtime import one_line, say


def new_figure(width, height):
    """An empty figure of so many inches."""
    # Imported late: it takes half a second, and only a chart needs it. No pyplot, so no window and no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def as_label(name, width=40):
    """A name as matplotlib is to be given it: cut to so many columns, of which a Chinese, Japanese or Korean letter
    takes two, and with `$` escaped, which would begin a formula."""
    ends = list(accumulate(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in name))
    if ends and ends[-1] > width:
        name = name[:sum(end < width for end in ends)] + "…"
    return name.replace("$", r"\$")


def save_figure(figure, path):
    """Write a figure as PNG, atomically."""
    with atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # letters that the font lacks are drawn as boxes
        figure.savefig(temporary, format="png", dpi=110)


@contextlib.contextmanager
def optional_picture(path):
    """Yield the path of a picture that is to be drawn, without what an earlier run has left there. A picture is no
    result: one that cannot be drawn is a note and no error."""
    path = Path(path)
    with contextlib.suppress(OSError):  # what cannot be removed cannot be replaced either, and that is told
        path.unlink(missing_ok=True)
    try:
        yield path
    except Exception as error:
        say(f"note: {path} was not drawn ({one_line(error) or type(error).__name__})")
