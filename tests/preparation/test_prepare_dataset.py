"""prepare_dataset.py as a user runs it: every kind of source on tiny drawn data, the long tail, the parts, the groups,
the refusals, `check`; and the real aerial images where they are."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.image_cache import ImageCache
from common.runtime import UserError
from dataset import class_counts, fingerprint, read_info, read_split
from preparation.chips import MIN_EDGE
from prepare_dataset import main
from recognition.published import DOTA, FGSC23
from tests.support import real, run_program


def draw(path, number, size=(12, 10)):
    """Write an image whose pixels depend on `number`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def draw_folders(root, counts, start=0):
    """Write {folder: number of images}; returns `root`."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            start += 1
            draw(root / folder / f"{start}.png", start)
    return root


def prepare(*arguments):
    """Run main in this process; returns its exit status."""
    return main([str(argument) for argument in (*arguments, "--processes", 1)])


def run(*arguments):
    """Run the script in a process of its own."""
    return run_program("prepare_dataset.py", *arguments)


def counts_of(root, *splits):
    info = read_info(root)
    return class_counts([sample.label for split in splits for sample in read_split(info, split)],
                        len(info.classes)).tolist()


def files_under(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_makes_a_data_set_and_refuses_to_overwrite_it(tmp_path):
    source = draw_folders(tmp_path / "source", {"train/plane": 10, "train/ship": 4, "test/plane": 2, "test/ship": 2})
    done = run("folders", source, tmp_path / "made")
    assert (done.returncode, done.stderr) == (0, "")
    assert "plane" in done.stdout and "is ready" in done.stdout
    assert files_under(tmp_path / "made") == ["class_counts.png", "dataset.json", "test.txt", "train.txt", "val.txt"]
    before = {path: path.read_bytes() for path in (tmp_path / "made").iterdir()}

    again = run("folders", source, tmp_path / "made", "--seed", 5)
    assert again.returncode == 2 and again.stderr.count("\n") == 1
    assert "holds a dataset.json already" in again.stderr
    assert before == {path: path.read_bytes() for path in (tmp_path / "made").iterdir()}


def test_check_passes_what_the_command_made_and_fails_what_is_none(tmp_path):
    source = draw_folders(tmp_path / "source", {"a": 20, "b": 10, "c": 5})
    prepare("folders", source, tmp_path / "made")
    checked = run("check", tmp_path / "made")
    assert checked.returncode == 0 and checked.stdout.endswith("0 errors, 0 notes\n")
    nothing = run("check", source)
    assert nothing.returncode == 2 and nothing.stderr.count("\n") == 1 and "no dataset.json" in nothing.stderr


@pytest.mark.parametrize("arguments, words", [
    (["folders", "SOURCE"], "expected SOURCE... DESTINATION"),
    (["folders", "SOURCE", "SOURCE", "DEST"], "expected SOURCE DESTINATION"),
    (["folders", "absent", "DEST"], "no such folder"),
    (["folders", "SOURCE", "DEST", "--val-fraction", "1"], "--val-fraction 1.0: expected at least 0"),
    (["folders", "SOURCE", "DEST", "--test-fraction", "0"], "--test-fraction 0.0"),
    (["folders", "SOURCE", "DEST", "--imbalance", "nan"], "--imbalance nan"),
    (["folders", "SOURCE", "DEST", "--imbalance", ".5"], "--imbalance 0.5"),
    (["folders", "SOURCE", "DEST", "--max-per-class", "0"], "--max-per-class 0"),
    (["folders", "SOURCE", "DEST", "--seed", "-1"], "--seed -1"),
    (["folders", "SOURCE", "DEST", "--head-min", "4"], "give both"),
    (["folders", "SOURCE", "DEST", "--head-min", "4", "--tail-max", "4"], "less than --head-min"),
    (["folders", "SOURCE", "DEST", "--margin", ".1"], "only for dota and coco"),
    (["dota", "SOURCE", "DEST", "--images", "SOURCE"], "only for coco"),
    (["folders", "SOURCE", "FILE"], "is a file"),
    (["coco", "FILE", "DEST"], "not valid JSON"),
    (["check", "SOURCE", "DEST"], "expected DATASET"),
])
def test_wrong_arguments_are_refused_and_nothing_is_written(tmp_path, arguments, words):
    draw_folders(tmp_path / "SOURCE", {"a": 2, "b": 2})
    (tmp_path / "FILE").write_text("{\n")
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        prepare(*(tmp_path / word if word in ("SOURCE", "DEST", "FILE", "absent") else word for word in arguments))
    assert not (tmp_path / "DEST").exists()


# ---- class folders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folders, classes", [
    (["class10", "class9", "class1"], ["class1", "class9", "class10"]),
    (["3_tug", "02_ferry", "1-barge"], ["barge", "ferry", "tug"]),
    ([f"{i:02d}_{name}" for i, name in enumerate("abcdefghijk")], list("abcdefghijk")),
    (["10_tug", "9_ferry", "07-barge"], ["07-barge", "9_ferry", "10_tug"]),
    (["0-10 m", "10-20 m", "20-30 m"], ["0-10 m", "10-20 m", "20-30 m"]),
    (["737 MAX", "2019 flood"], ["737 MAX", "2019 flood"]),
    (["1_ship", "2_ship", "3_tug"], ["1_ship", "2_ship", "3_tug"]),
    (["2_ship", "1_tug", "boat"], ["1_tug", "2_ship", "boat"]),
    (["0-10 m", "1-20 m"], ["0-10 m", "1-20 m"]),
    (["1 lane", "2 lanes"], ["1 lane", "2 lanes"]),
    (["1. tug", "2 - cargo ship"], ["tug", "cargo ship"]),
    (["tug ", " boat"], ["boat", "tug"]),
    (["10", "9", "0"], ["0", "9", "10"]),
])
def test_folders_are_in_natural_order_and_lose_their_ids(tmp_path, folders, classes):
    prepare("folders", draw_folders(tmp_path / "s", {name: 2 + i for i, name in enumerate(folders)}), tmp_path / "d")
    assert read_info(tmp_path / "d").classes == classes


def test_the_command_says_which_folder_is_which_class(tmp_path, capsys):
    prepare("folders", draw_folders(tmp_path / "s", {"1_tug": 3, "2-ferry": 3}), tmp_path / "d")
    assert "not parts of the class names: '1_tug' is 'tug', '2-ferry' is 'ferry'" in capsys.readouterr().out
    source = draw_folders(tmp_path / "alike", {"tug": 3, "tug ": 3})
    with pytest.raises(UserError, match="differ only in spaces around their name: 'tug'"):
        prepare("folders", source, tmp_path / "d2")


def test_images_in_subfolders_and_of_any_suffix_are_taken_and_the_rest_is_counted(tmp_path, capsys):
    source = draw_folders(tmp_path / "source", {"a": 4, "b": 4})
    draw(source / "a" / "2019" / "may" / "1.jpg", 90)
    (source / "a" / "2019" / "may" / "1.jpg").rename(source / "a" / "2019" / "may" / "1.jfif")
    draw(source / "b" / ".thumbnails" / "1.png", 91)
    for name in ("a/list.txt", "b/notes.txt", "b/Thumbs.db"):
        (source / name).write_text("")
    prepare("folders", source, tmp_path / "d")
    assert counts_of(tmp_path / "d", "train", "val", "test") == [5, 4]
    printed = capsys.readouterr().out
    assert "images in subfolders of class folders are images of the class: 1, the first " in printed
    assert "files left out, as Pillow reads no images of their suffix: 3 (.txt 2, .db 1), the first " in printed


def test_a_class_may_be_absent_from_the_test_part(tmp_path, capsys):
    source = draw_folders(tmp_path / "source", {"train/a": 4, "train/b": 4, "train/c": 4, "test/a": 2})
    (source / "test" / "b").mkdir()
    prepare("folders", source, tmp_path / "d")
    assert counts_of(tmp_path / "d", "test") == [2, 0, 0]
    printed = capsys.readouterr().out
    assert "class b has no test images" in printed and "class c has no test images" in printed


def test_spaces_around_a_folder_are_found_again_and_tabs_are_refused(tmp_path):
    source = draw_folders(tmp_path / "source", {" a": 10, "b ": 10, "c": 10})
    prepare("folders", source, tmp_path / "d")
    info = read_info(tmp_path / "d")
    assert info.classes == ["a", "b", "c"]
    assert all((info.images / sample.path).is_file() for sample in read_split(info, "train"))
    prepare("check", tmp_path / "d")
    (source / "c").rename(source / "c\td")
    for destination in ("d2", "d\t3"):
        with pytest.raises(UserError, match="unprintable"):
            prepare("folders", source, tmp_path / destination)
    (source / "c\td").rename(source / "c")
    with pytest.raises(UserError, match="must hold no control characters"):
        prepare("folders", source, tmp_path / "d\t3")
    assert not (tmp_path / "d2").exists() and not (tmp_path / "d\t3").exists()


def test_groups_that_cannot_be_trained_are_named_with_the_remedy(tmp_path, capsys):
    prepare("folders", draw_folders(tmp_path / "s", {"a": 20, "b": 10, "c": 2}), tmp_path / "d")
    assert "note: no image of group tail is held out to choose the best epoch on: train with --select test" in \
        capsys.readouterr().out


def test_folders_ignore_what_is_no_image_and_refuse_an_empty_class(tmp_path):
    source = draw_folders(tmp_path / "source", {"a": 4, "b": 4, ".hidden": 1})
    (source / "a" / "Thumbs.db").write_text("")
    (source / "a" / "._1.png").write_text("")
    prepare("folders", source, tmp_path / "d")
    assert counts_of(tmp_path / "d", "train", "val", "test") == [4, 4]
    (source / "c").mkdir()
    with pytest.raises(UserError, match="c: no images in this class folder"):
        prepare("folders", source, tmp_path / "d2")
    assert not (tmp_path / "d2").exists()


@pytest.mark.parametrize("folders, words", [
    ({"train/a": 2, "train/b": 2}, "none in test/"),
    ({"train/a": 2, "train/b": 2, "test/a": 1, "test/z": 1}, "class folder z is in test/ and not in train/"),
    ({}, "no class folders"),
    ({"images/a": 2, "images/b": 2}, "'images' is the only class folder here; .* give .*source/images"),
    ({"a": 1, "b": 1}, "no test images"),
])
def test_folders_that_do_not_fit_are_refused(tmp_path, folders, words):
    (tmp_path / "source").mkdir()
    with pytest.raises(UserError, match=words):
        prepare("folders", draw_folders(tmp_path / "source", folders), tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_a_data_set_may_lie_in_its_source_and_links_are_followed(tmp_path):
    source = draw_folders(tmp_path / "source", {"a": 5})
    draw_folders(tmp_path / "elsewhere", {"b": 5}, start=50)
    (source / "b").symlink_to(tmp_path / "elsewhere" / "b")
    prepare("folders", source, source)
    assert counts_of(source, "train", "val", "test") == [5, 5]
    assert prepare("check", source) == 1  # two classes of five images: no middle group
    (source / "dataset.json").unlink()
    with pytest.raises(UserError, match="holds a train.txt already"):
        prepare("folders", source, source)


def test_a_name_that_no_list_can_hold_is_refused(tmp_path):
    source = draw_folders(tmp_path / "source", {"a": 5, "b": 5})
    draw(source / "b" / "two\nlines.png", 99)
    with pytest.raises(UserError, match="unprintable"):
        prepare("folders", source, tmp_path / "d")
    assert not (tmp_path / "d").exists()


# ---- images of more than 8 bits --------------------------------------------------------------------------------------


def draw_11_bits(path, number, size=(12, 10)):
    """Write a grey image of 16 bits whose values are 0 to 2047."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(number).integers(0, 2048, (size[1], size[0]), dtype=np.uint16)
    values[0, :2] = 0, 2047
    Image.fromarray(values).save(path)
    return values


