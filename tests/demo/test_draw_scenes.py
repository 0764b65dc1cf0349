"""The drawn demo set of detection: what a scene is, boxes against pixels, determinism, the COCO files, the command."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from common.dota import find_dota_files, read_label_file
from common.runtime import UserError
from demo import draw_scenes, ground, objects, scenes
from demo.scenes import CLASSES, PLANE, SHIP, TANK, draw_scene, lay_out_scene
from tests.support import contents, run_program, run_tool

SMALL = {"seed": 3, "train": 5, "test": 3, "size": 48}
SUN = np.array([0.5, 0.5])


def drawn_scenes(count, size, seed=0):
    """The first scenes of a seed, laid out, not rendered."""
    return [lay_out_scene(np.random.default_rng([seed, 0, index]), size) for index in range(count)]


def objects_of(scene):
    """(placed sprite, box, label) of every object of a scene; the sprite is found by its silhouette in a full mask."""
    found = []
    for box, label in zip(scene.boxes, scene.labels, strict=True):
        for placed in scene.placed:
            sprite, left, top = placed
            mask = Image.new("L", (scene.side, scene.side))
            mask.paste(sprite.silhouette, (left, top))
            rows, columns = np.nonzero(np.asarray(mask))
            if len(rows) and (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == tuple(box):
                found.append((placed, box, label))
    return found


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
    destination = tmp_path_factory.mktemp("demo") / "small"
    assert draw_scenes.write_demo(destination, **SMALL)
    return destination


def test_a_scene_does_not_depend_on_the_order_of_drawing():
    wanted = [("train", 1, 0), ("train", 2, 0), ("test", 1, 0), ("train", 1, 5)]
    forward = {key: draw_scene(*key, size=48) for key in wanted}
    backward = {key: draw_scene(*key, size=48) for key in reversed(wanted)}
    for key in wanted:
        assert all(np.array_equal(*pair) for pair in zip(forward[key], backward[key], strict=True))
    assert len({picture.tobytes() for picture, *_ in forward.values()}) == len(wanted)


@pytest.mark.parametrize("kind", [objects.plane_sprite, objects.ship_sprite])
@pytest.mark.parametrize("heading", [0.0, 0.6, 2.5, 4.0])
def test_corners_are_of_the_rectangle_around_the_silhouette_along_the_heading(kind, heading):
    sprite = kind(np.random.default_rng(1), 120.0, heading, SUN)
    rows, columns = np.nonzero(np.asarray(sprite.silhouette))
    points = np.stack([columns, rows], axis=1) - sprite.corners.mean(axis=0)  # (n, 2)
    along, across = sprite.corners[1] - sprite.corners[0], sprite.corners[3] - sprite.corners[0]
    assert np.arctan2(along[1], along[0]) % (2 * np.pi) == pytest.approx(heading)
    for side in (along, across):
        reach = points @ side / np.hypot(*side)
        assert reach.max() == pytest.approx(np.hypot(*side) / 2, abs=2)
        assert reach.min() == pytest.approx(-np.hypot(*side) / 2, abs=2)


def test_oriented_scenes_are_in_dotas_layout(tmp_path):
    assert draw_scenes.write_demo(tmp_path / "set", **SMALL, oriented=True)
    assert {path.name for path in (tmp_path / "set").iterdir()} == {"train", "test", "sheet.png", "demo.json"}
    for split in ("train", "test"):
        files = find_dota_files(tmp_path / "set" / split)
        assert len(files) == SMALL[split]
        for index, (_, label_file) in enumerate(files):
            _, _, labels, corners = draw_scene(split, index, SMALL["seed"], SMALL["size"])
            found = read_label_file(label_file)
            assert [item.name for item in found] == [CLASSES[label] for label in labels]
            assert np.allclose(np.array([item.points for item in found]).reshape(-1, 4, 2), corners, atol=0.006)
    assert not draw_scenes.write_demo(tmp_path / "set", **SMALL, oriented=True)
    with pytest.raises(UserError, match="other settings"):
        draw_scenes.write_demo(tmp_path / "set", **SMALL)


@pytest.mark.parametrize("size", [32, 100])
def test_boxes_are_inside_the_picture_and_keep_off_each_other(size):
    for index in range(12):
        picture, boxes, labels, _ = draw_scene("train", index, size=size)
        assert picture.shape == (size, size, 3) and picture.dtype == np.uint8 and picture.std() > 4
        assert boxes.shape == (len(labels), 4) and boxes.dtype == np.float64 and labels.dtype == np.int64
        assert (boxes >= 0).all() and (boxes <= size).all() and (boxes[:, 2:] - boxes[:, :2] > 0.5).all()
        for first in range(len(boxes)):
            for second in range(first):
                (a, b, c, d), (e, f, g, h) = boxes[first], boxes[second]
                common = max(0, min(c, g) - max(a, e)) * max(0, min(d, h) - max(b, f))
                assert common <= 0.05 * ((c - a) * (d - b) + (g - e) * (h - f) - common) + 1e-9


def test_sizes_of_objects_are_those_promised(monkeypatch):
    monkeypatch.setattr(scenes, "put_distractors", lambda scene: None)
    longest = [max(box[2:] - box[:2]) / ground.SUPERSAMPLING for scene in drawn_scenes(20, 256) for box in scene.boxes]
    assert 10 <= min(longest) < 20 and 80 < max(longest) <= 124


def test_every_object_stands_on_its_own_ground():
    grounds = {PLANE: {ground.CONCRETE}, SHIP: {ground.WATER},
               TANK: {ground.GRAVEL, ground.CONCRETE}}
    for scene in drawn_scenes(12, 48):
        for (sprite, left, top), _, label in objects_of(scene):
            window = (left, top, left + sprite.silhouette.width, top + sprite.silhouette.height)
            under = np.asarray(scene.ground.crop(window))[np.asarray(sprite.silhouette) > 0]
            assert set(under.tolist()) <= grounds[label]


def test_boxes_are_tight_around_what_is_seen():
    checked = set()
    for scene in drawn_scenes(8, 128, seed=1):
        bare = copy.deepcopy(scene)
        bare.placed = []
        without = scenes.render(bare).astype(int)
        chosen = objects_of(scene)
        assert len(chosen) == len(scene.boxes)
        for (sprite, left, top), box, label in chosen[:2]:
            alone = copy.deepcopy(scene)
            alone.placed = [(replace(sprite, shadow=0.0), left, top)]
            rows, columns = np.nonzero(abs(scenes.render(alone) - without).max(2) > 8)
            extent = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert np.abs(extent - box / ground.SUPERSAMPLING).max() <= 1.5
            checked.add(label)
    assert checked == {PLANE, SHIP, TANK}


@pytest.mark.parametrize("heading, along", [(0.0, 0), (np.pi / 2, 1), (np.pi, 0)])
def test_a_ship_is_as_long_as_asked_along_its_heading(heading, along):
    sides = np.ptp(np.reshape(objects.ship_sprite(np.random.default_rng(0), 80, heading, SUN)
                              .silhouette.getbbox(), (2, 2)), axis=0)
    assert sides[along] == pytest.approx(80, abs=1.5) and 80 / 7.5 < sides[1 - along] < 80 / 1.5


def test_the_silhouette_of_a_plane_is_wings_and_fuselage_and_that_of_a_tank_a_disc():
    for seed in range(8):
        plane = np.asarray(objects.plane_sprite(np.random.default_rng(seed), 100, 0.0, SUN).silhouette) > 0
        rows, columns = np.nonzero(plane)
        assert 97 < np.ptp(columns) < 112 and 65 < np.ptp(rows) < 115
        assert 0.15 < plane.sum() / (np.ptp(rows) * np.ptp(columns)) < 0.5
        # Port and starboard mirror each other, give or take the pixels of the border.
        assert (plane != plane[::-1]).sum() < 0.25 * plane.sum()
        tank = objects.tank_sprite(np.random.default_rng(seed), 60, seed % 2, (200, 200, 200), SUN).silhouette
        assert (np.asarray(tank) > 0).sum() == pytest.approx(np.pi * 30**2, rel=0.06)


def test_every_class_and_empty_scenes_occur_and_no_scene_is_crowded(monkeypatch):
    monkeypatch.setattr(scenes, "put_distractors", lambda scene: None)
    counts = [np.bincount(scene.labels, minlength=len(CLASSES)) for scene in drawn_scenes(100, 32)]
    assert (np.sum(counts, axis=0) > 70).all()
    assert 1 <= sum(count.sum() == 0 for count in counts) <= 15
    assert max(count.sum() for count in counts) <= scenes.MOST_OBJECTS


def test_seed_fixes_every_byte(small_set, tmp_path):
    assert draw_scenes.write_demo(tmp_path / "again", **SMALL)
    assert draw_scenes.write_demo(tmp_path / "other", **{**SMALL, "seed": 4})
    first, again, other = contents(small_set), contents(tmp_path / "again"), contents(tmp_path / "other")
    assert first == again
    assert first.keys() == other.keys() and not [name for name in first if first[name] == other[name]]


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_coco_files_say_what_was_drawn(small_set, split):
    coco = COCO(small_set / f"{split}.json")
    assert [(coco.cats[number]["name"]) for number in sorted(coco.cats)] == list(CLASSES) and min(coco.cats) == 1
    assert len(coco.imgs) == SMALL[split]
    for index, image_id in enumerate(sorted(coco.imgs)):
        entry = coco.imgs[image_id]
        with Image.open(small_set / "images" / entry["file_name"]) as image:
            assert image.mode == "RGB" and image.size == (entry["width"], entry["height"]) == (48, 48)
            stored = np.asarray(image).astype(float)
        picture, boxes, labels, _ = draw_scene(split, index, SMALL["seed"], SMALL["size"])
        assert abs(stored - picture).mean() < 8
        annotations = coco.loadAnns(coco.getAnnIds([image_id]))
        assert [annotation["category_id"] - 1 for annotation in annotations] == labels.tolist()
        for annotation, box in zip(annotations, boxes, strict=True):
            left, top, width, height = annotation["bbox"]
            assert np.allclose([left, top, left + width, top + height], box, atol=0.02)
            assert annotation["area"] == pytest.approx(width * height, abs=0.01) and annotation["iscrowd"] == 0
    numbers = [annotation["id"] for annotation in coco.dataset["annotations"]]
    assert len(set(numbers)) == len(numbers) > 0


def test_command_draws_once_and_refuses_other_settings(tmp_path, capsys):
    words = (tmp_path / "set", "--train", 2, "--test", 1, "--size", 40)
    first = run_program("-m", "demo.draw_scenes", *words)
    assert first.returncode == 0, first.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    before = contents(tmp_path / "set")
    assert before.keys() == {"train.json", "test.json", "sheet.png", "demo.json", "images/train_0000.jpg",
                             "images/train_0001.jpg", "images/test_0000.jpg"}
    assert json.loads(before["demo.json"]) == {"demo": "detection", "drawing_version": draw_scenes.DRAWING_VERSION,
                                               "seed": 0, "train": 2, "test": 1, "size": 40}
    assert run_tool(draw_scenes, *words) == 0 and "already there" in capsys.readouterr().out
    assert run_tool(draw_scenes, *words, "--seed", 5) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and "other settings" in error
    assert contents(tmp_path / "set") == before


def test_command_leaves_foreign_folders_and_files_alone(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.txt").write_text("mine")
    for path in (tmp_path / "photos", tmp_path / "photos" / "cat.txt"):
        assert run_tool(draw_scenes, path) == 2
        out, error = capsys.readouterr()
        assert out == "" and error.startswith("error: ") and error.count("\n") == 1
    assert contents(tmp_path) == {"photos/cat.txt": b"mine"}


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"train": 0}, {"test": 0}, {"size": 16}, {"size": 4096}])
def test_values_out_of_range_are_refused(tmp_path, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        draw_scenes.write_demo(tmp_path / "set", **{**SMALL, **wrong})
    assert not any(tmp_path.iterdir())


def test_nothing_is_left_of_an_interrupted_run(tmp_path, monkeypatch):
    def interrupted(shown, size):
        raise KeyboardInterrupt

    monkeypatch.setattr(draw_scenes, "contact_sheet", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw_scenes.write_demo(tmp_path / "set", **SMALL)
    assert not any(tmp_path.iterdir())
