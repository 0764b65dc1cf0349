"""Rotated IoU and rotated NMS beside shapely, and cutting windows beside decoding alone.

    python -m benchmarks.bench_oriented
    python -m benchmarks.bench_oriented --dota DOTA/val --device cuda --json runs/benchmarks/oriented_cuda.json

The boxes are drawn as a detector finds them: about twenty around each object, of 15 classes. Shapely (an extra package,
always on the CPU) is used at its fastest: a spatial index gives the pairs whose horizontal boxes meet, and all
intersections are computed by one call. The image to be cut is drawn, 4,000 x 4,000 pixels, or the first of a folder of
DOTA; windows are of 1,024 pixels, 200 of them shared. `ratio` is seconds of the other over ours, or of cutting over
decoding."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.common import finish, interleaved, parser, set_up
from common.dota import find_dota_files
from common.images import decode
from common.runtime import UserError, run_script
from detection.geometry.oriented import corners, rotated_iou, rotated_nms
from detection.split_dota import Job, cut_image

CLASSES, SIDE = 15, 4000  # pixels of the image that boxes are drawn in


def draw_boxes(count, seed=0):
    """(count, 5) boxes around count / 20 objects, scores and labels."""
    generator = torch.Generator().manual_seed(seed)
    objects = torch.rand(max(count // 20, 1), 5, generator=generator)
    objects = objects * torch.tensor([SIDE, SIDE, 80, 30, 1.57]) + torch.tensor([0, 0, 20, 10, 0])
    which = torch.randint(len(objects), (count,), generator=generator)
    boxes = objects[which] + torch.randn(count, 5, generator=generator) * torch.tensor([5, 5, 3, 3, 0.1])
    boxes[:, 2:4].clamp_(min=2)
    return boxes, torch.rand(count, generator=generator), which % CLASSES


# ---- shapely ---------------------------------------------------------------------------------------------------------


def shapely_pairs(shapely, a, b):
    """(i, j, IoU) of the pairs of polygons whose horizontal boxes meet."""
    j, i = shapely.STRtree(a).query(b)
    shared = shapely.area(shapely.intersection(a[i], b[j]))
    return i, j, shared / (shapely.area(a)[i] + shapely.area(b)[j] - shared)


def shapely_iou(shapely, a, b):
    """(P, G) IoU of boxes (P, 5) and (G, 5)."""
    a, b = (shapely.polygons(corners(boxes.double()).numpy()) for boxes in (a, b))
    result = np.zeros((len(a), len(b)))
    i, j, iou = shapely_pairs(shapely, a, b)
    result[i, j] = iou
    return result


def shapely_nms(shapely, boxes, scores, labels, threshold, limit):
    """The scores of the first `limit` boxes that greedy NMS keeps."""
    scores, order = scores.sort(descending=True)
    labels, polygons = labels[order].numpy(), shapely.polygons(corners(boxes[order].double()).numpy())
    i, j, iou = shapely_pairs(shapely, polygons, polygons)
    above = (iou > threshold) & (i < j) & (labels[i] == labels[j])
    i, j = i[above], j[above]
    by_first = np.argsort(i, kind="stable")
    j, firsts = j[by_first], np.searchsorted(i[by_first], np.arange(len(polygons) + 1))
    keep = np.ones(len(polygons), bool)
    for number in range(len(polygons)):
        if keep[number]:
            keep[j[firsts[number]:firsts[number + 1]]] = False
    return scores[torch.from_numpy(keep)][:limit]


def geometry_rows(args, device, shapely):
    """Rows: milliseconds of IoU and NMS, ours and shapely's, which must agree."""
    rows = []
    a, b = draw_boxes(args.boxes[0])[0], draw_boxes(100, seed=1)[0]
    on_device = [boxes.to(device) for boxes in (a, b)]
    found, expected = rotated_iou(on_device[0][:, None], on_device[1]).cpu(), shapely_iou(shapely, a, b)
    if not np.allclose(found, expected, atol=1e-4):
        raise UserError("the IoUs differ from those of shapely")
    cases = {f"rotated IoU of {len(a):,} x {len(b)}": {
        "ours": lambda: rotated_iou(on_device[0][:, None], on_device[1]),
        "shapely": lambda: shapely_iou(shapely, a, b)}}
    for count in args.boxes[1:]:
        drawn = draw_boxes(count)
        moved = [part.to(device) for part in drawn]
        kept = rotated_nms(*moved)[1].cpu()
        if not torch.equal(kept, shapely_nms(shapely, *drawn, 0.1, 2000)):
            raise UserError("the boxes that remain differ from those of shapely")
        cases[f"rotated NMS of {count:,}, {len(kept)} remain"] = {
            "ours": lambda moved=moved: rotated_nms(*moved),
            "shapely": lambda drawn=drawn: shapely_nms(shapely, *drawn, 0.1, 2000)}
    for name, contestants in cases.items():
        seconds = interleaved(contestants, args.repeats, device, warm_up=1)
        rows.append({"": name, "ours": f"{1000 * seconds['ours']:.1f} ms", "other":
                     f"{1000 * seconds['shapely']:.1f} ms (shapely)",
                     "ratio": round(seconds["shapely"] / seconds["ours"], 2)})
    return rows


