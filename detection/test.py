"""Test a detector: AP on annotated images, tables and pictures.

    python -m detection.test --weights runs/mine/ld/final.pt --test data/mine/test.json
    python -m detection.test --weights FILE --test VOC2007/ImageSets/Main/test.txt --metric voc07
    python -m detection.test --weights FILE --suppression cluster-diou-voting --output runs/mine/test_voting
"""

import argparse
import dataclasses
from pathlib import Path

from detection.evaluation import test_only
from detection.settings import Settings
from flags import add_flags
from runtime import resolve_device, run_script, seed_everything, start_processes

FLAGS = ("weights", "test", "images", "output", "metric", "suppression", "device", "precision", "workers")


def main(argv=None):
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(flags, [field for field in dataclasses.fields(Settings) if field.name in FLAGS])
    given = vars(flags.parse_args(argv))
    if "weights" not in given:
        flags.error("--weights: expected the checkpoint to test")
    weights = Path(given["weights"]).resolve()  # .../ld/final.pt is tested into .../test_ld_final
    given.setdefault("output", str(weights.parent.parent / f"test_{weights.parent.name}_{weights.stem}"))
    settings = Settings(**given)
    device = resolve_device(settings.device)
    start_processes(device)
    seed_everything(settings.seed)
    test_only(settings, device)


if __name__ == "__main__":
    run_script(main)
