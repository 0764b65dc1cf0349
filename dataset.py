"""Data sets on disk, and batches of their images.

A data set is a folder with `dataset.json` (names, groups, where the images lie) and the lists `train.txt`, `test.txt`
and optionally `val.txt` (lines `relative/path label`). `prepare_dataset.py` makes it; this module reads and writes
its files."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from common.files import atomic_path, file_identity, list_lines, read_json, write_json
from common.image_cache import ImageCache
from common.images import ValueRange, is_value_range, value_range_entry
from common.runtime import UserError

GROUPS = ("head", "middle", "tail")
SPLITS = ("train", "val", "test")
LONGEST_PATH = 4096  # characters; no system opens longer ones, and looking for one takes long


@dataclass(frozen=True)
class DatasetInfo:
    """The content of `dataset.json`.

    root: the folder of the lists. images: the folder that the lists' paths are relative to. classes: names in id order.
    groups: {"head": [ids], "middle": [ids], "tail": [ids]}, together every class once. group_rule: human-readable,
    how the groups were made. value_range: of images of more than 8 bits, see `common.images.decode`."""

    root: Path
    name: str
    classes: list[str]
    groups: dict[str, list[int]]
    group_rule: str
    images: Path
    value_range: ValueRange | None = None

    def group_of_class(self) -> torch.Tensor:
        """(classes,) int64 tensor: 0 head, 1 middle, 2 tail."""
        group_of_class = torch.empty(len(self.classes), dtype=torch.int64)
        for number, group in enumerate(GROUPS):
            group_of_class[self.groups[group]] = number
        return group_of_class


class Sample(NamedTuple):
    """One line of a list. where: "file:line", for messages."""

    path: str
    label: int
    where: str


# ---- the format on disk ----------------------------------------------------------------------------------------------


def read_info(root: str | Path) -> DatasetInfo:
    """Read and check ROOT/dataset.json. Raises UserError naming the first error in it."""
    root = Path(root)
    path = root / "dataset.json"
    if not os.path.isfile(path):
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
    if re.search("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "".join([content["name"], content["group_rule"], *classes])):
        raise UserError(f"{path}: 'name', 'classes' and 'group_rule' must hold no control characters")
    if set(groups) != set(GROUPS) or not all(isinstance(ids, list) for ids in groups.values()):
        raise UserError(f"{path}: 'groups' must hold the lists head, middle and tail")
    ids = [class_id for group in GROUPS for class_id in groups[group]]
    if not all(type(class_id) is int for class_id in ids) or sorted(ids) != list(range(len(classes))):
        raise UserError(f"{path}: head, middle and tail must together hold each class id 0..{len(classes) - 1} once")
    value_range = content.get("value_range")
    if not is_value_range(value_range):
        raise UserError(f"{path}: 'value_range' must be two whole numbers, the lower first")
    images = root / content["images"]
    if not os.path.isdir(images):
        raise UserError(f"{path}: 'images' names {images}, which is not a folder; correct it if the images have moved")
    return DatasetInfo(root, content["name"], classes, groups, content["group_rule"], images,
                       value_range and tuple(value_range))


def write_dataset(info: DatasetInfo, lists: dict[str, list[tuple[str, int]]],
                  made_by: dict[str, Any] | None = None) -> None:
    """Write dataset.json and one list a split into `info.root`; dataset.json comes last, so that an interrupted
    preparation leaves no data set.

    lists: {"train": [(relative path, label), ...], "val": ..., "test": ...}; an absent or empty split gets no list.
    made_by: plain values on how it was made, for readers of the file."""
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
        "images": images, **value_range_entry(info.value_range), "made_by": made_by or {},
    })


def read_list(path: str | Path, num_classes: int) -> list[Sample]:
    """Parse a list file into [Sample]. The last space of a line separates path and label, so paths may hold spaces; a
    final line without newline is a line like any other; blank lines are skipped.

    Raises UserError naming file and line for a line without a label, a label outside 0..num_classes-1, or a path that
    is absolute, climbs out of the image folder, or is too long."""
    return [parse_line(line, f"{path}:{number}", num_classes) for number, line in list_lines(path)]


def parse_line(line: str, where: str, num_classes: int) -> Sample:
    """One line of a list as a Sample. where: "file:line". Raises UserError as `read_list` does."""
    image, label = (line.rsplit(maxsplit=1) + [""])[:2]
    if not label:
        raise UserError(f"{where}: expected 'relative/path label', found {line[:80]!r}")
    if not (label.isascii() and label.isdigit()):
        raise UserError(f"{where}: expected a class id after the last space, found {label[:40]!r}")
    if len(label) > 9 or int(label) >= num_classes:
        raise UserError(f"{where}: label {label[:20]} is out of range; expected 0..{num_classes - 1}")
    if len(image) > LONGEST_PATH:
        raise UserError(f"{where}: a path of {len(image):,} characters; expected at most {LONGEST_PATH:,}")
    if ".." in image.replace("\\", "/").split("/") or image[0] in "/\\" or re.match("[A-Za-z]:", image):
        raise UserError(f"{where}: path {image[:80]!r} leaves the image folder; expected a path inside it")
    if not image.isprintable():
        raise UserError(f"{where}: path {image[:80]!r} holds unprintable characters")
    return Sample(image, int(label), where)


def read_split(info: DatasetInfo, split: str) -> list[Sample]:
    """The samples of one split. `val` is empty where the data set has no val.txt."""
    path = info.root / f"{split}.txt"
    if split == "val" and not path.exists():
        return []
    return read_list(path, len(info.classes))


def check_distinct(info: DatasetInfo, lists: dict[str, list[Sample]]) -> None:
    """Raise UserError for an image that is in two of the lists, {split: [Sample]}, or has two labels, by whatever names
    its file is listed. What only the pixels tell is left to `prepare_dataset.py check`."""
    seen: dict[Any, tuple[str, Sample]] = {}
    for split, samples in lists.items():
        for sample in samples:
            other_split, other = seen.setdefault(_identity(os.path.join(info.images, sample.path)), (split, sample))
            if split != other_split:
                raise UserError(f"{sample.where}: image {sample.path} is also at {other.where}; expected an image in "
                                "one list alone: remove one of the two lines")
            if sample.label != other.label:
                raise UserError(f"{sample.where}: image {sample.path} has the label {sample.label} here and "
                                f"{other.label} at {other.where}; remove one of the two lines")


def _identity(path: str) -> Any:
    """Equal for two names of one file. An absent file has only its name."""
    try:
        return file_identity(path)
    except (OSError, ValueError):
        return os.path.normpath(path)


def folder_of_list(path: Path) -> Path:
    """The folder that the paths in a list are relative to: for a list of a data set that of its images, for any other
    its own."""
    of_dataset = path.stem in SPLITS and (path.parent / "dataset.json").is_file()
    return read_info(path.parent).images if of_dataset else path.parent


def class_counts(labels: Sequence[int] | np.ndarray, num_classes: int) -> np.ndarray:
    """(num_classes,) int64 array: the number of `labels` of each class."""
    return np.bincount(np.asarray(labels, dtype=np.int64), minlength=num_classes)


# ---- batches ---------------------------------------------------------------------------------------------------------


class ImageDataset(Dataset):
    """Grey images of some splits and classes, as uint8.

    cache: the ImageCache that holds them. samples: [Sample]. Item i is an (1, size, size) uint8 tensor and its label;
    `__getitems__` gives a whole batch, (B, 1, size, size) uint8 and (B,) int64, in one indexing operation."""

    def __init__(self, cache: ImageCache, samples: list[Sample]):
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


def network_input(images: torch.Tensor, flip: torch.Tensor | None = None,
                  turns: torch.Tensor | None = None) -> torch.Tensor:
    """(B, 1, H, W) uint8 -> float32 in [-1, 1] (scale to [0, 1], then mean .5, deviation .5), on the images' device.

    flip: (B,) bool, the images to mirror left to right; None for no image. turns: (B,) int64, 0..3, the quarter turns
    of each image after that; None for no turns. Together they are the 8 symmetries of the square."""
    if flip is not None:
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    for number in (1, 2, 3) if turns is not None else ():
        images = torch.where((turns == number)[:, None, None, None], images.rot90(number, (2, 3)), images)
    return images.float().div_(127.5).sub_(1)


def describe(info: DatasetInfo) -> dict[str, Any]:
    """The data set's part of a checkpoint's metadata: plain values that a later script compares with its data set."""
    return {"dataset": info.name, "classes": info.classes, "groups": info.groups}


def fingerprint(info: DatasetInfo, splits: dict[str, list[Sample]]) -> str:
    """16 hexadecimal digits that change with the classes, the groups, the value range, and the content of the
    lists.

    splits: {split: [Sample]}."""
    lists = {split: [(sample.path, sample.label) for sample in samples] for split, samples in splits.items()}
    entry = value_range_entry(info.value_range)
    content = json.dumps([info.classes, info.groups, lists, *entry.values()], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
