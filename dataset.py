"""Lists on disk -> grey images in one memory-mapped cache -> batches.

A data set is a folder with `dataset.json` (names, groups, where the images lie) and the lists `train.txt`, `test.txt`
and optionally `val.txt` (lines `relative/path label`). `prepare_dataset.py` makes it; this module reads and writes
it."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from runtime import UserError, atomic_path, read_json, write_json

GROUPS = ("head", "middle", "tail")
SPLITS = ("train", "val", "test")
CACHE_FORMAT = 1  # part of the cache's key: raise it when decode_grey or the resize changes what it returns


@dataclass(frozen=True)
class DatasetInfo:
    """What `dataset.json` says.

    root: the folder of the lists. images: the folder that the lists' paths are relative to. classes: names in id order.
    groups: {"head": [ids], "middle": [ids], "tail": [ids]}, together every class once. group_rule: in words, how the
    groups were made."""

    root: Path
    name: str
    classes: list
    groups: dict
    group_rule: str
    images: Path

    def group_of_class(self):
        """(classes,) int64 tensor: 0 head, 1 middle, 2 tail."""
        group_of_class = torch.empty(len(self.classes), dtype=torch.int64)
        for number, group in enumerate(GROUPS):
            group_of_class[self.groups[group]] = number
        return group_of_class


class Sample(NamedTuple):
    """One line of a list. `where` is "file:line", for messages."""

    path: str
    label: int
    where: str


# ---- the format on disk ----------------------------------------------------------------------------------------------


def read_info(root):
    """Read and check ROOT/dataset.json. Raises UserError naming what is wrong in it."""
    root = Path(root)
    path = root / "dataset.json"
    if not path.is_file():
        raise UserError(f"{root}: no dataset.json here; make the data set with prepare_dataset.py, or give --data-root")
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object with name, classes, groups, group_rule and images")
    for key, kind in (("name", str), ("classes", list), ("groups", dict), ("group_rule", str), ("images", str)):
        if not isinstance(content.get(key), kind):
            raise UserError(f"{path}: {key!r} is missing or not a {kind.__name__}")
    classes, groups = content["classes"], content["groups"]
    if not classes or not all(isinstance(name, str) and name for name in classes) or len(set(classes)) < len(classes):
        raise UserError(f"{path}: 'classes' must be a list of different names, in id order")
    if set(groups) != set(GROUPS) or not all(isinstance(ids, list) for ids in groups.values()):
        raise UserError(f"{path}: 'groups' must hold the lists head, middle and tail")
    ids = [class_id for group in GROUPS for class_id in groups[group]]
    if not all(type(class_id) is int for class_id in ids) or sorted(ids) != list(range(len(classes))):
        raise UserError(f"{path}: head, middle and tail must together hold each class id 0..{len(classes) - 1} once")
    images = root / content["images"]
    if not images.is_dir():
        raise UserError(f"{path}: 'images' names {images}, which is not a folder; correct it if the images have moved")
    return DatasetInfo(root, content["name"], classes, groups, content["group_rule"], images)


def write_dataset(info, lists, made_by=None):
    """Write dataset.json and one list a split into `info.root`; dataset.json comes last, so that an interrupted
    preparation leaves no data set.

    lists: {"train": [(relative path, label), ...], "val": ..., "test": ...}; an absent or empty split gets no list.
    made_by: plain values that say how it was made, kept for the reader."""
    for split in SPLITS:
        path = info.root / f"{split}.txt"
        if lists.get(split):
            with atomic_path(path) as temporary:
                temporary.write_text("".join(f"{p} {label}\n" for p, label in lists[split]), encoding="utf-8")
        else:
            path.unlink(missing_ok=True)
    images = Path(os.path.relpath(info.images.resolve(), info.root.resolve())).as_posix()
    write_json(info.root / "dataset.json", {
        "name": info.name, "classes": info.classes, "groups": info.groups, "group_rule": info.group_rule,
        "images": images, "made_by": made_by or {},
    })


def read_list(path, num_classes):
    """Parse a list file into [Sample]. The last space of a line separates path and label, so paths may hold spaces; a
    final line without newline is a line like any other; blank lines are skipped.

    Raises UserError naming file and line for a line without a label, a label outside 0..num_classes-1, or a path that
    is absolute or climbs out of the image folder."""
    return [parse_line(line, f"{path}:{number}", num_classes) for number, line in list_lines(path)]


def list_lines(path):
    """[(number, line)] of the lines of a list file that are not blank. Raises UserError for a file without any."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: could not be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{error.object[:error.start].count(10) + 1}: not UTF-8 text") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{path}: the list is empty")
    return lines


