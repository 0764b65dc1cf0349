"""DOTA's Task 1: the average precision of detections in files, this project's or any other's.

    python -m detection.evaluate_dota submission.zip DOTA/val/labelTxt --output runs/dota/evaluation
    python -m detection.evaluate_dota detections/ DOTA/val/labelTxt --images some.txt --output runs/dota/some

The detections are in files Task1_<class>.txt, with lines `image score x1 y1 x2 y2 x3 y3 x4 y4`."""

import argparse
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.dota import DotaObject, read_label_file
from common.files import list_lines, write_json
from common.images import existing_folders
from common.runtime import UserError, run_script
from detection.data.records import Annotations, Record
from detection.data.submissions import Detection, read_submission
from detection.metrics.dota_ap import dota_ap, released_mean
from detection.metrics.voc_ap import IOU_THRESHOLDS
from detection.tables import results_table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("detections", type=Path, help="a folder or a .zip with files Task1_<class>.txt")
    add("labels", type=Path, metavar="LABELTXT", help="the folder of the label files of whole images")
    add("--images", type=Path, metavar="LIST", help="evaluate the images that this file names, one a line (default: "
        "all that have a label file)")
    add("--output", type=Path, required=True, metavar="DIR", help="results.json is written here")
    args = parser.parse_args(argv)
    if (args.output / "settings.json").exists():
        raise UserError(f"{args.output}: holds a run of its own; give another --output")
    results = evaluate(args.detections, args.labels, args.images)
    print(results_table(results))
    write_json(args.output / "results.json", as_written(results))
    print(f"written: {args.output / 'results.json'}")


def evaluate(detections: Path, labels: Path, images: Path | None) -> dict[str, Any]:
    """What dota_ap.dota_ap returns of the files that the flags name. Raises UserError for a detection in an image that
    has no label file; detections in images that are not evaluated are left out."""
    files = {path.stem: path for path in sorted(existing_folders([labels])[0].glob("*.txt"))}
    names = list(files) if images is None else names_in(images, files)
    if not names:
        raise UserError(f"{labels}: no label file; expected a .txt an image")
    objects = {name: read_label_file(files[name]) for name in names}
    found = read_submission(detections)
    for own in found.values():
        for detection in own:
            if detection.image not in files:
                raise UserError(f"{detection.where}: image {detection.image[:80]!r} has no label file in {labels}")
    classes = sorted({item.name for own in objects.values() for item in own})
    for name in sorted(found.keys() ^ set(classes)):
        print(f"note: class {name} has no " + ("objects, and is left out" if name in found else "file of detections"))
    records = [_record(files[name], objects[name], classes) for name in names]
    return dota_ap(_by_image(found, names, classes), Annotations(classes, records, labels))


def names_in(path: Path, files: Iterable[str]) -> list[str]:
    """The names of images in a list, without their suffixes. Raises UserError for one without a label file."""
    names = {}
    for number, line in list_lines(path):
        name = Path(line).stem if line not in files else line
        if name not in files or name in names:
            raise UserError(f"{path}:{number}: image {line[:80]!r} " + ("is listed twice" if name in names else
                                                                       "has no label file"))
        names[name] = number
    return list(names)


def _record(path: Path, items: Sequence[DotaObject], classes: Sequence[str]) -> Record:
    """The ground truth of an image as its label file has it: points, not rectangles. The metric asks for no more."""
    return Record(path, 0, 0, np.array([item.points for item in items], dtype=np.float64).reshape(-1, 8),
                  np.array([classes.index(item.name) for item in items], dtype=np.int64),
                  np.array([item.difficult for item in items], dtype=bool), path.stem, np.zeros(len(items)))


def _by_image(found: dict[str, list[Detection]], names: Sequence[str], classes: Sequence[str]) -> list[dict[str, Any]]:
    """The detections of each of the images `names` as dota_ap takes them."""
    rows: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
    for label, name in enumerate(classes):
        for detection in found.get(name, ()):
            rows[detection.image].append((*np.ravel(detection.points), detection.score, label))
    tables = (np.array(rows[name], dtype=np.float64).reshape(-1, 10) for name in names)
    return [{"boxes": table[:, :8], "scores": table[:, 8], "labels": table[:, 9].astype(np.int64)} for table in tables]


def as_written(results: dict[str, Any]) -> dict[str, Any]:
    """The results.json of an evaluation: fractions, {"0.50": AP, ...} at each IoU threshold; null where a class has no
    objects. mAP_50_95_released: see dota_ap.released_mean."""
    classes = [row for row in results["per_class"] if row["per_iou"]]
    released = released_mean(results["per_iou"], len(classes)) if classes else None
    return {"metric": results["metric"], "images": results["images"],
            "per_class": [{"name": row["name"], "objects": row["objects"], "AP": _by_threshold(row["per_iou"])}
                          for row in results["per_class"]],
            "mAP": _by_threshold(results["per_iou"]), "mAP_50_95": results["AP"], "mAP_50_95_released": released}


def _by_threshold(values: Sequence[float] | None) -> dict[str, float] | None:
    return values and {f"{threshold:.2f}": value for threshold, value in zip(IOU_THRESHOLDS, values, strict=True)}


if __name__ == "__main__":
    run_script(main)
