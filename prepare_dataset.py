"""Make a data set (dataset.json, train.txt, val.txt, test.txt) of images on disk, or check one.

    python prepare_dataset.py fgsc23 FGSC-23/ data/FGSC-23             # released lists, or train/<id>/ and test/<id>/
    python prepare_dataset.py fgsc23 T2FTS/ images/ data/FGSC-23       # lists and images distributed apart
    python prepare_dataset.py dota DOTA/train DOTA/val data/DOTA       # DOTA v1.0; its val part becomes the test part
    python prepare_dataset.py coco train.json test.json data/nwpu --imbalance 40 --max-per-class 400
    python prepare_dataset.py folders UCMerced/ data/ucm --imbalance 20
    python prepare_dataset.py check data/DOTA

Images with one file an object are not copied: the data set refers to them. Objects of DOTA and COCO are cut out as grey
PNGs into DESTINATION/images/."""

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.charts import optional_picture
from common.images import ValueRange, low_and_high, value_range_of, value_range_text
from common.runtime import UserError, run_script
from dataset import GROUPS, SPLITS, DatasetInfo, class_counts, read_info, read_split, write_dataset
from preparation.check import check_dataset, print_table
from preparation.chips import cut_chips, read_coco, read_dota
from preparation.division import choose, groups_by_thirds, groups_by_threshold, held_out_counts, long_tail_counts
from preparation.sources import Source, published_deviations, read_fgsc23, read_folders
from recognition.report import draw_class_counts

Samples = list[tuple[Any, int]]  # (image or Chip, label)

