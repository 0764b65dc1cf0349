"""Pictures of a detector: where they are drawn on and where not, and that every case has one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.runtime import UserError
from detection import pictures
from detection.data.records import Record

CLASSES = ["ship", "storage tank", "a class with a name that is longer than most pictures are wide"]
GROUND = (60, 80, 60)


def ground(width=240, height=180):
    return Image.new("RGB", (width, height), GROUND)


def record_of(boxes=(), difficult=None, width=240, height=180, name="image.png"):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    difficult = np.zeros(len(boxes), bool) if difficult is None else np.array(difficult)
    return Record(Path(name), width, height, boxes, np.zeros(len(boxes), np.int64), difficult, 1, np.ones(len(boxes)))


def found_of(boxes=(), labels=(), scores=()):
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4), "scores": torch.tensor(scores).view(-1),
            "labels": torch.tensor(labels, dtype=torch.int64).view(-1)}


def opened(path):
    with Image.open(path) as picture:
        return picture.convert("RGB")


def drawn_on(picture):
    """(H, W) bool: the pixels that are not the ground's."""
    return (np.asarray(picture) != GROUND).any(2)


def count_of(picture, colour):
    return int((np.asarray(picture) == colour).all(2).sum())


# ---- boxes -----------------------------------------------------------------------------------------------------------


def test_the_outline_and_the_label_are_drawn_and_nothing_else():
    image = ground()
    picture = pictures.draw_boxes(image, [[40, 60, 120.5, 150]], [1], [0.876], CLASSES)
    assert picture is image and picture.size == ground().size
    changed = drawn_on(picture)
    outline = np.zeros_like(changed)
    outline[60:150, 40:121] = True
    outline[62:148, 42:119] = False
    assert changed[outline].all() and (np.asarray(picture)[outline] == pictures.class_colour(1)).all()
    rows, columns = np.nonzero(changed & ~outline)
    assert rows.max() == 59 and rows.min() >= 40 and columns.min() == 40  # the plate, right above the box
    assert not changed[62:148, 42:119].any()


def test_a_tensor_is_drawn_on_as_an_image_is():
    pixels = torch.tensor(GROUND, dtype=torch.uint8).view(3, 1, 1).expand(3, 180, 240)
    arguments = (torch.tensor([[40.0, 60, 120, 150]]), torch.tensor([0]), torch.tensor([0.5]), CLASSES)
    assert pictures.draw_boxes(pixels, *arguments) == pictures.draw_boxes(ground(), *arguments)


def test_a_grey_image_becomes_a_coloured_one():
    picture = pictures.draw_boxes(Image.new("L", (90, 90)), [[10, 20, 50, 50]], [0], [0.5], CLASSES)
    assert picture.mode == "RGB" and count_of(picture, pictures.class_colour(0)) > 100


def test_without_detections_the_image_stays_as_it_is():
    empty = found_of()
    assert pictures.draw_boxes(ground(), empty["boxes"], empty["labels"], empty["scores"], CLASSES) == ground()


def test_what_leaves_the_image_is_cut_off_and_what_is_outside_is_left_out():
    outside = [[-50, 20, -5, 60], [240, 20, 300, 60], [20, 180, 60, 300], [20, -30, 60, 0]]
    assert pictures.draw_boxes(ground(), outside, [0] * 4, [0.9] * 4, CLASSES) == ground()
    changed = drawn_on(pictures.draw_boxes(ground(), [[-50, 60, 400, 500]], [0], [0.9], CLASSES))
    assert changed[60:, 0].all() and changed[60:, -1].all() and changed[-1].all() and not changed[90:170, 5:-5].any()


@pytest.mark.parametrize("box", [[0, 0, 30, 20], [200, 0, 240, 180], [0, 0, 240, 180], [230, 170, 240, 180],
                                 [239.5, 90, 239.9, 90.2]])
def test_labels_stay_inside_the_picture(box, monkeypatch):
    plates = []
    meet = pictures._meet
    monkeypatch.setattr(pictures, "_meet", lambda a, b: plates.append(a) or meet(a, b))
    # The second, sure of nothing, looks for a place that the first has left.
    pictures.draw_boxes(ground(), [box, box], [1, 1], [0.9, 0.1], CLASSES)
    assert plates and all(0 <= x <= last_x < 240 and 0 <= y <= last_y < 180 for x, y, last_x, last_y in plates)
    picture = pictures.draw_boxes(ground(), [box], [1], [0.9], CLASSES)
    letters = drawn_on(picture) & (np.asarray(picture) != pictures.class_colour(1)).any(2)
    assert letters.sum() > 30


