"""Pictures of a detector: boxes on an image, a sheet of tested images, precision and recall, the curves of training."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image, ImageColor, ImageDraw, ImageFont

from common.charts import as_label, new_figure, save_figure
from common.files import atomic_path
from detection.data.records import Record
from detection.geometry.oriented import circumscribed
from detection.geometry.oriented import corners as corners_of
from detection.metrics.voc_ap import envelope

# Okabe and Ito's colours, which the colour-blind can tell apart: on images without their black, on white without their
# yellow.
OKABE_ITO = ("#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
ON_IMAGES, ON_WHITE = (*OKABE_ITO, "#F0E442"), (*OKABE_ITO, "#000000")
DASHES = ("-", "--", ":", "-.")
NO_LOSS = ("epoch", "lr", "seconds", "images_per_second")  # in a log
SHEET_IMAGES, SHEET_COLUMNS, SHEET_SCORE = 12, 4, 0.3
TILE_WIDTH, CAPTION, GAP, TEXT = 420, 22, 8, 13  # pixels
MOST_IN_LEGEND = 100  # classes of a chart


def class_colour(label: int) -> tuple[int, int, int]:
    """(red, green, blue), 0..255, of a class on images: seven colours, then lighter ones, then darker ones."""
    colour = np.array(ImageColor.getrgb(ON_IMAGES[label % 7]))
    shades = (colour, 0.45 * colour + 140, 0.6 * colour)
    return tuple(np.rint(shades[label // 7 % 3]).astype(int).tolist())


# ---- boxes on images -------------------------------------------------------------------------------------------------


def draw_boxes(image: Image.Image | torch.Tensor, boxes: torch.Tensor | np.ndarray, labels: torch.Tensor | np.ndarray,
               scores: torch.Tensor | np.ndarray, classes: Sequence[str]) -> Image.Image:
    """An image with the boxes in their classes' colours, the highest-scoring on top, each with its class and score; in
    a crowd with the score alone, or with neither, rather than across another's.

    image: PIL image, which is drawn on if it is RGB, for a large one may not fit into memory twice; or (3, H, W) uint8
    tensor. boxes: (M, 4) xyxy, or oriented (M, 5), in its pixels; what leaves the image is cut off. labels, scores:
    (M,). classes: the names. Returns a PIL image, RGB, of the same size."""
    picture = _rgb(image)
    _draw_outlines(picture, boxes, labels, scores)
    _write_labels(picture, boxes, labels, scores, classes)
    return picture


def _draw_outlines(picture: Image.Image, boxes: torch.Tensor | np.ndarray, labels: torch.Tensor | np.ndarray,
                   scores: torch.Tensor | np.ndarray) -> None:
    draw, width = ImageDraw.Draw(picture), max(2, round(min(picture.size) / 300))
    corners, order = _pixels(boxes, picture.size), np.argsort(np.asarray(scores), kind="stable").tolist()
    polygons = _polygons(boxes)
    for i in order:
        if corners[i] and polygons:
            draw.polygon(polygons[i], outline=class_colour(int(labels[i])), width=width)
        elif corners[i]:
            draw.rectangle(corners[i], outline=class_colour(int(labels[i])), width=width)


def _write_labels(picture: Image.Image, boxes: torch.Tensor | np.ndarray, labels: torch.Tensor | np.ndarray,
                  scores: torch.Tensor | np.ndarray, classes: Sequence[str]) -> None:
    corners, order = _pixels(boxes, picture.size), np.argsort(-np.asarray(scores), kind="stable").tolist()
    plates = []
    for i in order:  # the highest-scoring choose their place first
        if corners[i]:
            _write_label(picture, corners[i], classes[int(labels[i])], f"{float(scores[i]):.2f}",
                         class_colour(int(labels[i])), plates)


def _rgb(image: Image.Image | torch.Tensor) -> Image.Image:
    """A PIL image in RGB, of a PIL image, itself if it is one, or of a (3, H, W) uint8 tensor."""
    if isinstance(image, Image.Image):
        return image if image.mode == "RGB" else image.convert("RGB")
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def _pixels(boxes: ArrayLike, size: tuple[int, int]) -> list[list[int] | None]:
    """The first and the last pixel, [x, y, x, y], that each of boxes (M, 4) xyxy, or oriented (M, 5), touches in an
    image of `size` (width, height); None for a box outside it."""
    boxes, size = np.asarray(boxes, np.float64), np.array(size)
    boxes = (circumscribed(torch.from_numpy(boxes)).numpy() if boxes.shape[-1] == 5 else boxes).reshape(-1, 2, 2)
    inside = ((boxes[:, 0] < size) & (boxes[:, 1] > 0)).all(1)
    first = np.floor(boxes[:, 0]).clip(0, size - 1)
    last = (np.ceil(boxes[:, 1]) - 1).clip(first, size - 1)
    corners = np.concatenate([first, last], axis=1).astype(int).tolist()
    return [box if touches else None for box, touches in zip(corners, inside, strict=True)]


def _polygons(boxes: ArrayLike) -> list[list[tuple[float, float]]]:
    """The corners [(x, y), ...] of each of oriented boxes (M, 5); none of horizontal ones (M, 4)."""
    boxes = torch.from_numpy(np.asarray(boxes, np.float64))
    return [list(map(tuple, own)) for own in corners_of(boxes).tolist()] if boxes.shape[-1] == 5 else []


def _write_label(picture: Image.Image, box: Sequence[int], name: str, score: str, colour: tuple[int, int, int],
                 plates: list[tuple[int, ...]]) -> None:
    """Write name and score on a plate of `colour` at the box (first and last pixel), in the first of a few places that
    is in the picture and free of `plates`, [x, y, x, y] each, to which the new one is added. The letters grow with the
    picture, and shrink in a narrow one."""
    draw, (width, height) = ImageDraw.Draw(picture), picture.size
    both, size = f"{name} {score}", max(11, min(width, height) // 45)
    needed = math.ceil(draw.textlength(both, ImageFont.load_default(size))) + 4
    font = ImageFont.load_default(max(1, min(size, size * width // needed)))
    plate_height = sum(font.getmetrics())
    above, below, within = box[1] - plate_height, box[3] + 1, box[1]
    for text, y in ((both, above), (both, below), (score, above), (score, below), (both, within), (score, within)):
        plate_width = min(width, math.ceil(draw.textlength(text, font)) + 4)
        x = max(0, min(box[0], width - plate_width))
        plate = (x, y, x + plate_width - 1, y + plate_height - 1)
        hides_object = y == within and (plate[2] > box[2] or plate[3] > box[3])
        if 0 <= y <= height - plate_height and not hides_object and not any(_meet(plate, other) for other in plates):
            draw.rectangle(plate, fill=colour)
            light = np.dot(colour, (0.299, 0.587, 0.114)) > 110
            draw.text((x + 2, y), text, font=font, fill="black" if light else "white")
            plates.append(plate)
            return


def _meet(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two rectangles [x, y, x, y], first and last pixel, share a pixel."""
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]