def test_images_of_11_bits_are_cached_in_256_levels_and_their_range_is_kept(tmp_path, capsys):
    values = {name: [draw_11_bits(tmp_path / "s" / name / f"{i}.png", 100 * (name == "b") + i) for i in range(20)]
              for name in "ab"}
    prepare("folders", tmp_path / "s", tmp_path / "d")
    assert "note: of images of more than 8 bits the values 0 to 2047 become 0 to 255; where only" in \
        capsys.readouterr().out
    info = read_info(tmp_path / "d")
    assert info.value_range == (0, 2047)
    samples = read_split(info, "train")
    caches = {limits: ImageCache(info.images, samples, 32, tmp_path / "cache", processes=1, value_range=limits)
              for limits in (info.value_range, None)}
    name, number = samples[0].path.split("/")
    grey = Image.fromarray(np.rint(values[name][int(number[:-4])] / 2047 * 255).astype(np.uint8))
    expected = np.asarray(grey.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    found = caches[info.value_range].array[caches[info.value_range].row_of[samples[0].path]]
    assert np.abs(found - expected).max() <= 1
    assert caches[None].key != caches[info.value_range].key and caches[None].array.max() < 12  # a folder made before
    assert fingerprint(info, {}) != fingerprint(dataclasses.replace(info, value_range=None), {})
    prepare("folders", tmp_path / "s", tmp_path / "given", "--value-range", "0,1023")
    assert read_info(tmp_path / "given").value_range == (0, 1023)
    prepare("folders", tmp_path / "s", tmp_path / "full", "--value-range", "0,65535")
    assert "value_range" not in json.loads((tmp_path / "full" / "dataset.json").read_text())
    prepare("check", tmp_path / "full")
    assert "note: images of more than 8 bits have the values 0 to 2047; dataset.json has no value_range" in \
        capsys.readouterr().out


def test_chips_are_cut_with_the_range_of_all_scenes(tmp_path):
    for split, number in (("train", 1), ("val", 2)):
        draw_dota(tmp_path / split, [corners(0, 0, 10, 10)])
        values = draw_11_bits(tmp_path / split / "images" / "P0001.png", number, (60, 40))
    prepare("dota", tmp_path / "train", tmp_path / "val", tmp_path / "d")
    with Image.open(tmp_path / "d" / "images" / "test" / "ship" / "P0001_0.png") as chip:
        assert (np.asarray(chip) == np.rint(values[:11, :11] / 2047 * 255)).all()
    assert read_info(tmp_path / "d").value_range == (0, 2047)


def test_images_of_8_bits_have_no_range(tmp_path):
    prepare("folders", draw_folders(tmp_path / "s", {"a": 5, "b": 5}), tmp_path / "d")
    content = json.loads((tmp_path / "d" / "dataset.json").read_text())
    assert "value_range" not in content and "value_range" not in content["made_by"]
    (tmp_path / "d" / "dataset.json").write_text(json.dumps({**content, "value_range": [5, 1]}))
    with pytest.raises(UserError, match="'value_range' must be two whole numbers, the lower first"):
        read_info(tmp_path / "d")


# ---- FGSC-23 and the released layout ---------------------------------------------------------------------------------


def test_fgsc23_folders_are_class_ids_in_numeric_order(tmp_path, capsys):
    counts = {f"{split}/{c}": 2 + c % 3 for split in ("train", "test") for c in range(23)}
    prepare("fgsc23", draw_folders(tmp_path / "s", counts), tmp_path / "d", "--val-fraction", 0)
    info = read_info(tmp_path / "d")
    assert info.classes == FGSC23["classes"] and info.groups == FGSC23["groups"] and info.name == "FGSC-23"
    for split in ("train", "test"):
        assert all(Path(sample.path).parent.name == str(sample.label) for sample in read_split(info, split))
        assert counts_of(tmp_path / "d", split) == [2 + c % 3 for c in range(23)]
    printed = capsys.readouterr().out
    assert "note: train: destroyer: found 4 images, published 434" in printed
    assert "note: test: head (together): found 15 images, published 392" in printed
    assert not (tmp_path / "d" / "val.txt").exists()


@pytest.mark.parametrize("name", ["23", "ship", "1_a"])
def test_fgsc23_refuses_a_folder_that_is_no_class_id(tmp_path, name):
    with pytest.raises(UserError, match="expected folders named by class id, 0 to 22"):
        prepare("fgsc23", draw_folders(tmp_path / "s", {"train/0": 2, f"train/{name}": 2, "test/0": 1}), tmp_path / "d")


def released(root, prefix, folder, split_folder, divided_lists, divided_images, count=4):
    """Write the released layout with `count` images of classes 0, 1 and 3 in each split; returns {name: label}."""
    labels, part_of = {}, {label: part for part, ids in enumerate(((0, 2), (1,), (3,)), 1) for label in ids}
    for split in ("train", "test"):
        lines = {part: [] for part in ("", 1, 2, 3)}
        for number in range(3 * count):
            label, name = (0, 1, 3)[number % 3], f"{split}{number}.jpg"
            labels[name] = label
            place = str(part_of[label]) if divided_images else "."
            draw(root / folder / split_folder.format(split) / place / name, len(labels))
            lines[part_of[label]].append(f"{name} {label}")
            lines[""].append(f"{name} {label}")
        for part in (1, 2, 3) if divided_lists else ("",):
            path = root / "anno" / folder / f"{prefix}_{split}{part}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines[part]))  # without a final newline, as released
    return labels


@pytest.mark.parametrize("divided_lists", [False, True])
@pytest.mark.parametrize("divided_images", [False, True])
@pytest.mark.parametrize("kind, prefix, folder, split_folder", [
    ("fgsc23", "FG", "FGSC", "{}"), ("dota", "DOTA", "DOTA", "DOTA_{}")])
def test_released_layout(tmp_path, kind, prefix, folder, split_folder, divided_lists, divided_images):
    labels = released(tmp_path / "s", prefix, folder, split_folder, divided_lists, divided_images)
    prepare(kind, tmp_path / "s", tmp_path / "d")
    info = read_info(tmp_path / "d")
    found = {Path(sample.path).name: sample.label for split in ("train", "val", "test")
             for sample in read_split(info, split)}
    assert found == labels
    assert all((info.images / sample.path).is_file() for sample in read_split(info, "train"))
    assert info.images.resolve() == (tmp_path / "s" / folder).resolve()
    assert not (tmp_path / "d" / "images").exists()


def test_released_lists_and_images_may_lie_apart(tmp_path):
    labels = released(tmp_path / "s", "FG", "FGSC", "{}", False, True)
    (tmp_path / "s" / "FGSC").rename(tmp_path / "images")
    prepare("fgsc23", tmp_path / "s", tmp_path / "images", tmp_path / "d")
    assert sum(counts_of(tmp_path / "d", "train", "val", "test")) == len(labels)
    (tmp_path / "images" / "test" / "2" / "test1.jpg").unlink()
    with pytest.raises(UserError, match=r"FG_test.txt:2: image test1.jpg is in none of the folders"):
        prepare("fgsc23", tmp_path / "s", tmp_path / "images", tmp_path / "d2")
    (tmp_path / "s" / "anno" / "FGSC" / "FG_test.txt").unlink()
    with pytest.raises(UserError, match="needs FG_test.txt, or all three"):
        prepare("fgsc23", tmp_path / "s", tmp_path / "images", tmp_path / "d2")


# ---- DOTA ------------------------------------------------------------------------------------------------------------


def draw_dota(folder, objects, size=(60, 40), stem="P0001"):
    """One image with its label file; objects: lines of labelTxt. Returns the image's grey pixels."""
    draw(folder / "images" / f"{stem}.png", 7, size)
    (folder / "labelTxt").mkdir(exist_ok=True)
    header = "imagesource:GoogleEarth\ngsd:0.139152881468\n"
    (folder / "labelTxt" / f"{stem}.txt").write_text(header + "\n".join(objects))
    with Image.open(folder / "images" / f"{stem}.png") as image:
        return np.asarray(image.convert("L"))


def corners(left, top, right, bottom, name="ship", difficult=" 0"):
    return f"{left} {top} {right} {top} {right} {bottom} {left} {bottom} {name}{difficult}"


def test_dota_cuts_the_horizontal_box_with_its_margin(tmp_path):
    objects = [
        "20 10 30 15 25 25 20 20 ship 0",  # box 20..30 x 10..25: margin .5 on each side in x, .75 in y
        corners(50.0, 30.0, 75.0, 55.0, "plane", " 1"),  # sticks out to the right and below, and is difficult
        corners(5, 5, 6, 6, "harbor", ""),  # one pixel, without the word difficult
        corners(60, 0, 70, 10, "bridge"),  # wholly outside
        corners(0, 20, 0, 20, "roundabout"),  # no area, on the border
    ]
    grey = draw_dota(tmp_path / "train", objects)
    draw_dota(tmp_path / "val", [corners(0, 0, 10, 10)])
    prepare("dota", tmp_path / "train", tmp_path / "val", tmp_path / "d")
    chips = {}
    for path in (tmp_path / "d" / "images" / "train").rglob("*.png"):
        with Image.open(path) as image:
            assert image.mode == "L"
            chips[str(path.relative_to(tmp_path / "d" / "images" / "train"))] = np.asarray(image)
    np.testing.assert_array_equal(chips.pop("ship/P0001_0.png"), grey[9:26, 19:31])
    np.testing.assert_array_equal(chips.pop("plane/P0001_1.png"), grey[28:40, 48:60])
    np.testing.assert_array_equal(chips.pop("harbor/P0001_2.png"), grey[3:7, 3:7])  # widened
    assert chips.pop("roundabout/P0001_4.png").shape == (MIN_EDGE, MIN_EDGE)
    assert not chips
    info = read_info(tmp_path / "d")
    assert info.classes == sorted(DOTA["classes"]) and info.groups == DOTA["groups"] and info.name == "DOTA"
    assert counts_of(tmp_path / "d", "train")[info.classes.index("ship")] == 1
    assert counts_of(tmp_path / "d", "test")[info.classes.index("ship")] == 1


def test_dota_says_what_it_skipped_and_where_counts_deviate(tmp_path, capsys):
    draw_dota(tmp_path / "train", [corners(0, 0, 9, 9), corners(90, 0, 99, 9)])
    draw_dota(tmp_path / "val", [corners(0, 0, 10, 10)])
    prepare("dota", tmp_path / "train", tmp_path / "val", tmp_path / "d")
    printed = capsys.readouterr().out
    assert "lie wholly outside their image: 1, the first at" in printed and "P0001.txt:4" in printed
    assert "note: train: ship: found 1 images, published 28068" in printed
    assert "note: class 9 (ship) has one training image" in printed


@pytest.mark.parametrize("line, words", [
    (corners(0, 0, 9, 9, "container-crane"), r"P0001.txt:4: class 'container-crane' is none of the 15.*v1\.0"),
    ("1 2 3 4 5 6 7 ship 0", "P0001.txt:4: expected 'x1 y1"),
    ("1 2 3 4 5 6 7 nan ship 0", "P0001.txt:4: expected 'x1 y1"),
    ("one 2 3 4 5 6 7 8 ship 0", "P0001.txt:4: expected 'x1 y1"),
])
def test_dota_refuses_a_bad_line(tmp_path, line, words):
    draw_dota(tmp_path / "train", [corners(0, 0, 9, 9), line])
    with pytest.raises(UserError, match=words):
        prepare("dota", tmp_path / "train", tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_dota_needs_a_label_file_an_image_and_each_image_readable(tmp_path):
    draw_dota(tmp_path / "train", [corners(0, 0, 9, 9)] * 4)
    image, label = tmp_path / "train" / "images" / "P0001.png", tmp_path / "train" / "labelTxt" / "P0001.txt"
    draw(image.with_name("P0002.png"), 1)
    with pytest.raises(UserError, match="P0002.png: no label file P0002.txt"):
        prepare("dota", tmp_path / "train", tmp_path / "d")
    image.with_name("P0002.png").rename(image.with_name(".P0002.png"))
    label.with_name("P0003.txt").write_text("")
    with pytest.raises(UserError, match="P0003.txt: no image P0003.png"):
        prepare("dota", tmp_path / "train", tmp_path / "d")
    label.with_name("P0003.txt").unlink()
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])  # the header is whole: the damage shows only when chips are cut
    done = run("dota", tmp_path / "train", tmp_path / "d")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "P0001.png: not readable" in done.stderr
    assert not (tmp_path / "d").exists()


