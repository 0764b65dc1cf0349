"""prepare_dataset.py as a user runs it: what it makes and refuses, images of more than 8 bits, the long tail, the parts
and groups."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

import prepare_dataset
from common.image_cache import ImageCache
from common.runtime import UserError
from dataset import fingerprint, read_info, read_split
from tests.support import counts_of, draw_folders, error_line, prepare, run_program, run_tool, write_dota

pytestmark = pytest.mark.usefixtures("without_pictures")


def files_under(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_makes_a_data_set_and_refuses_to_overwrite_it(tmp_path, capsys):
    source = draw_folders(tmp_path / "source", {"train/plane": 10, "train/ship": 4, "test/plane": 2, "test/ship": 2})
    done = run_program("prepare_dataset.py", "folders", source, tmp_path / "made")
    assert (done.returncode, done.stderr) == (0, "")
    assert "plane" in done.stdout and "is ready" in done.stdout
    assert files_under(tmp_path / "made") == ["class_counts.png", "dataset.json", "test.txt", "train.txt", "val.txt"]
    before = {path: path.read_bytes() for path in (tmp_path / "made").iterdir()}

    assert run_tool(prepare_dataset, "folders", source, tmp_path / "made", "--seed", 5) == 2
    assert "holds a dataset.json already" in error_line(capsys)
    assert before == {path: path.read_bytes() for path in (tmp_path / "made").iterdir()}


def test_check_passes_what_the_command_made_and_fails_what_is_none(tmp_path, capsys):
    source = draw_folders(tmp_path / "source", {"a": 20, "b": 10, "c": 5})
    prepare("folders", source, tmp_path / "made")
    assert run_tool(prepare_dataset, "check", tmp_path / "made") == 0
    assert capsys.readouterr().out.endswith("0 errors, 0 notes\n")
    assert run_tool(prepare_dataset, "check", source) == 2
    assert "no dataset.json" in error_line(capsys)


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


def test_a_failure_leaves_a_folder_that_was_there_as_it_was(tmp_path):
    write_dota(tmp_path / "train", {"P0001": ((60, 40), ["0 0 9 0 9 9 0 9 ship 0"] * 4)})
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


def test_images_of_8_bits_have_no_range(tmp_path):
    prepare("folders", draw_folders(tmp_path / "s", {"a": 5, "b": 5}), tmp_path / "d")
    content = json.loads((tmp_path / "d" / "dataset.json").read_text())
    assert "value_range" not in content and "value_range" not in content["made_by"]
    (tmp_path / "d" / "dataset.json").write_text(json.dumps({**content, "value_range": [5, 1]}))
    with pytest.raises(UserError, match="'value_range' must be two whole numbers, the lower first"):
        read_info(tmp_path / "d")


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