def _draw_truth(picture: Image.Image, boxes: ArrayLike, difficult: Sequence[bool] | np.ndarray) -> Image.Image:
    """The picture with the outlines of boxes (M, 4) or (M, 5) in dashes of white and black, of difficult ones in
    dots."""
    pixels, polygons = np.array(picture), _polygons(boxes)  # (H, W, 3)
    for i, (box, dots) in enumerate(zip(_pixels(boxes, picture.size), difficult, strict=True)):
        if box:
            part = pixels[box[1]:box[3] + 1, box[0]:box[2] + 1]
            rows, columns = np.ogrid[:part.shape[0], :part.shape[1]]
            if polygons:
                outline = Image.new("1", part.shape[1::-1])
                ImageDraw.Draw(outline).polygon([(x - box[0], y - box[1]) for x, y in polygons[i]], outline=1)
                border = np.asarray(outline)
            else:
                border = (rows == 0) | (rows == rows.max()) | (columns == 0) | (columns == columns.max())
            white = (rows + columns) // (2 if dots else 5) % 2 == 0
            part[border & white] = 255
            part[border & ~white] = 0
    return Image.fromarray(pixels)


def draw_sheet(rows: Sequence[tuple[Image.Image | torch.Tensor, Record, Mapping[str, Any]]], classes: Sequence[str],
               path: Path) -> None:
    """The first twelve of `rows` on one sheet: detections with a score of at least .3 against the ground truth.

    rows: [(image as draw_boxes takes it, its annotations.Record, its detections), ...], at least one. classes: the
    names. path: of the PNG; every image is scaled to fit a tile of the shape of the median image."""
    rows = [(image, record, _sure(found)) for image, record, found in rows[:SHEET_IMAGES]]
    shape = np.median([record.width / record.height for _, record, _ in rows]).clip(0.5, 2)
    tile = (TILE_WIDTH, round(TILE_WIDTH / shape))
    columns = max(2, min(SHEET_COLUMNS, len(rows)))  # with less the legend would have to be broken into many lines
    lines = math.ceil(len(rows) / columns)
    width, height = tile[0] + GAP, CAPTION + tile[1] + GAP
    legend = _draw_legend(rows, classes, columns * width)
    sheet = Image.new("RGB", (GAP + columns * width, lines * height + legend.height), "white")
    for (line, column), (image, record, found) in zip(product(range(lines), range(columns)), rows, strict=False):
        x, y = GAP + column * width, line * height
        _write_caption(sheet, (x, y), record)
        sheet.paste(_draw_tile(image, record, found, classes, tile), (x, y + CAPTION))
    sheet.paste(legend, (GAP, lines * height))
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


