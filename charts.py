"""Charts as PNG files, by matplotlib."""

from files import atomic_path


def new_figure(width, height):
    """An empty figure of so many inches."""
    # Imported late: it takes half a second, and only a chart needs it. No pyplot, so no window and no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure, path):
    """Write a figure as PNG, atomically."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