def test_a_failure_leaves_a_folder_that_was_there_as_it_was(tmp_path):
    draw_dota(tmp_path / "train", [corners(0, 0, 9, 9)] * 4)
    image = tmp_path / "train" / "images" / "P0001.png"
    image.write_bytes(image.read_bytes()[:2000])
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mine.md").write_text("mine")
    with pytest.raises(UserError, match="not readable"):
        prepare("dota", tmp_path / "train", tmp_path / "d")
    assert files_under(tmp_path / "d") == ["mine.md"]
    (tmp_path / "d" / "images").mkdir()
    with pytest.raises(UserError, match="images: exists already"):
        prepare("dota", tmp_path / "train", tmp_path / "d")
    assert files_under(tmp_path / "d") == ["images", "mine.md"]


def test_dota_accepts_the_official_nesting(tmp_path):
    draw_dota(tmp_path / "flat", [corners(0, 0, 9, 9)] * 10)
    for name, target in (("images", "part1/images"), ("labelTxt", "labelTxt-v1.0/labelTxt")):
        (tmp_path / "deep" / target).parent.mkdir(parents=True)
        (tmp_path / "flat" / name).rename(tmp_path / "deep" / target)
    prepare("dota", tmp_path / "deep", tmp_path / "d")
    assert [sum(counts_of(tmp_path / "d", split)) for split in ("train", "val", "test")] == [7, 1, 2]


