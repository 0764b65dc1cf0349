"""Image files -> grey squares -> one memory-mapped array, built once by several processes."""

import contextlib
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.files import atomic_path, remove_partials
from common.images import ValueRange, decode_square, unreadable
from common.runtime import UserError
from common.workers import in_processes

CACHE_FORMAT = 1  # part of the cache's key: raise it when decode_grey or the resize changes what it returns


class ImageCache:
    """Every image of a data set as one (images, size, size) uint8 memory-mapped array.

    The key covers each image's path, size in bytes and modification time, so an edited image is noticed; the file is
    renamed into place when it is complete; a lock makes processes that start together build it once.

    images: the folder of the images. samples: their [dataset.Sample]. folder: of the cache. name: of its file; a new
    cache replaces older ones of the same name and size. processes: number of decoders, None for one a core.
    value_range: as of `images.decode`. row_of: {relative path: row of the array}. key: changes with every image."""

    def __init__(self, images: str | Path, samples: Sequence[Any], size: int, folder: str | Path, name: str = "images",
                 processes: int | None = None, value_range: ValueRange | None = None):
        where: dict[str, str] = {}
        for sample in samples:
            where.setdefault(sample.path, sample.where)
        paths = sorted(where)
        self.row_of = {path: row for row, path in enumerate(paths)}
        key = _cache_key(images, paths, where, size, value_range)
        file = Path(folder) / f"{name}_{size}_{key}.npy"
        build_once(file, f"{name}_{size}_*.npy", lambda: _build_cache(file, images, paths, where, size, processes,
                                                                        value_range))
        self.array = np.load(file, mmap_mode="r")
        self.key = key


def build_once(file: Path, replaces: str, build: Callable[[], None]) -> None:
    """Call `build()`, which writes `file`, unless the file exists; of processes that start together only one builds.
    The other files of the folder that match the pattern `replaces` are removed, and the remains of killed builds."""
    if file.exists():
        return
    with _locked(file.parent) as locked:
        if locked:  # so the remains are not of a build that is still running
            remove_partials(file.parent, replaces)
        if not file.exists():  # another process may have built it meanwhile
            build()
            for older in set(file.parent.glob(replaces)) - {file}:
                with contextlib.suppress(OSError):  # Windows keeps files that another process has mapped
                    older.unlink()


def _cache_key(images: str | Path, paths: Sequence[str], where: dict[str, str], size: int,
               value_range: ValueRange | None) -> str:
    """A hexadecimal key of the cache's images. Raises UserError for an absent image, or a link out of the folder."""
    digest = hashlib.sha256(f"{CACHE_FORMAT} {size}".encode())
    if value_range:
        digest.update(f" {list(value_range)}".encode())
    root = os.path.realpath(images)
    inside: dict[str, bool] = {}
    for path in paths:
        full = os.path.join(root, path)
        folder = os.path.dirname(full)
        if folder not in inside:
            inside[folder] = _is_inside(folder, root)
        try:
            status = os.lstat(full)
            is_link = stat.S_ISLNK(status.st_mode)
            if not inside[folder] or (is_link and not _is_inside(full, root)):
                raise UserError(f"{where[path]}: {path} is a link out of the image folder {images}")
            status = os.stat(full) if is_link else status
        except (OSError, ValueError):
            raise UserError(f"{where[path]}: no such image: {Path(images) / path}") from None
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _is_inside(path: str, root: str) -> bool:
    real = os.path.realpath(path)
    return real == root or real.startswith(root + os.sep)


def _build_cache(file: Path, images: str | Path, paths: list[str], where: dict[str, str], size: int,
                 processes: int | None, value_range: ValueRange | None) -> None:
    needed = len(paths) * size * size
    free = shutil.disk_usage(file.parent).free
    if needed > free:
        raise UserError(f"{file.parent}: the image cache needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
                        "give a smaller --image-size or make room")
    with atomic_path(file) as temporary:
        with open(temporary, "wb") as whole:
            np.lib.format.write_array_header_1_0(
                whole, {"descr": "|u1", "fortran_order": False, "shape": (len(paths), size, size)})
            offset = whole.tell()
            whole.truncate(offset + needed)
        chunks = [range(start, min(start + 64, len(paths))) for start in range(0, len(paths), 64)]
        jobs = [(temporary, offset, images, chunk, paths[chunk.start:chunk.stop], size, value_range)
                for chunk in chunks]
        with tqdm(total=len(paths), desc=f"caching images at {size}x{size}", unit="image", disable=None) as bar:
            for failure, done in in_processes(_fill_cache, jobs, processes):
                if failure:
                    path, reason = failure
                    raise UserError(f"{where[path]}: {Path(images) / path}: {reason}")
                bar.update(done)


def _fill_cache(job: tuple[Path, int, str | Path, range, list[str], int, ValueRange | None]
                ) -> tuple[tuple[str, str] | None, int]:
    """Decode one chunk of images and write it at its place. Returns (None, number of images), or ((path, reason),
    number) of the first image that could not be read."""
    file, offset, images, rows, paths, size, value_range = job
    block = np.empty((len(rows), size, size), np.uint8)
    for number, path in enumerate(paths):
        try:
            block[number] = decode_square(os.path.join(images, path), size, value_range)
        # A damaged file can make a decoder raise any exception.
        except Exception as error:
            return (path, unreadable(error)), number
    with open(file, "r+b") as whole:
        whole.seek(offset + rows.start * size * size)
        whole.write(block.tobytes())
    return None, len(rows)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold an exclusive lock on `folder` (made if absent). The system drops it when the process dies, so it is never
    stale. Yields whether platform and file system have such a lock; without it two processes may both build a cache,
    each of them complete."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")  # noqa: SIM115 closed by the with below, outside this try
    except OSError as error:
        raise UserError(f"{folder}: the image cache cannot be written here ({error.strerror}); give another folder "
                        "with --cache-dir") from None
    with file:
        locked = False
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
        yield locked
