"""The check of a data set: `python prepare_dataset.py check DATASET`.

Errors would make training or its results wrong (exit status 1); notes are worth knowing."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.files import list_lines
from common.images import FULL_RANGE, decode_grey, unreadable, value_range_of
from common.runtime import UserError
from common.text import print_findings
from common.workers import in_processes
from dataset import GROUPS, SPLITS, DatasetInfo, Sample, class_counts, parse_line, read_info

Findings = tuple[list[str], list[str]]  # errors, notes


def check_dataset(root: str | Path, processes: int | None = None) -> int:
    """Print the counts and every finding of the data set in `root`. Returns 1 where there are errors, else 0.

    Raises UserError where `root` is not a data set."""
    info = read_info(root)
    errors: list[str] = []
    notes: list[str] = []
    lists: dict[str, list[Sample]] = {}
    for split in SPLITS:
        path = info.root / f"{split}.txt"
        if split == "val" and not path.exists():
            lists[split] = []
            notes.append("no val.txt: the best epoch can only be chosen on the test part")
        else:
            lists[split], list_errors = read_whole_list(path, len(info.classes))
            errors += list_errors
    counts = print_table(info, {split: [sample.label for sample in samples] for split, samples in lists.items()})
    count_errors, count_notes = count_findings(info, counts)
    contents, image_errors = read_contents(info, lists, processes)
    duplicate_errors, duplicate_notes = duplicate_findings(lists, contents)
    errors += count_errors + image_errors + duplicate_errors
    notes += count_notes + duplicate_notes + range_notes(info, contents, processes)
    return print_findings(errors, notes)


def print_table(info: DatasetInfo, labels: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Print one line a class and one a group. labels: {split: [class ids]}. Returns {split: (classes,) counts}."""
    counts = {split: class_counts(labels.get(split, []), len(info.classes)) for split in SPLITS}
    group_of = {class_id: group for group in GROUPS for class_id in info.groups[group]}
    width = max(len("class"), *(len(name) for name in info.classes))
    print(f"{'id':>4}  {'class':{width}}  group   {'train':>7} {'val':>7} {'test':>7}")
    for class_id, name in enumerate(info.classes):
        row = " ".join(f"{counts[split][class_id]:7}" for split in SPLITS)
        print(f"{class_id:4}  {name:{width}}  {group_of[class_id]:6}  {row}")
    for group in (*GROUPS, "all"):
        ids = info.groups.get(group, range(len(info.classes)))
        row = " ".join(f"{counts[split][list(ids)].sum():7}" for split in SPLITS)
        print(f"{'':4}  {f'{len(ids)} classes':{width}}  {group:6}  {row}")
    print(f"groups: {info.group_rule}")
    return counts


def read_whole_list(path: Path, num_classes: int) -> tuple[list[Sample], list[str]]:
    """([Sample], [errors]): like `dataset.read_list`, but with the errors of all lines."""
    samples: list[Sample] = []
    errors: list[str] = []
    try:
        for number, line in list_lines(path):
            try:
                samples.append(parse_line(line, f"{path}:{number}", num_classes))
            except UserError as error:
                errors.append(str(error))
    except UserError as error:
        errors.append(str(error))
    return samples, errors


def count_findings(info: DatasetInfo, counts: dict[str, np.ndarray]) -> Findings:
    """Groups and classes without images."""
    errors, notes = [], []
    for group in GROUPS:
        ids = info.groups[group]
        if not counts["train"][ids].sum():
            missing = "training images" if ids else "class"
            errors.append(f"group {group} has no {missing}: its teacher has nothing to learn")
    for class_id, name in enumerate(info.classes):
        train, val, test = (counts[split][class_id] for split in SPLITS)
        if not train:
            others = f"; it has {val + test} elsewhere" if val + test else ""
            errors.append(f"class {class_id} ({name}) has no training images{others}")
        elif not test:
            notes.append(f"class {class_id} ({name}) has no test images")
    return errors, notes


def range_notes(info: DatasetInfo, paths: Iterable[str], processes: int | None) -> list[str]:
    """A sentence on images of more than 8 bits in a data set without a value range, as they were made before."""
    found = None if info.value_range else value_range_of([info.images / path for path in paths], processes=processes)
    if found in (None, FULL_RANGE):
        return []
    return [f"images of more than 8 bits have the values {found[0]} to {found[1]}; dataset.json has no value_range, "
            "so that 0 to 65535 become 0 to 255: make the data set anew to scale by their own range"]


# ---- content ---------------------------------------------------------------------------------------------------------


def read_contents(info: DatasetInfo, lists: dict[str, list[Sample]],
                  processes: int | None) -> tuple[dict[str, bytes], list[str]]:
    """Decode every image once. Returns ({path: digest of its grey pixels}, [errors])."""
    where = {}
    for samples in lists.values():
        for sample in samples:
            where.setdefault(sample.path, sample.where)
    paths, contents, errors = list(where), {}, []
    jobs = [(info.images, paths[start:start + 64], info.value_range) for start in range(0, len(paths), 64)]
    with tqdm(total=len(paths), desc="reading images", unit="image", disable=None) as bar:
        for results in in_processes(_digest_images, jobs, processes):
            for path, digest, reason in results:
                if reason:
                    errors.append(f"{where[path]}: {path}: {reason}")
                else:
                    contents[path] = digest
            bar.update(len(results))
    return contents, errors


def _digest_images(job):
    """[(path, digest or None, error or None)] for one chunk of images."""
    images, paths, value_range = job
    root, results = os.path.realpath(images), []
    for path in paths:
        file = os.path.realpath(os.path.join(root, path))
        if not os.path.isfile(file):
            results.append((path, None, "no such image"))
        elif os.path.commonpath([file, root]) != root:
            results.append((path, None, f"is a link out of the image folder {images}"))
        else:
            results.append((path, *_digest(file, value_range)))
    return results


def _digest(file, value_range):
    try:
        pixels = np.asarray(decode_grey(file, value_range))
    # A damaged file can make a decoder raise any exception.
    except Exception as error:
        return None, unreadable(error)
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest(), None


def duplicate_findings(lists: dict[str, list[Sample]], contents: dict[str, bytes]) -> Findings:
    """Images with equal grey pixels: in two splits or with two labels (errors), or only twice in a split (notes)."""
    same: dict[bytes, list[tuple[str, Sample]]] = {}
    for split, samples in lists.items():
        for sample in samples:
            if sample.path in contents:
                same.setdefault(contents[sample.path], []).append((split, sample))
    errors, notes = [], []
    for entries in same.values():
        if len(entries) == 1:
            continue
        lines = "; ".join(f"{sample.path} ({sample.where})" for _, sample in entries[:4])
        lines += f" and {len(entries) - 4} more" if len(entries) > 4 else ""
        splits = [split for split in SPLITS if any(split == other for other, _ in entries)]
        labels = sorted({sample.label for _, sample in entries})
        if len(splits) > 1:
            errors.append(f"the same image is in {' and '.join(splits)}: {lines}")
        if len(labels) > 1:
            errors.append(f"the same image has the labels {', '.join(map(str, labels))}: {lines}")
        if len(splits) == len(labels) == 1:
            notes.append(f"the same image is {len(entries)} times in {splits[0]}: {lines}")
    return errors, notes