# ---- COCO ------------------------------------------------------------------------------------------------------------


def coco(boxes, categories=((7, "tug/boat"), (3, "plane")), **changes):
    """A COCO file's content with one 60 x 40 image; boxes: [(category id, bbox)]."""
    content = {
        "images": [{"id": 5, "file_name": "one.jpg", "width": 60, "height": 40}],
        "categories": [{"id": number, "name": name} for number, name in categories],
        "annotations": [{"id": 100 + i, "image_id": 5, "category_id": category, "bbox": bbox, "iscrowd": 0}
                        for i, (category, bbox) in enumerate(boxes)],
    }
    return {**content, **changes}


def write_coco(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_coco_crops_squares_in_category_order(tmp_path, capsys):
    boxes = [(7, [20, 10, 10, 5]), (3, [0, 0, 20, 20]), (3, [30, 30, 10, 10]), (3, [100, 0, 5, 5])]
    content = coco(boxes)
    content["annotations"].append({"image_id": 5, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1})
    train = write_coco(tmp_path / "c" / "annotations" / "instances_train.json", content)
    test = write_coco(tmp_path / "c" / "annotations" / "instances_val.json", coco(boxes[:3]))
    draw(tmp_path / "c" / "train" / "one.jpg", 1, (60, 40))
    draw(tmp_path / "c" / "val" / "one.jpg", 2, (60, 40))
    prepare("coco", train, test, tmp_path / "d", "--val-fraction", 0)
    info = read_info(tmp_path / "d")
    assert info.classes == ["plane", "tug/boat"]
    assert counts_of(tmp_path / "d", "train") == [2, 1] == counts_of(tmp_path / "d", "test")
    printed = capsys.readouterr().out
    assert "crowd annotations skipped: 1" in printed and "lie wholly outside their image: 1, the" in printed
    for split in ("train", "val"):
        with Image.open(tmp_path / "c" / split / "one.jpg") as image:
            grey = np.asarray(image.convert("L"))
        with Image.open(tmp_path / "d/images" / split.replace("val", "test") / "tug_boat" / "one_0.png") as chip:
            np.testing.assert_array_equal(np.asarray(chip), grey[7:18, 20:31])  # side 11 around (25, 12.5)


@pytest.mark.parametrize("content, words", [
    ([], "not a COCO annotation file"),
    (coco([], annotations=[3]), "not a COCO annotation file"),
    (coco([(4, [0, 0, 5, 5])]), "annotation 100: image_id 5 or category_id 4"),
    (coco([(3, [0, 0, -5, 5])]), r"annotation 100: bbox \[0, 0, -5, 5\] has a negative"),
    (coco([(3, [0, 0, 5])]), "annotation 100: bbox"),
    ({**coco([]), "annotations": [{"id": 7, "iscrowd": "1"}]}, "annotation 7: iscrowd '1'; expected 0 or 1"),
    (coco([(3, [0, 0, 5, 5])], [(3, "a"), (4, "a")]), "the same id or the same name"),
    (coco([(3, [0, 0, 5, 5])], [(3, "a\tb")]), r"category \(3, 'a.tb'\); expected .* a name of printable characters"),
    (coco([(3, [0, 0, 5, 5])], images=[{"id": 5, "file_name": "two.jpg"}]), "image two.jpg is not beside"),
    (coco([(3, [0, 0, 5, 5])], images=[{"id": 5, "file_name": "one.jpg", "width": 6, "height": 4}]), "says 6 x 4"),
    (coco([(3, [0, 0, 5, 5])], images=[{"id": 5}]), "image 5 has no file_name"),
    (coco([], images=[{"id": 5}, {"id": 5}]), "two images have the same id"),
    (coco([(3, [30 + i, 20, 40 + i, 30]) for i in range(5)]), "5 of 5 boxes reach outside their.* probably corners"),
    (coco([(3, [0.1, 0.2, 0.5, 0.5])] * 5), "5 of 5 boxes lie within the first pixel.* divided by the size"),
])
def test_coco_files_that_are_wrong_are_refused(tmp_path, content, words):
    draw(tmp_path / "c" / "one.jpg", 1, (60, 40))
    with pytest.raises(UserError, match=words):
        prepare("coco", write_coco(tmp_path / "c" / "a.json", content), tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_coco_takes_images_from_a_named_folder_and_refuses_other_categories(tmp_path):
    boxes = [(3, [i, 0, 9, 9]) for i in range(9)] + [(7, [i, 20, 9, 9]) for i in range(5)]
    train = write_coco(tmp_path / "c" / "train.json", coco(boxes))
    draw(tmp_path / "far" / "away" / "one.jpg", 1, (60, 40))
    prepare("coco", train, tmp_path / "d", "--images", tmp_path / "far" / "away")
    assert counts_of(tmp_path / "d", "test") == [2, 1]
    assert all(sample.path.startswith("test/") for sample in read_split(read_info(tmp_path / "d"), "test"))
    other = write_coco(tmp_path / "c" / "test.json", coco(boxes, [(3, "plane"), (7, "tug")]))
    with pytest.raises(UserError, match="categories differ"):
        prepare("coco", train, other, tmp_path / "d2", "--images", tmp_path / "far" / "away")


# ---- long tail, parts, groups ----------------------------------------------------------------------------------------


def test_explicit_thresholds_win_over_published_groups_and_count_train_with_val(tmp_path):
    source = draw_folders(tmp_path / "s", {"train/0": 10, "train/1": 6, "train/2": 3, "test/0": 1})
    prepare("fgsc23", source, tmp_path / "d", "--head-min", 10, "--tail-max", 3)
    info = read_info(tmp_path / "d")
    assert info.groups["head"] == [0] and info.groups["middle"] == [1] and 2 in info.groups["tail"]
    assert "at least 10" in info.group_rule and "at most 3" in info.group_rule
    prepare("fgsc23", source, tmp_path / "d2", "--imbalance", 5)
    assert "thirds" in read_info(tmp_path / "d2").group_rule


def test_the_long_tail_leaves_the_test_part_and_the_seed_decides(tmp_path, capsys):
    source = draw_folders(tmp_path / "s", {"a": 40, "b": 40, "c": 40, "d": 40})
    made = {}
    for name, seed, more in (("one", 1, ()), ("same", 1, ()), ("other", 2, ()), ("even", 1, ("--max-per-class", 20))):
        tail = more or ("--imbalance", 8)
        prepare("folders", source, tmp_path / name, "--seed", seed, *tail)
        made[name] = [(tmp_path / name / f"{split}.txt").read_text() for split in ("train", "val", "test")]
    assert made["one"] == made["same"]
    assert all(one != other for one, other in zip(made["one"], made["other"], strict=True))
    assert made["one"][2] == made["even"][2] and made["one"][0] != made["even"][0]
    assert counts_of(tmp_path / "one", "train", "val") == [32, 16, 8, 4]
    assert counts_of(tmp_path / "one", "val") == [3, 2, 1, 1]
    assert counts_of(tmp_path / "one", "test") == [8, 8, 8, 8]
    assert counts_of(tmp_path / "even", "train", "val") == [20] * 4
    assert json.loads((tmp_path / "one" / "dataset.json").read_text())["made_by"]["imbalance"] == 8
    assert "note: group head is empty" in capsys.readouterr().out  # of the even one


# ---- check -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sound(tmp_path):
    """A small data set without any fault: 3 classes, one a group."""
    source = draw_folders(tmp_path / "source", {"a": 20, "b": 10, "c": 5})
    prepare("folders", source, tmp_path / "made")
    return tmp_path / "made"


def findings(root, capsys):
    """(exit status, the lines that `check` printed after the table)."""
    capsys.readouterr()
    status = prepare("check", root)
    lines = capsys.readouterr().out.splitlines()
    return status, [line for line in lines if line.startswith(("error:", "note:"))], lines[-1]


def test_check_reports_every_bad_line_of_a_list(sound, capsys):
    path = sound / "train.txt"
    good = path.read_text().splitlines()
    bad = ["a/1.png 3", "nolabel.png", "../x.png 0", "a/absent.png 0", ""]
    path.write_text("\n".join(bad + good))
    status, found, last = findings(sound, capsys)
    assert status == 1 and last == "4 errors, 0 notes"
    assert [line.split(": ")[1] for line in found] == [f"{path}:{number}" for number in (1, 2, 3, 4)]
    assert "label 3 is out of range; expected 0..2" in found[0] and "no such image" in found[3]


def test_check_finds_images_in_two_splits_with_two_labels_and_twice(sound, capsys):
    info = read_info(sound)
    test, train = read_split(info, "test"), read_split(info, "train")
    by_label = {label: [s.path for s in train if s.label == label] for label in range(3)}
    with Image.open(info.images / test[0].path) as image:  # equal pixels in another file and format
        image.save(info.images / "a" / "leak.bmp")
    (info.images / "a" / "copy.png").write_bytes((info.images / by_label[1][0]).read_bytes())
    with open(sound / "train.txt", "a") as file:
        file.write(f"a/leak.bmp {test[0].label}\na/copy.png 0\n{by_label[2][0]} 2\n")
    status, found, last = findings(sound, capsys)
    assert status == 1 and last == "2 errors, 1 note"
    assert any("the same image is in train and test" in line and "a/leak.bmp" in line for line in found)
    assert any("the same image has the labels 0, 1" in line and "a/copy.png" in line for line in found)
    assert found[-1].startswith("note: the same image is 2 times in train") and by_label[2][0] in found[-1]


def test_check_finds_unreadable_images_and_links_that_leave(sound, tmp_path, capsys):
    info = read_info(sound)
    first, second = read_split(info, "train")[:2]
    (info.images / first.path).write_bytes(b"not an image")
    draw(tmp_path / "outside.png", 1000)
    (info.images / second.path).unlink()
    (info.images / second.path).symlink_to(tmp_path / "outside.png")
    status, found, last = findings(sound, capsys)
    assert status == 1 and last == "2 errors, 0 notes"
    assert f"{first.where}: {first.path}: not an image that Pillow can read" in found[0]
    assert "is a link out of the image folder" in found[1]


def test_check_finds_groups_and_classes_without_images(sound, capsys):
    for split in ("train", "val", "test"):
        lines = (sound / f"{split}.txt").read_text().splitlines()
        gone = {"train": "0", "val": "0", "test": "1"}[split]
        (sound / f"{split}.txt").write_text("\n".join(line for line in lines if line[-1] != gone))
    status, found, _ = findings(sound, capsys)
    assert status == 1 and len(found) == 3
    assert "error: group head has no training images" in found[0]
    assert "error: class 0 (a) has no training images; it has 4 elsewhere" in found[1]
    assert "note: class 1 (b) has no test images" in found[2]

    content = json.loads((sound / "dataset.json").read_text())
    content["groups"] = {"head": [0, 1], "middle": [], "tail": [2]}
    (sound / "dataset.json").write_text(json.dumps(content))
    (sound / "val.txt").unlink()
    status, found, _ = findings(sound, capsys)
    assert status == 1 and "error: group middle has no class" in found[0]
    assert any(line.startswith("note: no val.txt") for line in found)
    (sound / "test.txt").unlink()
    assert any("test.txt: no such list" in line for line in findings(sound, capsys)[1])


# ---- real aerial images ----------------------------------------------------------------------------------------------


@pytest.mark.real_data
def test_dota_examples_give_694_chips(tmp_path, capsys):
    prepare("dota", real("dota_examples"), tmp_path / "d")
    counts = dict(zip(DOTA["classes"], counts_of(tmp_path / "d", "train", "val", "test"), strict=True))
    assert {name: count for name, count in counts.items() if count} == {
        "ship": 531, "large-vehicle": 53, "plane": 49, "small-vehicle": 23, "swimming-pool": 10, "tennis-court": 10,
        "helicopter": 9, "harbor": 5, "baseball-diamond": 2, "roundabout": 1, "ground-track-field": 1}
    assert len(list((tmp_path / "d" / "images").rglob("*.png"))) == 694
    assert prepare("check", tmp_path / "d") == 1
    errors = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error: ")]
    absent = [name for name, count in counts.items() if not count]
    assert errors == [f"error: class {DOTA['classes'].index(name)} ({name}) has no training images" for name in absent]


@pytest.mark.real_data
def test_nwpu_follows_the_profile(tmp_path):
    folder = real("nwpu_vhr10")
    prepare("coco", folder / "instances_train2017.json", folder / "instances_val2017.json", tmp_path / "d",
            "--imbalance", 40, "--max-per-class", 400)
    counts = counts_of(tmp_path / "d", "train", "val")
    assert sorted(counts, reverse=True) == [round(400 * 40 ** (-i / 9)) for i in range(10)]
    available = [562, 230, 470, 325, 404, 137, 134, 205, 96, 426]
    assert np.argsort(counts).tolist() == np.argsort(available).tolist()
    assert counts_of(tmp_path / "d", "test") == [195, 68, 192, 66, 120, 22, 29, 34, 28, 178]
    info = read_info(tmp_path / "d")
    assert [len(info.groups[group]) for group in ("head", "middle", "tail")] == [3, 4, 3]
    assert prepare("check", tmp_path / "d") == 0


@pytest.mark.real_data
def test_uc_merced_becomes_long_tailed(tmp_path):
    prepare("folders", real("uc_merced"), tmp_path / "d", "--imbalance", 20)
    assert counts_of(tmp_path / "d", "train", "val") == [round(80 * 20 ** (-i / 20)) for i in range(21)]
    assert counts_of(tmp_path / "d", "test") == [20] * 21
    assert [len(ids) for ids in read_info(tmp_path / "d").groups.values()] == [7, 7, 7]
