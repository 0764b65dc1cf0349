"""Test a detector: AP on annotated images, tables and pictures.

    python -m detection.test --weights runs/mine/ld/final.pt --test data/mine/test.json
    python -m detection.test --weights FILE --test VOC2007/ImageSets/Main/test.txt --metric voc07
    python -m detection.test --weights FILE --suppression cluster-diou-voting --output runs/mine/test_voting
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from common.flags import add_flags
from common.runtime import resolve_device, run_script, seed_everything, start_processes
from detection.evaluation import test_only
from detection.settings import Settings, check_ranges, data_name

FLAGS = ("test", "images", "test_images", "metric", "suppression", "device", "precision", "workers")


def main(argv: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(flags, [field for field in dataclasses.fields(Settings) if field.name in FLAGS], Settings)
    flags.add_argument("--weights", required=True, help="checkpoint of a detector")
    flags.add_argument("--output", default=argparse.SUPPRESS, help="folder of the results (default: beside the "
                       "weights, test_ with their name and that of the folder that --test lies in)")
    settings = Settings(**vars(flags.parse_args(argv)))
    if settings.output == Settings.output:
        weights = Path(settings.weights)
        folder = weights.parent / f"test_{weights.stem}_{data_name(settings.test)}"
        settings = dataclasses.replace(settings, output=str(folder))
    check_ranges(settings)
    device = resolve_device(settings.device)
    start_processes(device)
    seed_everything(settings.seed)
    test_only(settings, device)


if __name__ == "__main__":
    run_script(main)
