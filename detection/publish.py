"""A trained detector as a small checkpoint to publish: weights and description alone.

    python -m detection.publish --weights runs/mine/ld/final.pt
    python -m detection.publish --weights runs/mine/ld/last.pt --output published/

Writes NAME-12345678.pt, with the first digits of the file's SHA-256 in its name. It has neither optimizer nor paths of
yours, and does all that the checkpoint does but go on with training."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.files import publish_checkpoint
from common.runtime import run_script
from detection.checkpoint import load_detector


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="checkpoint of a detector")
    parser.add_argument("--output", metavar="FOLDER", help="where to write (default: beside the weights)")
    args = parser.parse_args(argv)
    weights = Path(args.weights)
    publish_checkpoint(*load_detector(weights), Path(args.output or weights.parent), weights.stem)


if __name__ == "__main__":
    run_script(main)
