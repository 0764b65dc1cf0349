"""Finding image files, and reading their pixels as 8 bits."""

import contextlib
import functools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from common.files import list_lines
from common.flags import expects
from common.runtime import UserError
from common.workers import in_processes

# Edit here. A larger image is refused before it is decoded; decoded, one of this size takes 4 GB.
MAX_PIXELS = 1_000_000_000
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow's own limit, 89 million, is below the size of an aerial scene

NOT_RASTERS = ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF")  # formats that Pillow recognises but cannot decode
EIGHT_BITS = ("1", "L", "LA", "RGB", "RGBA")  # Pillow's modes that are read as they are
COLOURS_16 = re.compile("'(RGB[AX]?;16)([BLN])'")  # Pillow's names of colours of 16 bits, with their byte order
STRIP = 256  # rows of an image to convert at a time: a copy of a whole scene as float32 could be too large
ValueRange = tuple[int, int]
FULL_RANGE = (0, 65535)


# ---- which files -----------------------------------------------------------------------------------------------------


@functools.cache
def image_suffixes() -> tuple[str, ...]:
    """The suffixes of the image files that Pillow decodes, in lower case, the usual ones first."""
    readable = (suffix for suffix, name in Image.registered_extensions().items()
                if name in Image.OPEN and name not in NOT_RASTERS)
    return tuple(dict.fromkeys((".jpg", ".jpeg", ".png", ".tif", ".tiff", *readable)))


def is_image_name(name: str) -> bool:
    """Whether a file name is that of an image, known by its suffix; hidden files are none."""
    return name.lower().endswith(image_suffixes()) and not name.startswith(".")


def existing_folders(paths: Iterable[str | Path]) -> list[Path]:
    """`paths` as [Path]. Raises UserError for one that is not a folder."""
    for path in paths:
        if not Path(path).is_dir():
            raise UserError(f"{path}: no such folder")
    return [Path(path) for path in paths]


def image_files(folder: str | Path) -> list[str]:
    """Sorted names of the image files directly in `folder`; hidden files are left out."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if is_image_name(entry.name) and entry.is_file())


def images_below(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """(image files, other files) in `folder` and its subfolders, sorted. Hidden files and folders are in neither;
    linked folders are followed, each folder once. Raises OSError for a folder that cannot be read."""
    images: list[Path] = []
    others: list[Path] = []
    seen: set[str] = set()

    def fail(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith(".") and os.path.isfile(os.path.join(place, name)):
                (images if is_image_name(name) else others).append(Path(place, name))
    return sorted(images), sorted(others)


def find_images(paths: Iterable[str | Path],
                folder_of_list: Callable[[Path], Path] = lambda path: path.parent) -> list[Path]:
    """Every image among `paths`, in a stable order. A path is an image, a folder to search recursively, or a list
    (.txt) of paths relative to its `folder_of_list`, with or without a label behind them. Raises UserError for a path
    that does not exist, and if there is no image at all."""
    sources = [Path(path) for path in paths]
    images: list[Path] = []
    for path in sources:
        if path.is_dir():
            images += images_below(path)[0]
        elif path.suffix.lower() == ".txt" and path.is_file():
            folder = folder_of_list(path)
            for _, line in list_lines(path):
                name, label = (line.rsplit(maxsplit=1) + [""])[:2]
                images.append(folder / (name if label.isdigit() else line))
        elif path.is_file():
            images.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    if not images:
        raise UserError(f"{' '.join(map(str, sources))}: no image here")
    return images


# ---- pixels ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_image(path: str | Path) -> Iterator[ImageFile.ImageFile]:
    """An image file of which only the header is read. Raises OSError or ValueError for an unreadable file or one of
    more than MAX_PIXELS; damaged files can make Pillow raise other exceptions (see `unreadable`)."""
    if not os.path.isfile(path):
        raise OSError("not a file")  # a named pipe would be waited for
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about transparency and damaged metadata, both unused
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            yield image


def decode(path: str | Path, value_range: ValueRange | None = None) -> Image.Image:
    """Read an image file as an 8-bit PIL image of any mode; an animation gives its first frame.

    value_range: of pixels of more than 8 bits, the values that become 0 and 255; what lies outside is clipped. None is
    FULL_RANGE. Raises as `open_image` does."""
    with open_image(path) as image:
        if image.format == "EPS":
            raise ValueError("PostScript is a program, to be run by Ghostscript; convert it to PNG")
        image.seek(0)
        if image.mode == "F":
            raise ValueError("floating-point pixels, of no known range; convert it to 8 or 16 bits")
        # Over the full range, colours of 16 bits are their high bytes, as Pillow decodes them.
        limited = tuple(value_range or FULL_RANGE) != FULL_RANGE
        values = deep_values(image) if limited or image.mode not in EIGHT_BITS else None
        if values is not None:
            return Image.fromarray(as_bytes(values, value_range or FULL_RANGE))
        image.load()
        return image if image.mode in EIGHT_BITS else image.convert("RGB")


def decode_grey(path: str | Path, value_range: ValueRange | None = None) -> Image.Image:
    """Read an image file as an 8-bit grey PIL image, as `decode` does; transparency is dropped."""
    return decode(path, value_range).convert("L")


def decode_square(path: str | Path, size: int, value_range: ValueRange | None = None) -> np.ndarray:
    """(size, size) uint8 array: the grey image resized bicubically, its aspect ratio not kept (the paper's recipe)."""
    return np.asarray(decode_grey(path, value_range).resize((size, size), Image.Resampling.BICUBIC))


def decode_squares(
        job: tuple[Sequence[str | Path], int, ValueRange | None]) -> list[tuple[np.ndarray | None, str | None]]:
    """[(`decode_square` of the file, or None; the reason why it could not be read, or None)] of a job (files, size,
    value range)."""
    files, size, value_range = job
    decoded: list[tuple[np.ndarray | None, str | None]] = []
    for file in files:
        try:
            decoded.append((decode_square(file, size, value_range), None))
        except Exception as error:  # a damaged file can make a decoder raise any exception
            decoded.append((None, unreadable(error) if os.path.isfile(file) else "no such image"))
    return decoded


def unreadable(error: Exception) -> str:
    """A short reason for an exception of `decode`."""
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"refused: more than {Image.MAX_IMAGE_PIXELS:,} pixels (MAX_PIXELS in common/images.py)"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that Pillow can read"
    return f"not readable as an image: {error}"


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height), read from the header. Raises UserError for a file that is not an image."""
    try:
        with open_image(path) as image:
            return image.size
    # A damaged header can make a decoder raise any exception.
    except Exception as error:
        raise UserError(f"{path}: {unreadable(error)}") from None


# ---- more than 8 bits ------------------------------------------------------------------------------------------------


def deep_values(image: ImageFile.ImageFile) -> np.ndarray | None:
    """The pixels of an opened image of more than 8 bits a channel as integers, (H, W) grey or (H, W, 3) colour without
    transparency; None for any other image."""
    layout = COLOURS_16.search(str(image.tile))
    if image.mode == "I" or image.mode.startswith("I;16"):
        return np.asarray(image)
    if layout is None:
        return None
    # Pillow decodes the high bytes of such colours. Told the other byte order, it decodes the low bytes.
    native = "L" if sys.byteorder == "little" else "B"
    swapped = layout[1] + {"B": "L", "L": "B"}[native if layout[2] == "N" else layout[2]]
    with Image.open(image.filename) as low_bytes:
        low_bytes.seek(0)
        low_bytes.tile = [_with_layout(tile, swapped) for tile in low_bytes.tile]
        return np.asarray(image)[..., :3].astype(np.uint16) << 8 | np.asarray(low_bytes)[..., :3]


def _with_layout(tile: Any, layout: str) -> Any:
    """A tile of Pillow's, which says where and how to decode a part of an image, with another layout of its pixels."""
    *place, how = tile
    parts = (*place, layout if isinstance(how, str) else (layout, *how[1:]))
    return parts if type(tile) is tuple else type(tile)(*parts)  # the former: before Pillow 11


