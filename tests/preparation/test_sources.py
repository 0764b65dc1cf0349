"""Images that lie one file an object, as users have them: class folders, FGSC-23's, and the released lists."""

from pathlib import Path

import pytest

from common.runtime import UserError
from dataset import read_info, read_split
from recognition.published import FGSC23
from tests.support import counts_of, draw_folders, draw_noise, prepare, real

pytestmark = pytest.mark.usefixtures("without_pictures")


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
    draw_noise(source / "a" / "2019" / "may" / "1.jpg")
    (source / "a" / "2019" / "may" / "1.jpg").rename(source / "a" / "2019" / "may" / "1.jfif")
    draw_noise(source / "b" / ".thumbnails" / "1.png")
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
    draw_noise(source / "b" / "two\nlines.png")
    with pytest.raises(UserError, match="unprintable"):
        prepare("folders", source, tmp_path / "d")
    assert not (tmp_path / "d").exists()


@pytest.mark.real_data
def test_uc_merced_becomes_long_tailed(tmp_path):
    prepare("folders", real("uc_merced"), tmp_path / "d", "--imbalance", 20)
    assert counts_of(tmp_path / "d", "train", "val") == [round(80 * 20 ** (-i / 20)) for i in range(21)]
    assert counts_of(tmp_path / "d", "test") == [20] * 21
    assert [len(ids) for ids in read_info(tmp_path / "d").groups.values()] == [7, 7, 7]


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
            draw_noise(root / folder / split_folder.format(split) / place / name)
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