def _sure(found: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The detections of an image that a sheet shows, as numpy arrays."""
    sure = np.asarray(found["scores"]) >= SHEET_SCORE
    return {key: np.asarray(found[key])[sure] for key in ("boxes", "labels", "scores")}


def _draw_tile(image: Image.Image | torch.Tensor, record: Record, found: Mapping[str, np.ndarray],
               classes: Sequence[str], size: tuple[int, int]) -> Image.Image:
    """An image with its detections and ground truth, scaled to fit `size` (width, height)."""
    image = _rgb(image)
    scale = min(size[0] / image.width, size[1] / image.height)
    scaled = image.resize([max(1, round(side * scale)) for side in image.size], reducing_gap=2.0)
    boxes, labels, scores = _scaled(found["boxes"], scale), found["labels"], found["scores"]
    _draw_outlines(scaled, boxes, labels, scores)
    tile = _draw_truth(scaled, _scaled(record.boxes, scale), record.difficult)  # thin: not hidden by a box of its own
    _write_labels(tile, boxes, labels, scores, classes)
    return tile


def _scaled(boxes: np.ndarray, scale: float) -> np.ndarray:
    """Boxes (M, 4) or (M, 5) in an image scaled by `scale`; angles stay."""
    return np.concatenate([boxes[:, :4] * scale, boxes[:, 4:]], axis=1)


def _write_caption(sheet: Image.Image, at: tuple[int, int], record: Record) -> None:
    """The image's name, shortened at its beginning to the width of a tile, and how many objects there are."""
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT)
    objects = int((~record.difficult).sum())
    name, rest = " ".join(record.path.name.split()), f"  {objects} object{'' if objects == 1 else 's'}"
    while draw.textlength(name + rest, font) > TILE_WIDTH:
        name = "..." + name[4:]
    draw.text((at[0], at[1] + 3), name + rest, fill="black", font=font)