def parse_line(line, where, num_classes):
    """One line of a list as a Sample. where: "file:line". Raises UserError as `read_list` does."""
    image, label = (line.rsplit(maxsplit=1) + [""])[:2]
    if not label:
        raise UserError(f"{where}: expected 'relative/path label', found {line[:80]!r}")
    if not (label.isascii() and label.isdigit()):
        raise UserError(f"{where}: expected a class id after the last space, found {label[:40]!r}")
    if len(label) > 9 or int(label) >= num_classes:
        raise UserError(f"{where}: label {label[:20]} is out of range; expected 0..{num_classes - 1}")
    if ".." in PurePosixPath(image.replace("\\", "/")).parts or image[0] in "/\\" or PureWindowsPath(image).drive:
        raise UserError(f"{where}: path {image[:80]!r} leaves the image folder; expected a path inside it")
    if not image.isprintable():
        raise UserError(f"{where}: path {image[:80]!r} holds unprintable characters")
    return Sample(image, int(label), where)


def read_split(info, split):
    """The samples of one split. `val` is empty where the data set has no val.txt."""
    path = info.root / f"{split}.txt"
    if split == "val" and not path.exists():
        return []
    return read_list(path, len(info.classes))


def class_counts(labels, num_classes):
    """(num_classes,) int64 array: how many of `labels` fall on each class."""
    return np.bincount(np.asarray(labels, dtype=np.int64), minlength=num_classes)


# ---- decoding --------------------------------------------------------------------------------------------------------


