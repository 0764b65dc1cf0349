"""Images with one file an object: the authors' released lists, folders named by class id, class folders.

Every reader returns a `Source`. Images are not copied; each is named by its real path, with links resolved."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.images import existing_folders, image_files, images_below
from common.runtime import UserError
from dataset import GROUPS, read_list
from recognition.published import FGSC23


@dataclass
class Source:
    """The images of a data set.

    classes: names in id order. train, test: [(item, label)]; an item is the path of an image, or a `chips.Chip`
    still to be cut; test is None where the source has one part, to be divided. published: an entry of published.py.
    notes: sentences for the user."""

    classes: list[str]
    train: list[tuple[Any, int]]
    test: list[tuple[Any, int]] | None
    published: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


def subfolders(folder: str | Path) -> list[Path]:
    """The folders in `folder` except hidden ones, in arbitrary order."""
    return [path for path in Path(folder).iterdir() if path.is_dir() and not path.name.startswith(".")]


def _images_of_class(folder: Path, label: int) -> list[tuple[str, int]]:
    """[(path, label)] of the images in a class folder and its subfolders."""
    return [(os.path.realpath(image), label) for image in images_below(folder)[0]]


def _unusual_files(class_folders: Iterable[Path]) -> list[str]:
    """One sentence on images in subfolders of class folders, and one on files that are no images."""
    nested, others = [], []
    for folder in class_folders:
        images, no_images = images_below(folder)
        nested += [image for image in images if image.parent != folder]
        others += no_images
    kinds = Counter(path.suffix.lower() or "no suffix" for path in others).most_common()
    notes = []
    if nested:
        notes.append(f"images in subfolders of class folders are images of the class: {len(nested)}, the first "
                     f"{nested[0]}")
    if others:
        notes.append(f"files left out, as Pillow reads no images of their suffix: {len(others)} "
                     f"({', '.join(f'{suffix} {count}' for suffix, count in kinds)}), the first {others[0]}")
    return notes


# ---- released layout -------------------------------------------------------------------------------------------------


def find_released_lists(sources: list[Path], published: dict[str, Any], prefix: str,
                        folder: str) -> dict[str, list[Path]] | None:
    """{"train": [lists], "test": [lists]} of the authors' layout, or None where no source holds such a list.

    prefix, folder: `FG`, `FGSC` or `DOTA`, `DOTA`. The undivided list is preferred to the three of head, middle and
    tail. Raises UserError where only some of the three exist, or a split has none."""
    places = [source / place for source in sources for place in (f"anno/{folder}", "anno", folder, ".")]
    released = {}
    for split in ("train", "test"):
        names = [f"{prefix}_{split}{part}.txt" for part in ("", 1, 2, 3)]
        lists = [next((place / name for place in places if (place / name).is_file()), None) for name in names]
        released[split] = lists[:1] if lists[0] else lists[1:]
    if not any(any(lists) for lists in released.values()):
        return None
    for split, lists in released.items():
        if None in lists:
            raise UserError(f"{sources[0]}: {published['name']} needs {prefix}_{split}.txt, or all three of "
                            f"{prefix}_{split}1.txt, 2 and 3, in anno/{folder}/")
    return released


def read_released(sources: Iterable[str | Path], published: dict[str, Any], prefix: str, folder: str) -> Source | None:
    """The authors' layout: lists of `name.jpg label` and images in undivided or numbered folders (1, 2, 3 = head,
    middle, tail; 4 = all). Lists and images may be in different sources. None where there are no such lists."""
    sources = existing_folders(sources)
    lists = find_released_lists(sources, published, prefix, folder)
    if lists is None:
        return None
    parts = {}
    for split, files in lists.items():
        bases = [source / place for source in sources
                 for place in (f"{folder}/{split}", f"{folder}/{folder}_{split}", f"{folder}_{split}", split)]
        folder_of = {}
        for place in [base / part for part in ("", "4", "1", "2", "3") for base in bases]:
            for name in image_files(place) if place.is_dir() else ():
                folder_of.setdefault(name, place)
        parts[split] = []
        for sample in (sample for file in files for sample in read_list(file, len(published["classes"]))):
            if sample.path not in folder_of:
                raise UserError(f"{sample.where}: image {sample.path} is in none of the folders {folder}/{split}/, "
                                f"{folder}/{folder}_{split}/, {split}/ (or 1, 2, 3, 4 in them) of the sources given")
            parts[split].append((os.path.realpath(folder_of[sample.path] / sample.path), sample.label))
    return Source(published["classes"], parts["train"], parts["test"], published)


# ---- FGSC-23 ---------------------------------------------------------------------------------------------------------


def read_fgsc23(sources: Sequence[str | Path]) -> Source:
    """FGSC-23: the released layout, or `train/<id>/` and `test/<id>/`. Raises UserError for other folder names."""
    released = read_released(sources, FGSC23, "FG", "FGSC")
    if released:
        return released
    parts, class_folders = {}, []
    for split in ("train", "test"):
        folders = [Path(source) / split for source in sources if (Path(source) / split).is_dir()]
        if not folders:
            raise UserError(f"{sources[0]}: found neither lists (anno/FGSC/FG_{split}.txt) nor a folder {split}/ with "
                            "one folder a class id")
        parts[split] = []
        for class_folder in sorted((path for folder in folders for path in subfolders(folder)), key=_class_id):
            parts[split] += _images_of_class(class_folder, _class_id(class_folder))
            class_folders.append(class_folder)
        if not parts[split]:
            raise UserError(f"{folders[0]}: no images; expected folders 0 to 22, named by class id, with images")
    return Source(FGSC23["classes"], parts["train"], parts["test"], FGSC23, _unusual_files(class_folders))


def _class_id(folder: Path) -> int:
    """The class id in the name of a folder of FGSC-23."""
    last = len(FGSC23["classes"]) - 1
    if not (re.fullmatch("[0-9]{1,4}", folder.name) and int(folder.name) <= last):
        raise UserError(f"{folder}: expected folders named by class id, 0 to {last}")
    return int(folder.name)


def published_deviations(source: Source) -> list[str]:
    """One sentence for each count that differs from the published one, which is no error."""
    deviations = []
    for split, samples in (("train", source.train), ("test", source.test)):
        counts = [0] * len(source.classes)
        for _, label in samples:
            counts[label] += 1
        rows = zip(source.classes, counts, source.published.get(split, ()), strict=False)
        if f"{split}_by_group" in source.published:
            groups = source.published["groups"]
            rows = [(f"{group} (together)", sum(counts[c] for c in groups[group]),
                     source.published[f"{split}_by_group"][group]) for group in GROUPS]
        deviations += [f"{split}: {name}: found {count} images, published {published}"
                       for name, count, published in rows if count != published]
    return deviations


# ---- class folders ---------------------------------------------------------------------------------------------------


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key that puts "10" after "9"."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part.casefold()) for part in re.split(r"(\d+)", name)
            if part], name


def class_names(folders: list[str]) -> tuple[list[str], list[str]]:
    """Folder names -> (folder names in class order, class names).

    Where every name is an id and a word ("07_tug", "7-tug") and the ids are 0, 1, 2, ... or 1, 2, 3, ..., they order
    the classes and are left out of their names, unless two names would then be equal. Other numbers ("737 MAX",
    "0-10 m", "2 lanes") are parts of the names. Spaces around a name are left out. Raises UserError where two folders
    differ in such spaces alone."""
    ordered = sorted(folders, key=lambda folder: natural_key(folder.strip()))
    stripped = [folder.strip() for folder in ordered]
    alike = [name for name, count in Counter(stripped).items() if count > 1]
    if alike:
        raise UserError(f"class folders that differ only in spaces around their name: {alike[0]!r}; rename one")
    numbered = [match for match in (re.fullmatch(r"(\d+) ?[-_.]+ ?([^\W\d].*)", name) for name in stripped) if match]
    ids, names = [int(match[1]) for match in numbered], [match[2] for match in numbered]
    consecutive = ids and ids[0] in (0, 1) and ids == list(range(ids[0], ids[0] + len(ordered)))
    return ordered, names if consecutive and len(set(names)) == len(names) else stripped


def read_folders(path: str | Path) -> Source:
    """`train/` and `test/` with one folder a class, or one folder of class folders, to be divided."""
    root, = existing_folders([path])
    names = {folder.name for folder in subfolders(root)}
    nested = {name for name in ("train", "test") if name in names and subfolders(root / name)}
    notes = []
    if len(nested) == 1:
        here, = nested
        missing = "test" if here == "train" else "train"
        raise UserError(f"{root}: has class folders in {here}/ but none in {missing}/; add them, or give {root / here} "
                        "as the source to divide it")
    if nested and (root / "val").is_dir():
        notes.append("val/ is not used: the validation part is held out of train/ (see --val-fraction)")
    roots = [root / "train", root / "test"] if nested else [root]
    folders, classes = class_names([folder.name for folder in subfolders(roots[0])])
    renamed = [f"{folder!r} is {name!r}" for folder, name in zip(folders, classes, strict=True) if folder != name]
    if renamed:
        notes.append(f"ids and outer spaces of folders are not parts of the class names: {', '.join(renamed)}")
    if not folders:
        raise UserError(f"{root}: no class folders here; expected one folder of images a class")
    if len(folders) == 1:
        raise UserError(f"{roots[0]}: {folders[0]!r} is the only class folder here; expected two or more; if the "
                        f"classes are folders in it, give {roots[0] / folders[0]}")
    for other in roots[1:]:
        unmatched = {folder.name for folder in subfolders(other)} - set(folders)
        if unmatched:
            raise UserError(f"{root}: class folder {min(unmatched)} is in test/ and not in train/; expected it in both")
    parts = []
    for part in roots:
        samples = []
        for label, name in enumerate(folders):
            images = _images_of_class(part / name, label) if (part / name).is_dir() else []
            if not images and part == roots[0]:
                raise UserError(f"{part / name}: no images in this class folder; expected files that Pillow reads, "
                                "known by their suffixes (.jpg, .png, .tif, ...)")
            if not images:
                notes.append(f"class {classes[label]} has no test images: its accuracy will be unknown")
            samples += images
        parts.append(samples)
    notes += _unusual_files(folder for part in roots for folder in sorted(subfolders(part)))
    return Source(classes, parts[0], parts[1] if nested else None, notes=notes)