# Edit here, or give the flag of the same name.
IMBALANCE = None  # cut train to an exponential long tail whose largest class has this many times the smallest
MAX_PER_CLASS = None  # training images a class at most
VAL_FRACTION = 0.1  # part of each training class that is held out to choose the best epoch on
TEST_FRACTION = 0.2  # part of each class for the test part, where the source has none
HEAD_MIN = None  # training images from which a class is head; None: the published groups, else thirds by rank
TAIL_MAX = None  # training images up to which a class is tail
MARGIN = 0.1  # dota, coco: a chip's edges are this much longer than those of its object's box
VALUE_RANGE = None  # of images of more than 8 bits, the values that become 0 and 255; None: the lowest and the highest
SEED = 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("kind", choices=("fgsc23", "dota", "coco", "folders", "check"), help="kind of the sources, or `check`")
    add("paths", nargs="+", type=Path, metavar="SOURCE... DESTINATION",
        help="sources of images and annotations, and the folder to make; for `check` the data set")
    add("--imbalance", type=float, default=IMBALANCE, metavar="F", help="cut the train classes, ranked by count, to an "
        "exponential profile whose largest class is F times its smallest")
    add("--max-per-class", type=int, default=MAX_PER_CLASS, metavar="N", help="train images a class at most")
    add("--val-fraction", type=float, default=VAL_FRACTION, metavar="F", help="part of each train class that is held "
        "out for validation, at least one image and never all; 0 for none (default %(default)s)")
    add("--test-fraction", type=float, metavar="F", help="part of each class for the test part, where the source "
        f"has none (default {TEST_FRACTION})")
    add("--head-min", type=int, default=HEAD_MIN, metavar="N", help="head classes have N training images or more "
        "(with --tail-max)")
    add("--tail-max", type=int, default=TAIL_MAX, metavar="N", help="tail classes have N training images or fewer "
        "(with --head-min)")
    add("--margin", type=float, metavar="F", help="dota, coco: a chip's edges are 1 + F times those of the object's "
        f"box, half of it on each side (default {MARGIN})")
    add("--images", type=Path, metavar="DIR", help="coco: folder of the images, if they are not beside the JSON file")
    add("--value-range", type=low_and_high, default=VALUE_RANGE, metavar="LOW,HIGH", help="of images of more than 8 "
        "bits, the pixel values that become black and white (default: the lowest and the highest of all images)")
    add("--processes", type=int, metavar="N", help="number of decoding processes (default: one a core). Each holds one "
        "whole image in memory: up to 1.6 GB for the largest of DOTA")
    add("--seed", type=int, default=SEED, metavar="N", help="seed of all random choices (default %(default)s)")
    return parser.parse_intermixed_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UserError for a value out of its range, or a flag that this kind does not use."""
    if len(args.paths) < 2 and args.kind != "check":
        raise UserError(f"{args.kind}: expected SOURCE... DESTINATION, found only {args.paths[0]}")
    if len(args.paths) > {"check": 1, "folders": 2}.get(args.kind, len(args.paths)):
        expected = "DATASET" if args.kind == "check" else "SOURCE DESTINATION"
        raise UserError(f"{args.kind}: expected {expected}, found {len(args.paths)} paths")
    for flag, value, fits, expected in (
            ("--imbalance", args.imbalance, lambda v: 1 <= v < float("inf"), "a number of at least 1"),
            ("--max-per-class", args.max_per_class, lambda v: v >= 1, "at least 1"),
            ("--val-fraction", args.val_fraction, lambda v: 0 <= v < 1, "at least 0 and less than 1"),
            ("--test-fraction", args.test_fraction, lambda v: 0 < v < 1, "more than 0 and less than 1"),
            ("--margin", args.margin, lambda v: 0 <= v <= 10, "0 to 10"),
            ("--processes", args.processes, lambda v: v >= 1, "at least 1"),
            ("--seed", args.seed, lambda v: 0 <= v < 2**32, f"0 to {2**32 - 1}")):
        if value is not None and not fits(value):
            raise UserError(f"{flag} {value}: expected {expected}")
    if (args.head_min is None) != (args.tail_max is None):
        raise UserError("--head-min and --tail-max: give both, or neither")
    if args.head_min is not None and args.tail_max >= args.head_min:
        raise UserError(f"--tail-max {args.tail_max}: expected less than --head-min {args.head_min}")
    if args.margin is not None and args.kind not in ("dota", "coco"):
        raise UserError(f"--margin: only for dota and coco, where objects are cut out; not for {args.kind}")
    if args.images is not None and args.kind != "coco":
        raise UserError(f"--images: only for coco, not for {args.kind}")


def check_destination(destination: Path) -> None:
    """Raise UserError where `destination` holds a file that this script would write."""
    if destination.exists() and not destination.is_dir():
        raise UserError(f"{destination}: is a file; expected a folder to make")
    for name in ("dataset.json", *(f"{split}.txt" for split in SPLITS)):
        if (destination / name).exists():
            raise UserError(f"{destination}: holds a {name} already; remove it or give another destination")


def read_source(args: argparse.Namespace) -> Source:
    """The Source that the arguments name, of any kind."""
    *paths, _ = args.paths
    margin = MARGIN if args.margin is None else args.margin
    try:
        if args.kind == "fgsc23":
            return read_fgsc23(paths)
        if args.kind == "dota":
            return read_dota(paths, margin)
        if args.kind == "coco":
            return read_coco(paths, margin, args.images)
        return read_folders(paths[0])
    except OSError as error:
        raise UserError(f"{error.filename or paths[0]}: could not be read ({error.strerror or error})") from None


def hold_out(samples: Samples, fraction: float, num_classes: int,
             generator: np.random.Generator) -> tuple[Samples, Samples]:
    """Divide [(item, label)] by class into (kept, held out), both in the order of `samples`."""
    labels = [label for _, label in samples]
    held = set(choose(labels, held_out_counts(class_counts(labels, num_classes), fraction), generator).tolist())
    return ([sample for i, sample in enumerate(samples) if i not in held],
            [sample for i, sample in enumerate(samples) if i in held])


def divide(source: Source, args: argparse.Namespace) -> tuple[dict[str, Samples], np.ndarray, list[str]]:
    """{"train": ..., "val": ..., "test": ...} of [(item, label)], the long-tailed train counts, and notes."""
    notes, train, test, classes = list(source.notes), source.train, source.test, len(source.classes)
    # One generator for each choice: another --imbalance does not change the test part.
    generators = [np.random.default_rng([args.seed, purpose]) for purpose in range(3)]
    if test is None:
        train, test = hold_out(train, args.test_fraction or TEST_FRACTION, classes, generators[0])
        if args.kind in ("dota", "coco"):
            notes.append("divided by object: chips of one image lie in both the train and the test part")
    elif args.test_fraction is not None:
        notes.append("--test-fraction has no effect: the source has a test part")
    if not train or not test:
        raise UserError(f"{args.paths[0]}: no {'test' if train else 'training'} images; expected two or more a class")
    available = class_counts([label for _, label in train], classes)
    counts = long_tail_counts(available, args.imbalance, args.max_per_class)
    train = [train[i] for i in choose([label for _, label in train], counts, generators[1])]
    present = counts[counts > 0]
    if args.imbalance and len(present) > 1 and not 0.9 < present.max() / present.min() / args.imbalance < 1.1:
        notes.append(f"the imbalance reached is {present.max() / present.min():.3g}, not {args.imbalance:g}: counts "
                     "are whole numbers and no class can keep more images than it has")
    kept, val = hold_out(train, args.val_fraction, classes, generators[2])
    notes += [f"class {c} ({name}) has one training image: none of it is held out"
              for c, name in enumerate(source.classes) if counts[c] == 1 and args.val_fraction]
    return {"train": kept, "val": val, "test": test}, counts, notes


def make_groups(source: Source, counts: np.ndarray, args: argparse.Namespace) -> tuple[dict[str, list[int]], str]:
    """({"head": ids, "middle": ids, "tail": ids}, human-readable rule), by training counts before val is held out."""
    if args.head_min is not None:
        rule = (f"head has at least {args.head_min} training images (train and val together), tail at most "
                f"{args.tail_max}")
        return groups_by_threshold(counts, args.head_min, args.tail_max), rule
    if source.published and not args.imbalance:
        return source.published["groups"], "the sets that the paper publishes"
    return groups_by_thirds(counts)


def group_notes(groups: dict[str, list[int]], rule: str, lists: dict[str, Samples],
                args: argparse.Namespace) -> list[str]:
    """Sentences on groups that a stage of training cannot use, with the remedy."""
    notes, held_out = [], {label for _, label in lists["val"]}
    for group in GROUPS:
        if not groups[group]:
            notes.append(f"group {group} is empty ({rule}), so its teacher has nothing to learn: give --head-min and "
                         "--tail-max")
        elif args.val_fraction and held_out.isdisjoint(groups[group]):
            notes.append(f"no image of group {group} is held out to choose the best epoch on: train with --select test")
    return notes


def relative_paths(lists: dict[str, Samples]) -> tuple[Path, dict[str, Samples]]:
    """Absolute image paths -> (their common folder, the lists with paths relative to it)."""
    folders = {os.path.dirname(path) for samples in lists.values() for path, _ in samples}
    common = os.path.commonpath(folders)

    def in_list(path: str) -> str:
        relative = Path(os.path.relpath(path, common)).as_posix()
        return f"./{relative}" if relative.startswith(" ") else relative  # a space that begins a line is no part of it

    return Path(common), {split: [(in_list(path), label) for path, label in samples]
                          for split, samples in lists.items()}


def check_readable(destination: Path, lists: dict[str, Samples]) -> None:
    """Raise UserError where a data set that was written is not read as it was meant: a name that no list can hold."""
    info = read_info(destination)
    for split in SPLITS:
        for sample, (path, _) in zip(read_split(info, split), lists[split], strict=True):
            if sample.path != path:
                raise UserError(f"{sample.where}: the image {path!r} would be looked for as {sample.path!r}; rename it")


def write(destination: Path, source: Source, lists: dict[str, Samples], groups: dict[str, list[int]], rule: str,
          value_range: ValueRange | None, args: argparse.Namespace) -> tuple[DatasetInfo, dict[str, Samples]]:
    """Cut the chips, if there are any, and write the data set. After a failure nothing of it is left."""
    images, existed = destination / "images", destination.exists()
    has_chips = not isinstance(lists["train"][0][0], str)
    if has_chips and images.exists():
        raise UserError(f"{images}: exists already; remove it or give another destination")
    try:
        if has_chips:
            # Validation chips are in the folder of train, of which they are a part.
            folder_of = {"train": "train", "val": "train", "test": "test"}
            chips = [(f"{folder_of[split]}/{chip.name}", chip) for split in SPLITS for chip, _ in lists[split]]
            cut_chips(chips, images, args.processes, value_range)
            lists = {split: [(f"{folder_of[split]}/{chip.name}", label) for chip, label in samples]
                     for split, samples in lists.items()}
        else:
            images, lists = relative_paths(lists)
        unwritable = [path for samples in lists.values() for path, _ in samples if not path.isprintable()]
        if unwritable:
            raise UserError(f"{images}: {unwritable[0]!a}: unprintable characters cannot stand in a list; rename it")
        genuine = source.published and source.test and not (args.imbalance or args.max_per_class)
        name = source.published["name"] if genuine else destination.resolve().name
        elsewhere = ("paths", "images", "processes", "value_range")
        settings = {key: value for key, value in vars(args).items() if key not in elsewhere}
        settings["sources"] = [str(path) for path in args.paths[:-1]]
        info = DatasetInfo(destination, name, source.classes, groups, rule, images, value_range)
        write_dataset(info, lists, {"command": "prepare_dataset.py", **settings})
        check_readable(destination, lists)
    except BaseException as error:
        if has_chips:
            shutil.rmtree(destination / "images", ignore_errors=True)
        for split in SPLITS:
            (destination / f"{split}.txt").unlink(missing_ok=True)
        (destination / "dataset.json").unlink(missing_ok=True)
        if not existed:
            shutil.rmtree(destination, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{destination}: could not be written ({error.strerror or error})") from None
        raise
    return info, lists


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    check_arguments(args)
    if args.kind == "check":
        return check_dataset(args.paths[0], args.processes)
    destination = args.paths[-1]
    check_destination(destination)
    source = read_source(args)
    lists, counts, notes = divide(source, args)
    if source.published and source.test:
        notes += published_deviations(source)
    groups, rule = make_groups(source, counts, args)
    notes += group_notes(groups, rule, lists, args)
    files = sorted({item if isinstance(item, str) else item.image for samples in lists.values() for item, _ in samples})
    value_range = value_range_of(files, args.value_range, args.processes)
    if value_range:
        notes.append(value_range_text(value_range))
    info, lists = write(destination, source, lists, groups, rule, value_range, args)
    counts = print_table(info, {split: [label for _, label in samples] for split, samples in lists.items()})
    with optional_picture(destination / "class_counts.png") as path:
        draw_class_counts(info, counts, path)
    for note in notes:
        print(f"note: {note}")
    print(f"{destination}: {info.name} is ready; its long tail: {destination / 'class_counts.png'}")
    return 0


if __name__ == "__main__":
    run_script(main)