def _draw_legend(rows: Sequence[tuple[Any, Record, Mapping[str, np.ndarray]]], classes: Sequence[str],
                 width: int) -> Image.Image:
    """What the outlines of a sheet mean, as a picture of that width."""
    swatch = Image.new("RGB", (30, 12), "#5A6E5A")  # the kind of ground that the dashes are seen on
    entries = [("ground truth", _draw_truth(swatch, [[0, 0, 30, 12]], [False]))]
    if any(record.difficult.any() for _, record, _ in rows):
        entries.append(("difficult or crowd, not counted", _draw_truth(swatch, [[0, 0, 30, 12]], [True])))
    entries.append((f"detected with a score of {SHEET_SCORE} or more:", None))
    for label in sorted({int(label) for _, _, found in rows for label in found["labels"]}):
        entries.append((classes[label], Image.new("RGB", (30, 12), class_colour(label))))
    legend = Image.new("RGB", (width, len(entries) * CAPTION), "white")  # cut to its lines in the end
    draw, font = ImageDraw.Draw(legend), ImageFont.load_default(TEXT)
    x = y = 0
    for text, sample in entries:
        needed = (36 if sample else 0) + math.ceil(draw.textlength(text, font)) + 20
        if x and x + needed > width:
            x, y = 0, y + CAPTION
        if sample:
            legend.paste(sample, (x, y + 5))
        draw.text((x + (36 if sample else 0), y + 3), text, fill="black", font=font)
        x += needed
    return legend.crop((0, 0, width, y + CAPTION))


# ---- charts ----------------------------------------------------------------------------------------------------------


def _styles() -> Iterator[dict[str, str]]:
    """Colours and dashes of the lines of a chart, twenty-eight of them, again and again."""
    return cycle({"color": colour, "linestyle": dashes} for dashes, colour in product(DASHES, ON_WHITE))


def draw_precision_recall(curves: Mapping[str, tuple[np.ndarray, np.ndarray, float]], path: Path) -> None:
    """Precision over recall of every class, the best class first in the legend, which names MOST_IN_LEGEND at most.

    curves: {class: (recall (D,), precision (D,), AP)} as voc_ap and coco_ap return them. path: of the PNG."""
    columns = math.ceil(min(len(curves), MOST_IN_LEGEND) / 25)
    figure = new_figure(6.2 + 1.9 * columns, 5)
    axes = figure.add_subplot()
    order = sorted(curves, key=lambda name: -curves[name][2])
    for style, name in zip(_styles(), order, strict=False):
        recall, precision, ap = curves[name]
        recall = [0, *recall, np.max(recall, initial=0)]  # from the axis, and down to it again
        axes.plot(recall, envelope(np.pad(precision, 1)), label=f"{100 * ap:.1f}  {as_label(name)}",
                  drawstyle="steps-pre", linewidth=1.4, **style)
    axes.set(xlim=(0, 1.005), ylim=(0, 1.005), xlabel="recall", ylabel="best precision at this recall or a higher one")
    axes.grid(alpha=0.3)
    if curves:
        figure.legend(handles=axes.lines[:MOST_IN_LEGEND], loc="outside right upper", ncols=columns, fontsize=8,
                      title="AP50, class")
    save_figure(figure, path)


def draw_curves(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss terms, learning rate and, where the records have it, AP over the epochs.

    records: the log's, dicts with `epoch`, `lr`, loss terms by name, and perhaps names beginning with `AP` (fractions).
    path: of the PNG; without records nothing is drawn."""
    if not records:
        return
    names = list(dict.fromkeys(name for record in records for name in record))
    # A term whose weight is 0 has no place on a logarithmic axis.
    losses = [name for name in names if not name.startswith("AP") and name not in NO_LOSS
              and any(record.get(name) for record in records)]
    panels = {"loss, mean over the epoch": losses, "learning rate": ["lr"],
              "AP, per cent": [name for name in names if name.startswith("AP")
                              and any(record.get(name) is not None for record in records)]}
    panels = {title: terms for title, terms in panels.items() if terms}
    figure = new_figure(4.6 * len(panels), 3.6)
    for axes, (title, terms) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        for style, name in zip(_styles(), terms, strict=False):
            points = [(record["epoch"], record[name]) for record in records if record.get(name) is not None]
            epochs, values = np.array(points).T
            axes.plot(epochs, 100 * values if name.startswith("AP") else values, label=name, marker="o",
                      markersize=2.5, linewidth=1.4, **style)
        axes.set(title=title, xlabel="epoch")
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        if terms == losses:
            axes.set_yscale("log")
        if len(terms) > 1:
            axes.legend(fontsize=7)
    save_figure(figure, path)
