"""Finished runs side by side: mean and standard deviation over the seeds of each row.

    python -m detection.compare alone=runs/mine/gfl_seed0,runs/mine/gfl_seed1 LD=runs/mine/ld_seed0,runs/mine/ld_seed1
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.files import read_json
from common.runtime import UserError, run_script
from detection.tables import comparison_table, with_suppression


def read_rows(rows: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """{name: [results]} of arguments NAME=FOLDER,FOLDER. Raises UserError for one of another form, for a folder without
    results, and for results that were not measured alike."""
    found = {}
    for row in rows:
        name, equals, folders = row.partition("=")
        if not equals or not name or name in found:
            raise UserError(f"{row}: expected NAME=FOLDER,FOLDER, with another name in each row")
        found[name] = [read_results(Path(folder) / "results.json") for folder in folders.split(",")]
    tests = {test_of(results): name for name, all_results in found.items() for results in all_results}
    if len(tests) > 1:
        raise UserError("the runs were not tested alike: " + "; ".join(
            f"{name} by {metric} with {suppression} on {images} images {digest}"
            for (metric, suppression, images, digest), name in tests.items()))
    return found


def test_of(results: dict[str, Any]) -> tuple[str, str, int, str]:
    """(metric, suppression, number of images, digest of images and boxes) of a test. Suppression auto is each
    detector's own. An older version did not record the digest."""
    return (results["metric"], results["settings"]["suppression"], results["images"], results.get("test_images", ""))


def read_results(path: Path) -> dict[str, Any]:
    """The results of a detector's test."""
    results = with_suppression(read_json(path))
    if not isinstance(results, dict) or not all(key in results for key in ("AP", "AP50", "AP75", "metric", "images")):
        raise UserError(f"{path}: not the results of a detector; expected what detection.test writes")
    return results


def main(argv: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("rows", nargs="+", metavar="NAME=FOLDER,FOLDER", help="a row of the table and its runs")
    print(comparison_table(read_rows(flags.parse_args(argv).rows)))


if __name__ == "__main__":
    run_script(main)
