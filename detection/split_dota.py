"""Cut the large images of DOTA into windows with label files of their own.

    python -m detection.split_dota DOTA/train DOTA/val data/dota/trainval
    python -m detection.split_dota DOTA/train data/dota/train --scales 0.5,1.0,1.5 --gap 500
    python -m detection.split_dota DOTA/val data/dota/val --keep-empty

A window keeps an object that at least 70 per cent of lie in it, with its own points. Windows without objects are left
out, but for tests, where detections in them are false ones: --keep-empty. What is there already is not cut again."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from common.dota import find_dota_files, read_label_file
from common.files import atomic_path, read_json, remove_partials, write_json
from common.images import (
    ValueRange,
    decode,
    existing_folders,
    image_size,
    low_and_high,
    unreadable,
    value_range_of,
    value_range_text,
)
from common.runtime import UserError, run_script
from common.text import counted
from common.workers import in_processes
from detection.data.dota_files import SPLIT
from detection.data.dota_windows import Window, plan_windows, window_labels


class Job(NamedTuple):
    """An image to be cut into a folder; side, overlap and scales as plan_windows takes them, value_range as
    common.images.decode does."""

    image: Path
    labels: Path
    folder: Path
    side: int
    overlap: int
    scales: tuple[float, ...]
    keep_empty: bool
    value_range: ValueRange | None


class Cut(NamedTuple):
    """What became of an image. windows: how many it has. objects: how many labels they have together. lost: places
    (file:line) of objects that no window has."""

    windows: int
    objects: int
    lost: list[str]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("sources", nargs="+", type=Path, metavar="SOURCE", help="a folder with images/ and labelTxt/")
    add("destination", type=Path, metavar="DESTINATION", help="the folder that gets images/ and labelTxt/ of windows")
    add("--size", type=int, default=1024, metavar="PIXELS", help="side of a window")
    add("--gap", type=int, default=200, metavar="PIXELS", help="by which neighbouring windows overlap")
    add("--scales", type=scales, default=(1.0,), metavar="LIST", help="images are scaled by each of these first: 1.0, "
        "or several as 0.5,1.0,1.5")
    add("--keep-empty", action="store_true", help="write windows without objects, too")
    add("--value-range", type=low_and_high, metavar="LOW,HIGH", help="of images of more than 8 bits, the values that "
        "become 0 and 255 (default: the lowest and the highest of all their pixels)")
    add("--processes", type=int, metavar="N", help="how many processes cut, each holding one whole image; default one "
        "a core")
    return parser.parse_args(argv)


def scales(text: str) -> tuple[float, ...]:
    """"0.5,1.0" -> (0.5, 1.0)."""
    numbers = tuple(sorted({float(f"{float(number):g}") for number in text.split(",")}))  # as in a window's name
    if not all(0.01 <= number <= 10 for number in numbers):
        raise ValueError
    return numbers


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if not 32 <= args.size <= 10_000 or not 0 <= args.gap < args.size:
        raise UserError(f"--size {args.size} --gap {args.gap}: expected a size of 32 to 10000, and a gap below it")
    files = [pair for folder in existing_folders(args.sources) for pair in find_dota_files(folder)]
    first: dict[str, Path] = {}
    for image, _ in files:
        if first.setdefault(image.stem, image) is not image:
            raise UserError(f"{image}: {first[image.stem]} has the same name; expected different ones")
    value_range = value_range_of([image for image, _ in files], args.value_range, args.processes)
    settings = {"size": args.size, "gap": args.gap, "scales": list(args.scales), "keep_empty": args.keep_empty,
                "value_range": value_range and list(value_range)}
    begin(args.destination, settings)
    jobs = [Job(*pair, args.destination, args.size, args.gap, args.scales, args.keep_empty, value_range)
            for pair in files]
    cuts = []
    with tqdm(total=len(jobs), desc="cutting images", unit="image", disable=None) as bar:
        for cut in in_processes(cut_image, jobs, args.processes):
            cuts.append(cut)
            bar.update()
    write_json(args.destination / SPLIT, {**settings, "finished": True})
    lost = [place for cut in cuts for place in cut.lost]
    print(f"{args.destination}: {counted(sum(cut.windows for cut in cuts), 'window')} of {counted(len(cuts), 'image')} "
          f"with {counted(sum(cut.objects for cut in cuts), 'object')}")
    if value_range:
        print(f"note: {value_range_text(value_range)}")
    if lost:
        print(f"note: objects that lie in no window to 70 per cent: {len(lost)}, the first: {lost[0]}")


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder; it says that it is not finished. Raises UserError where it holds windows of other settings, or
    other data."""
    path = folder / SPLIT
    if path.exists() and read_json(path) not in ({**settings, "finished": True}, {**settings, "finished": False}):
        raise UserError(f"{path}: the windows here have other settings than {settings}; give another folder")
    if not path.exists() and folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: holds other data; give another folder")
    write_json(path, {**settings, "finished": False})
    for kind in ("images", "labelTxt"):
        (folder / kind).mkdir(exist_ok=True)
        remove_partials(folder / kind)


def cut_image(job: Job) -> Cut:
    """Write the windows of one image that are not there yet; the image is decoded once, and only where one is missing.
    The label file of a window comes last: a window without one is not complete."""
    items = read_label_file(job.labels)
    planned = plan_windows(job.image.stem, items, image_size(job.image), job.side, job.overlap, job.scales)
    planned = [window for window in planned if window.objects or job.keep_empty]
    missing = [window for window in planned if not all(path.exists() for path in _files_of(window, job.folder))]
    if missing:
        try:
            whole = decode(job.image, job.value_range)
        except Exception as error:  # a damaged file can make a decoder raise any exception
            raise UserError(f"{job.image}: {unreadable(error)}") from None
        for window in missing:
            image, labels = _files_of(window, job.folder)
            with atomic_path(image) as temporary:
                _pixels(whole, window).save(temporary, format="PNG", compress_level=1)
            with atomic_path(labels) as temporary:
                temporary.write_text(window_labels(window, items), encoding="utf-8")
    kept = {index for window in planned for index in window.objects}
    return Cut(len(planned), sum(len(window.objects) for window in planned),
               [item.where for index, item in enumerate(items) if index not in kept])


def _files_of(window: Window, folder: Path) -> tuple[Path, Path]:
    """The image and the label file of a window."""
    return folder / "images" / f"{window.name}.png", folder / "labelTxt" / f"{window.name}.txt"


def _pixels(whole: Image.Image, window: Window) -> Image.Image:
    """The window as an RGB image, scaled by itself: the whole image is never there twice."""
    x0, y0, x1, y1 = window.box
    if window.scale == 1:
        return whole.crop(window.box).convert("RGB")
    region = tuple(value / window.scale for value in window.box)
    return whole.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR, box=region).convert("RGB")


if __name__ == "__main__":
    run_script(main)