# ---- windows ---------------------------------------------------------------------------------------------------------


def draw_dota(folder, side=SIDE):
    """A folder of DOTA with one image: slopes of light, some noise, and an object in every window."""
    rng = np.random.default_rng(0)
    down, right = np.ogrid[0:side, 0:side]
    light = 120 + 60 * np.sin(down / 300) * np.cos(right / 200)
    pixels = np.stack([light + shift for shift in (0, 8, -10)], axis=2) + rng.normal(0, 4, (side, side, 1))
    for name in ("images", "labelTxt"):
        (folder / name).mkdir()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / "P.png")
    lines = [f"{x} {y} {x + 40} {y} {x + 40} {y + 20} {x} {y + 20} ship 0\n" for x in range(50, side - 50, 200)
             for y in range(50, side - 50, 200)]
    (folder / "labelTxt" / "P.txt").write_text("".join(lines), encoding="utf-8")


def cutting_row(args, device):
    """A row: megapixels of a large image a second, cut and only decoded."""
    with tempfile.TemporaryDirectory() as temporary:
        temporary = Path(temporary)
        if not args.dota:
            draw_dota(temporary)
        image, labels = find_dota_files(args.dota or temporary)[0]

        def decoded():
            return decode(image).convert("RGB")

        def cut():
            folder = temporary / "cut"
            shutil.rmtree(folder, ignore_errors=True)
            for name in ("images", "labelTxt"):
                (folder / name).mkdir(parents=True)
            cut_image(Job(image, labels, folder, 1024, 200, (1.0,), True, None))

        megapixels = np.prod(decoded().size) / 1e6
        seconds = interleaved({"cut": cut, "decoded": decoded}, args.repeats, device, warm_up=1)
    return {"": f"windows of {image.name}, {megapixels:.1f} megapixels",
            "ours": f"{megapixels / seconds['cut']:.1f} MP/s",
            "other": f"{megapixels / seconds['decoded']:.1f} MP/s (decoding)",
            "ratio": round(seconds["cut"] / seconds["decoded"], 2)}


def main(argv=None):
    flags = parser(__doc__, "oriented")
    flags.add_argument("--boxes", type=int, nargs="+", default=[5000, 2000, 10_000], help="how many boxes are compared "
                       "with 100 others, and how many go through NMS")
    flags.add_argument("--dota", type=Path, metavar="FOLDER", help="with images/ and labelTxt/ (default: one image is "
                       "drawn)")
    args = flags.parse_args(argv)
    if min(args.repeats, *args.boxes) < 1:
        raise UserError("--repeats and --boxes must be at least 1")
    try:
        import shapely
    except ImportError:
        raise UserError("shapely, which the boxes are measured beside, is missing; pip install shapely") from None
    device = set_up(args)
    rows = [*geometry_rows(args, device, shapely), cutting_row(args, device)]
    finish(args, device, "oriented boxes", rows, shapely=shapely.__version__)


if __name__ == "__main__":
    run_script(main)
