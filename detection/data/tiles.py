"""Large images in tiles that overlap."""


def windows(height: int, width: int, size: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """The windows [(x0, y0, x1, y1)], x1 and y1 excluded, of `size` x `size` pixels that cover an image of height x
    width pixels, row by row: every size - overlap pixels, 0 <= overlap < size, the last one shifted back to end at the
    border. Along a side that is no longer than `size` there is one window, of the length of that side."""
    columns, rows = ((_starts(length, size, overlap), min(length, size)) for length in (width, height))
    return [(x, y, x + columns[1], y + rows[1]) for y in rows[0] for x in columns[0]]


def _starts(length: int, size: int, overlap: int) -> list[int]:
    """The first pixels of the windows along one side."""
    last = max(length - size, 0)
    return [*range(0, last, size - overlap), last]