@pytest.mark.parametrize("size", [(1, 1), (8, 200), (30, 30), (64, 48), (2400, 1600)])
def test_every_size_of_image_and_every_name_is_drawn(size):
    picture = pictures.draw_boxes(ground(*size), [[0, size[1] / 2, size[0], size[1]]], [2], [1.0], CLASSES)
    assert picture.size == size and drawn_on(picture).any()
    for number in range(3):
        large, small = (pictures.draw_boxes(ground(side, side), [[0, side / 2, side, side]], [number], [0.5], CLASSES)
                        for side in (1800, 300))
        assert drawn_on(large).sum() > 2 * drawn_on(small).sum()


def test_labels_do_not_cover_one_another_and_the_surest_keeps_its_name():
    boxes = [[40 + 4 * i, 80, 100 + 4 * i, 100] for i in range(8)]
    scores = [0.1 + 0.1 * i for i in range(8)]
    picture = pictures.draw_boxes(ground(), boxes, [0] * 8, scores, CLASSES)
    alone = pictures.draw_boxes(ground(), boxes[-1:], [0], scores[-1:], CLASSES)
    above = np.s_[:80, 68:]
    surest = drawn_on(alone)[above]
    assert surest.sum() > 300
    assert (np.asarray(picture)[above][surest] == np.asarray(alone)[above][surest]).all()


def test_the_surest_box_is_on_top_whatever_the_order():
    boxes = [[40, 60, 120, 150], [40, 60, 120, 150]]
    for order in ([0, 1], [1, 0]):
        picture = pictures.draw_boxes(ground(), boxes, [order[0], order[1]], [0.9 - 0.5 * i for i in order], CLASSES)
        assert picture.getpixel((120 - 1, 149)) == pictures.class_colour(0)


def test_twenty_one_classes_have_colours_of_their_own():
    colours = np.array([pictures.class_colour(label) for label in range(21)], float)
    apart = np.linalg.norm(colours[:, None] - colours, axis=2)[~np.eye(21, dtype=bool)]
    assert apart.min() > 20 and colours.min() >= 0 and colours.max() <= 255
    assert pictures.class_colour(21) == pictures.class_colour(0)


# ---- sheets and charts -----------------------------------------------------------------------------------------------


def test_a_sheet_shows_the_ground_truth_and_what_is_sure_enough(tmp_path):
    record = record_of([[40, 60, 120, 150]])
    found = found_of([[50, 60, 120, 150], [150, 20, 200, 60]], [0, 1], [0.8, 0.29])
    pictures.draw_sheet([(ground(), record, found)], CLASSES, tmp_path / "sheet.png")
    sheet = opened(tmp_path / "sheet.png")
    assert count_of(sheet, pictures.class_colour(0)) > 300 and count_of(sheet, pictures.class_colour(1)) == 0
    pictures.draw_sheet([(ground(), record_of(), found_of())], CLASSES, tmp_path / "empty.png")
    tile = np.s_[pictures.CAPTION:pictures.CAPTION + 315, pictures.GAP:pictures.GAP + pictures.TILE_WIDTH]
    assert not drawn_on(opened(tmp_path / "empty.png"))[tile].any()
    pictures.draw_sheet([(ground(), record, found_of())], CLASSES, tmp_path / "missed.png")
    # An outline of 140 x 158 in one colour by another, from a box of 80 x 90 on a picture scaled by 1.75.
    missed = opened(tmp_path / "missed.png").crop((tile[1].start, tile[0].start, tile[1].stop, tile[0].stop))
    assert drawn_on(missed).sum() == 2 * (140 + 158) - 4
    assert count_of(missed, (255, 255, 255)) == pytest.approx(count_of(missed, (0, 0, 0)), abs=20)


