"""The drawn demo set: class names and counts, what a chip is, determinism, and the command with its refusals."""

import json

import numpy as np
import pytest
from PIL import Image

from common.runtime import UserError
from demo import draw_ships
from demo.pen import Pen, sample
from demo.ships import DESIGNS
from recognition.published import FGSC23
from tests.support import contents, run_program, run_tool

CLASS_COUNT = len(FGSC23["classes"])
SMALL = {"scale": 0.002, "test_per_class": 1, "size": 40}


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
    destination = tmp_path_factory.mktemp("demo") / "small"
    assert draw_ships.write_demo(destination, **SMALL)
    return destination


def test_designs_follow_the_published_class_order():
    published = [name.lower().replace(" ", "-") for name in FGSC23["classes"]]
    assert [design.name for design in DESIGNS] == published


def test_training_counts_keep_the_shape_of_the_long_tail():
    counts = [draw_ships.train_count(class_id, 0.125) for class_id in range(CLASS_COUNT)]
    assert counts == [48, 16, 54, 11, 30, 9, 29, 9, 15, 9, 24, 3, 14, 22, 10, 7, 12, 34, 16, 10, 9, 9, 5]
    assert [draw_ships.train_count(class_id, 1) for class_id in range(CLASS_COUNT)] == FGSC23["train"]
    assert {draw_ships.train_count(class_id, 1e-6) for class_id in range(CLASS_COUNT)} == {3}


def test_folder_names_sort_by_class_id():
    names = [draw_ships.class_folder(class_id) for class_id in range(CLASS_COUNT)]
    assert sorted(names) == names
    assert names[0] == "00_non-ship" and names[22] == "22_barge"


@pytest.mark.parametrize("class_id", range(CLASS_COUNT))
def test_chips_are_grey_uint8_and_show_something(class_id):
    for index in range(4):
        chip = draw_ships.draw_chip("train", class_id, index, size=56)
        assert chip.dtype == np.uint8 and chip.ndim == 2
        assert min(chip.shape) >= 5 and 20 <= max(chip.shape) <= 56
        # Ships stand out by more than the noise of the sensor; calm open water is left with the noise.
        assert chip.std() > (1 if class_id == 0 else 6)


def test_a_chip_does_not_depend_on_the_order_of_drawing():
    wanted = [("train", 17, 3), ("test", 17, 3), ("train", 0, 1), ("train", 2, 0), ("train", 2, 1)]
    forward = {key: draw_ships.draw_chip(*key) for key in wanted}
    backward = {key: draw_ships.draw_chip(*key) for key in reversed(wanted)}
    assert all(np.array_equal(forward[key], backward[key]) for key in wanted)
    assert len({chip.tobytes() for chip in forward.values()}) == len(wanted)


def test_seed_fixes_every_byte(small_set, tmp_path):
    assert draw_ships.write_demo(tmp_path / "again", **SMALL)
    assert draw_ships.write_demo(tmp_path / "other", seed=1, **SMALL)
    first, again, other = contents(small_set), contents(tmp_path / "again"), contents(tmp_path / "other")
    assert first == again
    assert first.keys() == other.keys()
    assert not [name for name in first if first[name] == other[name]]


def test_numbers_drawn_from_ranges():
    rng = np.random.default_rng(0)
    assert {sample(rng, (2, 4)) for _ in range(60)} == {2, 3, 4}
    reals = [sample(rng, (2.0, 4.0)) for _ in range(60)]
    assert 2 <= min(reals) < 2.5 and 3.5 < max(reals) <= 4
    assert sample(rng, [(1, 2), (3, 4)]) == [(1, 2), (3, 4)] and sample(rng, 7) == 7


def test_ship_is_drawn_along_its_heading():
    picture = Image.new("L", (100, 100), 0)
    pen = Pen(picture, np.array([50, 50]), np.pi / 2, 80, 4, 100, np.zeros(2))
    pen.rectangle(-0.5, 0.5, -1, 1, 50)
    rows, columns = np.nonzero(np.asarray(picture) == 150)
    assert np.ptp(rows) == pytest.approx(80, abs=2) and np.ptp(columns) == pytest.approx(20, abs=2)
    # With the bow down the picture, starboard is to the left of it.
    assert np.allclose(pen.pixels([(0.5, 0), (0, 1)]), [(50, 90), (40, 50)])


def test_layout_of_the_set(small_set):
    folders = [draw_ships.class_folder(class_id) for class_id in range(CLASS_COUNT)]
    for split, count in (("train", 3), ("test", 1)):
        assert sorted(path.name for path in (small_set / split).iterdir()) == folders
        for folder in folders:
            files = sorted((small_set / split / folder).iterdir())
            assert [path.name for path in files] == [f"{index:03d}.png" for index in range(count)]
    with Image.open(small_set / "train" / "17_bulk-carrier" / "002.png") as chip:
        assert chip.mode == "L" and max(chip.size) <= 40
        assert np.array_equal(np.asarray(chip), draw_ships.draw_chip("train", 17, 2, 0, 40))
    with Image.open(small_set / "sheet.png") as sheet:
        assert sheet.height >= CLASS_COUNT * 28


def test_command_draws_once(tmp_path, capsys):
    words = (tmp_path / "set", "--scale", 0.002, "--test-per-class", 1, "--size", 40)
    first = run_program("-m", "demo.draw_ships", *words)
    assert first.returncode == 0, first.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    before = contents(tmp_path / "set")
    assert len(before) == CLASS_COUNT * 4 + 2
    settings = json.loads(before["demo.json"])
    assert settings == {"drawing_version": draw_ships.DRAWING_VERSION, "seed": 0, **SMALL}
    assert run_tool(draw_ships, *words) == 0 and "already there" in capsys.readouterr().out
    assert contents(tmp_path / "set") == before


def test_command_leaves_a_foreign_folder_alone(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.txt").write_text("mine")
    assert run_tool(draw_ships, tmp_path / "photos", "--scale", 0.002) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1
    assert contents(tmp_path) == {"photos/cat.txt": b"mine"}


def test_other_settings_are_refused(small_set):
    before = contents(small_set)
    with pytest.raises(UserError, match="other settings"):
        draw_ships.write_demo(small_set, **{**SMALL, "seed": 5})
    assert draw_ships.write_demo(small_set, **SMALL) is False
    assert contents(small_set) == before


def test_an_empty_folder_is_filled_and_a_file_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert draw_ships.write_demo(tmp_path / "empty", **SMALL)
    assert (tmp_path / "empty" / "demo.json").is_file()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="not a folder"):
        draw_ships.write_demo(tmp_path / "file", **SMALL)
    assert (tmp_path / "file").read_text() == "mine"


OUT_OF_RANGE = [{"seed": -1}, {"scale": 0.0}, {"scale": float("nan")}, {"test_per_class": 0}, {"size": 8}]


@pytest.mark.parametrize("wrong", OUT_OF_RANGE)
def test_values_out_of_range_are_refused(tmp_path, wrong):
    with pytest.raises(UserError, match=next(iter(wrong)).replace("_", "-")):
        draw_ships.write_demo(tmp_path / "set", **wrong)
    assert not any(tmp_path.iterdir())


def test_nothing_is_left_of_an_interrupted_run(tmp_path, monkeypatch):
    def interrupted(rows, scale, size):
        raise KeyboardInterrupt

    monkeypatch.setattr(draw_ships, "contact_sheet", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw_ships.write_demo(tmp_path / "set", **SMALL)
    assert not any(tmp_path.iterdir())
