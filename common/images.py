"""Finding image files, and reading their pixels as 8 bits."""

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from common.files import list_lines
from common.runtime import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".jp2", ".ppm", ".pgm")
MAX_SOURCE_PIXELS = 1_000_000_000  # Pillow's own limit would refuse the largest images of DOTA as decompression bombs


# ---- which files -----------------------------------------------------------------------------------------------------


def existing_folders(paths: Iterable[str | Path]) -> list[Path]:
    """`paths` as [Path]. Raises UserError for one that is not a folder."""
    for path in paths:
        if not Path(path).is_dir():
            raise UserError(f"{path}: no such folder")
    return [Path(path) for path in paths]


def image_files(folder: str | Path) -> list[str]:
    """Sorted names of the image files directly in `folder`, known by their suffixes; hidden files are left out."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.name.lower().endswith(IMAGE_SUFFIXES)
                      and not entry.name.startswith(".") and entry.is_file())


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Every image among `paths`, in a stable order. A path is an image, a folder to search recursively, or a list
    (.txt). Raises UserError for a path that does not exist, and if there is no image at all."""
    suffixes = tuple(Image.registered_extensions())
    sources = [Path(path) for path in paths]
    images: list[Path] = []
    for path in sources:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
            images += [file for file in files if not file.name.startswith(".")]
        elif path.suffix.lower() == ".txt" and path.is_file():
            for _, line in list_lines(path):
                name, _, label = line.rpartition(" ")
                images.append(path.parent / (name if name and label.isdigit() else line))
        elif path.is_file():
            images.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    if not images:
        raise UserError(f"{' '.join(map(str, sources))}: no image here")
    return images


# ---- pixels ----------------------------------------------------------------------------------------------------------


def decode(path: str | Path) -> Image.Image:
    """Read an image file as an 8-bit PIL image of any mode.

    16-bit images are scaled to 8 bits, an animation gives its first frame. Raises OSError or ValueError for an
    unreadable file or a decompression bomb; damaged files can make Pillow raise other exceptions (see `unreadable`)."""
    if not os.path.isfile(path):
        raise OSError("not a file")  # a named pipe would be waited for
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about transparency and damaged metadata, both unused
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            if image.format == "EPS":
                raise ValueError("PostScript is a program, to be run by Ghostscript; convert it to PNG")
            image.seek(0)
            image.load()
            if image.mode == "F":
                raise ValueError("floating-point pixels, of no known range; convert it to 8 or 16 bits")
            if image.mode == "I" or image.mode.startswith("I;16"):  # 16 bits, 0..65535
                values = np.rint(np.asarray(image, dtype=np.float32) / 257)
                return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
            return image if image.mode in ("1", "L", "LA", "RGB", "RGBA") else image.convert("RGB")


def decode_grey(path: str | Path) -> Image.Image:
    """Read an image file as an 8-bit grey PIL image, as `decode` does; transparency is dropped."""
    return decode(path).convert("L")


def decode_square(path: str | Path, size: int) -> np.ndarray:
    """(size, size) uint8 array: the grey image resized bicubically, its aspect ratio not kept (the paper's recipe)."""
    return np.asarray(decode_grey(path).resize((size, size), Image.Resampling.BICUBIC))


def decode_squares(job: tuple[Sequence[str | Path], int]) -> list[tuple[np.ndarray | None, str | None]]:
    """[(`decode_square` of the file, or None; the reason why it could not be read, or None)] of a job (files, size)."""
    files, size = job
    decoded: list[tuple[np.ndarray | None, str | None]] = []
    for file in files:
        try:
            decoded.append((decode_square(file, size), None))
        except Exception as error:  # a damaged file can make a decoder raise any exception
            decoded.append((None, unreadable(error) if os.path.isfile(file) else "no such image"))
    return decoded


def unreadable(error: Exception) -> str:
    """A short reason for an exception of `decode`."""
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"refused: more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that Pillow can read"
    return f"not readable as an image: {error}"


@contextlib.contextmanager
def large_images() -> Iterator[None]:
    """Raise Pillow's limit on pixels to MAX_SOURCE_PIXELS while entered."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, MAX_SOURCE_PIXELS
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height), read from the header. Raises UserError for a file that is not an image."""
    with large_images():
        try:
            with Image.open(path) as image:
                return image.size
        # A damaged header can make a decoder raise any exception.
        except Exception as error:
            raise UserError(f"{path}: {unreadable(error)}") from None