def decode_grey(path):
    """Read an image file as an 8-bit grey PIL image.

    16-bit images are scaled to 8 bits, palettes and CMYK go through RGB, an animation gives its first frame,
    transparency is dropped. Raises OSError or ValueError for what cannot be read, an image bomb among it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            image.seek(0)
            image.load()
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                values = np.asarray(image, dtype=np.float32)
                # 16-bit files reach PIL as 0..65535 and stay exact in float32; smaller values are already 8-bit.
                if values.size and values.max() > 255:
                    values = values / 257
                return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
            if image.mode not in ("1", "L", "LA", "RGB", "RGBA"):
                image = image.convert("RGB")
            return image.convert("L")


def decode_square(path, size):
    """(size, size) uint8 array: the grey image resized bicubically, its aspect ratio not kept (the paper's recipe)."""
    return np.asarray(decode_grey(path).resize((size, size), Image.Resampling.BICUBIC))


def unreadable(error):
    """In a few words, why decode_grey failed."""
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"refused: more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that Pillow can read"
    return f"not readable as an image: {error}"


# ---- the cache -------------------------------------------------------------------------------------------------------


class ImageCache:
    """Every image of a data set as one (images, size, size) uint8 memory-mapped array, built once.

    The key covers each image's path, bytes and time of change, so an edited image is noticed; the file is renamed into
    place when whole; a lock makes processes that start together build it once.

    samples: the [Sample] of every list. folder: where the cache lies. processes: decoders, None for one a core.
    row_of: {relative path: row of the array}."""

    def __init__(self, images, samples, size, folder, processes=None):
        where = {}
        for sample in samples:
            where.setdefault(sample.path, sample.where)
        paths = sorted(where)
        self.row_of = {path: row for row, path in enumerate(paths)}
        key = _cache_key(images, paths, where, size)
        file = Path(folder) / f"images_{size}_{key}.npy"
        with _locked(Path(folder)):
            if not file.exists():
                _build_cache(file, images, paths, where, size, processes)
                for older in file.parent.glob(f"images_{size}_*.npy"):
                    if older != file:
                        older.unlink(missing_ok=True)
        self.array = np.load(file, mmap_mode="r")
        self.key = key


def _cache_key(images, paths, where, size):
    """A hexadecimal key of what the cache is made from. Raises UserError for an absent image or a link that leaves."""
    digest = hashlib.sha256(f"{CACHE_FORMAT} {size}".encode())
    root, inside = os.path.realpath(images), {}
    for path in paths:
        full = os.path.join(root, path)
        folder = os.path.dirname(full)
        if folder not in inside:
            inside[folder] = _is_inside(folder, root)
        try:
            status = os.lstat(full)
            if not inside[folder] or (os.path.islink(full) and not _is_inside(full, root)):
                raise UserError(f"{where[path]}: {path} is a link out of the image folder {images}")
            status = os.stat(full)
        except (OSError, ValueError):
            raise UserError(f"{where[path]}: no such image: {Path(images) / path}") from None
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _is_inside(path, root):
    real = os.path.realpath(path)
    return real == root or real.startswith(root + os.sep)


def _build_cache(file, images, paths, where, size, processes):
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
        jobs = [(temporary, offset, images, chunk, paths[chunk.start:chunk.stop], size) for chunk in chunks]
        with tqdm(total=len(paths), desc=f"caching images at {size}x{size}", unit="image", disable=None) as bar:
            for (path, reason), done in in_processes(_fill_cache, jobs, processes):
                if reason:
                    raise UserError(f"{where[path]}: {Path(images) / path}: {reason}")
                bar.update(done)


def _fill_cache(job):
    """Decode one chunk of images and write it at its place. Returns ((path, reason), count): reason None if all went
    well."""
    file, offset, images, rows, paths, size = job
    block = np.empty((len(rows), size, size), np.uint8)
    for number, path in enumerate(paths):
        try:
            block[number] = decode_square(os.path.join(images, path), size)
        # A damaged file can make a decoder raise anything; whatever it is, this image is the one to name.
        except Exception as error:
            return (path, unreadable(error)), number
    with open(file, "r+b") as whole:
        whole.seek(offset + rows.start * size * size)
        whole.write(block.tobytes())
    return (None, None), len(rows)


def in_processes(function, jobs, processes=None):
    """Yield (result) of `function(job)` for every job, in order, computed by several processes.

    processes: how many; None is one a core; 1, or a single job, runs here."""
    processes = min(processes or os.cpu_count() or 1, len(jobs))
    if processes <= 1:
        yield from map(function, jobs)
        return
    # Forked workers start in milliseconds; a spawned one would import torch first.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with warnings.catch_warnings():
        # Python 3.12 warns that a forked child of a threaded parent may hang on a lock; these children only decode.
        warnings.simplefilter("ignore", DeprecationWarning)
        pool = ProcessPoolExecutor(processes, mp_context=context)
        try:
            yield from pool.map(function, jobs)
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _locked(folder):
    """Hold an exclusive lock on `folder` (made if absent). The system drops it when the process dies, so none is ever
    stale. Where the platform has no such lock, two processes may both build the cache; either result is whole."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")  # noqa: SIM115 closed by the with below, outside this try
    except OSError as error:
        raise UserError(f"{folder}: the image cache cannot be written here ({error.strerror})") from None
    with file:
        try:
            import fcntl
        except ImportError:
            pass
        else:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---- batches ---------------------------------------------------------------------------------------------------------


class ImageDataset(Dataset):
    """Grey images of some splits and classes, as uint8.

    cache: the ImageCache that holds them. samples: [Sample]. Item i is an (1, size, size) uint8 tensor and its label;
    `__getitems__` gives a whole batch, (B, 1, size, size) uint8 and (B,) int64, in one indexing operation."""

    def __init__(self, cache, samples):
        self.cache = cache
        self.samples = samples
        self.labels = np.array([sample.label for sample in samples], dtype=np.int64)
        self.rows = np.array([cache.row_of[sample.path] for sample in samples], dtype=np.int64)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices):
        images = np.asarray(self.cache.array[self.rows[indices]])
        return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(self.labels[indices])


def batch_loader(dataset, batch_sampler, device):
    """A DataLoader whose batches come straight from `__getitems__`, drawn when asked for and not before: a sampler
    whose weights change after each step needs exactly that."""
    return DataLoader(dataset, batch_sampler=batch_sampler, collate_fn=_as_is, pin_memory=device.type == "cuda")


def _as_is(batch):
    return batch


def network_input(images, flip=None):
    """(B, 1, H, W) uint8 -> float32 in [-1, 1] (scale to [0, 1], then mean .5, deviation .5), on the images' device.

    flip: (B,) bool, which images to mirror left to right; None for none."""
    if flip is not None:
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    return images.float().div_(127.5).sub_(1)


def describe(info):
    """The data set's part of a checkpoint: plain values that a later script compares with its own data set."""
    return json.loads(json.dumps({"name": info.name, "classes": info.classes, "groups": info.groups}))