@pytest.mark.parametrize(("count", "lines"), [(1, 1), (4, 1), (5, 2), (14, 3)])
def test_a_sheet_holds_up_to_twelve_images_of_any_shape(tmp_path, count, lines):
    shapes = [(240, 180), (60, 300), (500, 20), (1, 1)]
    rows = []
    for i in range(count):
        width, height = shapes[i % 4]
        name = "a long name\nof two lines " * 9 + f"{i}.png"
        rows.append((ground(width, height), record_of([[0, 0, width, height]] * 2, [True, False], width, height, name),
                     found_of([[0, 0, width, height]], [i % 3], [0.9])))
    pictures.draw_sheet(rows, CLASSES, tmp_path / "sheet.png")
    sheet = opened(tmp_path / "sheet.png")
    columns = max(2, min(4, count))
    assert sheet.width == pictures.GAP + columns * (pictures.TILE_WIDTH + pictures.GAP)
    tile_height = (sheet.height - pictures.CAPTION) / lines
    assert 200 < tile_height < 900


def test_difficult_objects_are_dotted_and_explained():
    dashes, dots = (np.asarray(pictures._draw_truth(ground(), [[20, 20, 80, 60]], [difficult]))[20, 20:80, 0]
                    for difficult in (False, True))
    assert (np.diff(dashes.astype(int)) != 0).sum() == 11 and (np.diff(dots.astype(int)) != 0).sum() == 29


def test_charts_are_drawn(tmp_path):
    recall = np.linspace(0, 1, 101)
    curves = {f"class {i}": (recall, 1 - recall**(i + 1), 0.5) for i in range(30)}
    empty = {"ship": (np.zeros(0), np.zeros(0), 0.0)}
    for name, value in (("many", curves), ("nothing found", empty), ("no class", {})):
        pictures.draw_precision_recall(value, tmp_path / f"{name}.png")
        assert min(opened(tmp_path / f"{name}.png").size) > 400
    log = [{"epoch": 1, "lr": 0.01, "loss": 2.0, "qfl": 1.0, "kd_main": 0.0, "seconds": 3, "AP": None},
           {"epoch": 2, "lr": 0.001, "loss": 1.0, "qfl": 0.5, "kd_main": 0.0, "AP": 0.0, "AP50": 0.2}]
    pictures.draw_curves(log, tmp_path / "curves.png")
    pictures.draw_curves(log[:1], tmp_path / "first.png")
    curves, first = opened(tmp_path / "curves.png"), opened(tmp_path / "first.png")
    assert curves.width > 1.4 * first.width  # a third panel, of AP
    pictures.draw_curves([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_class_names_are_no_formulas_and_a_legend_is_of_bounded_size(tmp_path, monkeypatch):
    curves = {f"cost $\\frac$ {i}": (np.array([0.5]), np.array([1.0]), 0.5) for i in range(6)}
    pictures.draw_precision_recall(curves, tmp_path / "x.png")
    assert opened(tmp_path / "x.png").width < 1000
    monkeypatch.setattr(pictures, "MOST_IN_LEGEND", 4)
    figures = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: figures.append(figure))
    pictures.draw_precision_recall(curves, tmp_path / "x.png")
    assert len(figures[0].axes[0].lines) == 6 and len(figures[0].legends[0].get_texts()) == 4


def test_precision_recall_is_drawn_as_its_envelope(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: figures.append(figure))
    pictures.draw_precision_recall({"b": (np.array([0.5, 0.5, 1]), np.array([1, 0.5, 2 / 3]), 0.2),
                                    "a": (np.array([0.5]), np.array([1.0]), 0.7)}, tmp_path / "x.png")
    first, second = figures[0].axes[0].lines
    assert [line.get_label() for line in (first, second)] == ["70.0  a", "20.0  b"]
    assert second.get_xdata().tolist() == [0, 0.5, 0.5, 1, 1]
    assert second.get_ydata().tolist() == [1, 1, 2 / 3, 2 / 3, 0]


def test_a_picture_is_whole_or_absent(tmp_path, monkeypatch):
    (tmp_path / "sheet.png").write_bytes(b"before")
    monkeypatch.setattr(Image.Image, "save", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(UserError, match="could not be written"):
        pictures.draw_sheet([(ground(), record_of(), found_of())], CLASSES, tmp_path / "sheet.png")
    with pytest.raises(UserError, match="could not be written"):
        pictures.draw_curves([{"epoch": 1, "lr": 1.0, "loss": 1.0}], tmp_path / "curves.png")
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    assert (tmp_path / "sheet.png").read_bytes() == b"before"