def as_bytes(values: np.ndarray, value_range: ValueRange) -> np.ndarray:
    """Integers as uint8: value_range (low, high) becomes 0..255, what lies outside is clipped."""
    low, high = value_range
    scaled = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), STRIP):
        strip = (values[top:top + STRIP].astype(np.float32) - low) / ((high - low) / 255)
        scaled[top:top + STRIP] = np.clip(np.rint(strip), 0, 255)
    return scaled


def value_range_of(files: Iterable[str | Path], given: ValueRange | None = None,
                   processes: int | None = None) -> ValueRange | None:
    """The value range of a data set: the one given, else the lowest and the highest pixel value of its images of more
    than 8 bits, None without such images. JPEG files, which cannot be such, are not opened; unreadable files are left
    to those that read them."""
    if given is None:
        candidates = [str(file) for file in files if Path(file).suffix.lower() not in (".jpg", ".jpeg")]
        jobs = [candidates[start:start + 64] for start in range(0, len(candidates), 64)]
        extremes = [found for found in in_processes(_extremes, jobs, processes) if found]
        if not extremes:
            return None
        low, high = min(low for low, _ in extremes), max(high for _, high in extremes)
        given = low, max(high, low + 1)
    return given


def range_to_predict_with(files: Iterable[str | Path], given: ValueRange | None,
                          trained: ValueRange | None) -> ValueRange | None:
    """The value range given, else the one that the weights were trained with. Where there is neither, a note on stderr
    tells what becomes of images of more than 8 bits."""
    if given or trained:
        return given or trained
    found = value_range_of(files, processes=1)
    if found not in (None, FULL_RANGE):
        low, high = found
        print(f"note: there are images of more than 8 bits, with values {low} to {high}, and the weights name no "
              f"range: 0 to 65535 become 0 to 255; to scale by their own range give --value-range {low},{high}",
              file=sys.stderr)
    return None


def _extremes(files: Sequence[str]) -> ValueRange | None:
    """The lowest and the highest value of the files of more than 8 bits, None without any."""
    found: list[int] = []
    for file in files:
        # A damaged file can make a decoder raise any exception.
        with contextlib.suppress(Exception), open_image(file) as image:
            values = deep_values(image)
            if values is not None:
                found += [int(values.min()), int(values.max())]
    return (min(found), max(found)) if found else None


@expects("two whole numbers, the lower first, such as 0,2047")
def low_and_high(text: str) -> ValueRange:
    """"0,2047" -> (0, 2047), the type of --value-range."""
    low, high = map(int, text.split(","))
    if not is_value_range([low, high]):
        raise ValueError
    return low, high


def value_range_text(value_range: Sequence[int]) -> str:
    """A sentence on a value range."""
    return (f"of images of more than 8 bits the values {value_range[0]} to {value_range[1]} become 0 to 255; where "
            "only a few pixels have such extremes give --value-range")


def value_range_entry(value_range: ValueRange | None) -> dict[str, list[int]]:
    """A value range as an entry of metadata; none where it is None or FULL_RANGE, as before there were any."""
    return {} if value_range is None or value_range == FULL_RANGE else {"value_range": list(value_range)}


def is_value_range(value: Any) -> bool:
    """Whether a value from a file can be a value range as JSON has it: [low, high] of 32 bits, or None."""
    return value is None or (isinstance(value, list) and [type(limit) for limit in value] == [int, int]
                             and -2**31 <= value[0] < value[1] < 2**32)
