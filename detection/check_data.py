"""Check the annotations and images of a detector, and count them.

    python -m detection.check_data instances_train2017.json instances_val2017.json
    python -m detection.check_data VOC2007/ImageSets/Main/trainval.txt VOC2007/ImageSets/Main/test.txt
    python -m detection.check_data train.json test.json --images train_images --test-images test_images
    python -m detection.check_data DOTA/train DOTA/val --oriented

Every image is decoded once. Errors make training, or numbers measured on these images, wrong (exit status 1); notes
are worth knowing. The classes of the first source are expected in the others; sources of one
training set may be joined by commas."""

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.files import sha256_of
from common.runtime import UserError, run_script
from common.text import print_findings
from common.workers import in_processes
from detection.data.annotations import for_training, read_annotations
from detection.data.batches import read_image
from detection.data.records import Annotations, Findings, Record

MEDIUM, LARGE = 32**2, 96**2  # COCO's limits: the areas in square pixels at which an object is medium, large


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="a COCO file (.json), an image set of Pascal VOC (.txt) or a "
        "folder of DOTA: that of training first, then those of testing")
    add("--oriented", action="store_true", help="check the oriented boxes of DOTA's points and COCO's polygons")
    add("--images", metavar="FOLDER", help="where the images lie, if not beside a COCO file (in images/ or with it), "
        "in COCO's own layout (annotations/instances_train2017.json, train2017/) or in JPEGImages/")
    add("--test-images", metavar="FOLDER", help="those of every source but the first, if in another folder")
    add("--processes", type=int, metavar="N", help="how many processes decode; default one a core")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print tables and findings. Returns 1 where there are errors, else 0."""
    args = parse_arguments(argv)
    errors, notes, parts, classes = [], [], [], None
    for source in args.sources:
        findings, images = Findings([], []), args.test_images or args.images if parts else args.images
        parts.append(read_annotations(source, images, classes, findings, args.oriented))
        classes = parts[0].classes
        print_table(source, parts[-1])
        errors += findings.errors
        notes += some(findings.clipped, f"{source}: boxes that reach outside their image")
    for source, part in zip(args.sources, parts, strict=True):
        notes += notes_of(source, part)
        if not any(len(record.labels) for record in for_training(part).records):
            errors.append(f"{source}: no object that could be trained on")
    contents, image_errors = read_images(parts, args.processes)
    leaks, copies = same_images(args.sources, parts, contents)
    errors += image_errors + leaks
    notes += copies
    return print_findings(errors, notes, ": not fit for training and testing" if errors else
                          ": fit for training and testing")


def print_table(source: str, part: Annotations) -> None:
    """Print one line a class: its objects, the images with one, and how many are difficult, small, medium, large."""
    labels, areas, difficult = (np.concatenate([getattr(record, name) for record in part.records] or [np.zeros(0)])
                                for name in ("labels", "areas", "difficult"))  # (objects,)
    images = Counter(label for record in part.records for label in set(record.labels.tolist()))
    width = max(len("all classes"), *(len(name) for name in part.classes))
    columns = ("objects", "images", "difficult", "small", "medium", "large")
    print(f"{source}\n{'id':>4}  {'class':{width}} " + " ".join(f"{name:>9}" for name in columns))
    with_objects = sum(len(record.labels) > 0 for record in part.records)
    rows = [(label, name, labels == label, images[label]) for label, name in enumerate(part.classes)]
    for label, name, own, count in (*rows, ("", "all classes", labels >= 0, with_objects)):
        size = areas[own]
        counts = (own.sum(), count, difficult[own].sum(), (size < MEDIUM).sum(),
                  ((size >= MEDIUM) & (size < LARGE)).sum(), (size >= LARGE).sum())
        print(f"{label:4}  {name:{width}} " + " ".join(f"{int(value):9}" for value in counts))
    print(f"{len(part.records)} images, {len(part.records) - with_objects} of them without objects\n")


# ---- findings --------------------------------------------------------------------------------------------------------


def some(found: Sequence[Any], what: str) -> list[str]:
    """One sentence that counts `found` and shows the first; none where there is nothing."""
    return [f"{what}: {len(found)}, the first: {found[0]}"] if found else []


def notes_of(source: str, part: Annotations) -> list[str]:
    """Sentences about one source: what will not be trained on, classes without objects, boxes given twice."""
    trained = for_training(part)
    kept = {record.path: len(record.labels) for record in trained.records}
    dropped = [f"{record.path}: {len(record.labels) - kept[record.path]}" for record in part.records
               if record.path in kept and kept[record.path] < len(record.labels)]
    small = [str(record.path) for record in part.records if record.path not in kept]
    boxes = [f"{record.path}: {part.classes[label]} {list(box)}" for record in part.records
             for label, box in repeated(record)]
    empty = [str(record.path) for record in part.records if not len(record.labels)]
    present = {label for record in part.records for label in record.labels.tolist()}
    absent = [name for label, name in enumerate(part.classes) if label not in present]
    return [*some(boxes, f"{source}: boxes that are there more than once"),
            *some(dropped, f"{source}: images with objects not trained on (difficult, or too small)"),
            *some(empty, f"{source}: images without objects, trained on as background"),
            *some(small, f"{source}: images with a side below 32 pixels, not trained on"),
            *some(absent, f"{source}: classes without objects")]


def repeated(record: Record) -> list[tuple[int, tuple[float, ...]]]:
    """[(label, (x1, y1, x2, y2))] of the objects that are there more than once."""
    counts = Counter(zip(record.labels.tolist(), map(tuple, record.boxes.tolist()), strict=True))
    return [found for found, times in counts.items() if times > 1]


def read_images(parts: Iterable[Annotations], processes: int | None) -> tuple[dict[Path, str], list[str]]:
    """Decode every image. Returns ({path: SHA-256 of its file}, [errors])."""
    records = list({record.path: record for part in parts for record in part.records}.values())
    jobs, contents, errors = [records[start:start + 64] for start in range(0, len(records), 64)], {}, []
    with tqdm(total=len(records), desc="reading images", unit="image", disable=None) as bar:
        for results in in_processes(_read, jobs, processes):
            for path, digest, error in results:
                if error:
                    errors.append(error)
                else:
                    contents[path] = digest
            bar.update(len(results))
    return contents, errors


def _read(records: Iterable[Record]) -> list[tuple[Path, str | None, str | None]]:
    """[(path, digest or None, what is wrong or None)]."""
    results = []
    for record in records:
        try:
            read_image(record)
            results.append((record.path, sha256_of(record.path), None))
        except (UserError, OSError) as error:
            results.append((record.path, None, str(error)))
    return results


def same_images(sources: Sequence[str], parts: Sequence[Annotations],
                contents: dict[Path, str]) -> tuple[list[str], list[str]]:
    """(errors, notes): the same bytes in several sources, or under several names in one."""
    places = {}
    for number, part in enumerate(parts):
        for record in part.records:
            if record.path in contents:
                places.setdefault(contents[record.path], []).append((number, record.path))
    errors, notes = [], []
    for found in (found for found in places.values() if len(found) > 1):
        shown = "; ".join(f"{path} ({sources[number]})" for number, path in found[:4])
        among = len({number for number, _ in found})
        if among > 1:
            errors.append(f"the same image is in {among} sources, so that what is tested was trained on: {shown}")
        else:
            notes.append(f"the same image is {len(found)} times in {sources[found[0][0]]}: {shown}")
    return errors, notes


if __name__ == "__main__":
    run_script(main)
