"""What a user can get wrong: each is one line on stderr that names the place, exit status 2, and nothing is written."""

import importlib.util
import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

import baseline_cl_s_weight
import baseline_cl_t1
import baseline_cl_t2
import baseline_cl_t3
import baseline_resnet50
import dota_baseline_cl_t2
from resnet50 import ResNet50
from tests.support import QUICK, TINY_GROUPS, draw_tiny, run_main, run_program


def replace_line(path, number, line):
    lines = path.read_text().split("\n")
    lines[number - 1] = line
    path.write_text("\n".join(lines))


def change_groups(root, **groups):
    content = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps({**content, "groups": groups}))


def truncate(path):
    path.write_bytes(path.read_bytes()[:150])


def drop_class(root, split, label):
    path = root / f"{split}.txt"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.endswith(f" {label}\n")))


def add_line(path, line):
    path.write_text(f"{path.read_text()}{line}\n")


def link(root, name, target):
    os.link(root / "images" / target, root / "images" / name)
    add_line(root / "train.txt", f"{name} 0")


DAMAGE = [
    (lambda root: add_line(root / "train.txt", "test_0_1.png 0"),
     r"test\.txt:2: image test_0_1\.png is also at .*train\.txt:53; expected an image in one list alone"),
    (lambda root: add_line(root / "train.txt", "./val_1_0.png 1"), r"val\.txt:3: .*val_1_0\.png is also at .*train"),
    (lambda root: link(root, "copy.png", "test_0_1.png"), r"test\.txt:2: image test_0_1\.png is also at .*train"),
    (lambda root: add_line(root / "train.txt", ".//train_0_0.png 1"),
     r"train\.txt:53: image \.//train_0_0\.png has the label 1 here and 0 at .*train\.txt:1; remove one"),
    (lambda root: replace_line(root / "train.txt", 3, "train_0_2.png"), r"train\.txt:3: expected 'relative/path "),
    (lambda root: replace_line(root / "train.txt", 4, "a.png 6"), r"train\.txt:4: label 6 is out of range; .* 0\.\.5"),
    (lambda root: replace_line(root / "test.txt", 2, "../a.png 1"), r"test\.txt:2: path '\.\./a\.png' leaves the "),
    (lambda root: replace_line(root / "val.txt", 1, "gone.png 1"), r"val\.txt:1: no such image: .*gone\.png"),
    (lambda root: truncate(root / "images" / "train_1_0.png"), r"train\.txt:15: .*train_1_0\.png: not readable as an"),
    (lambda root: drop_class(root, "train", 4), r"train\.txt: class 4 \(e\) has no training image"),
    (lambda root: (root / "val.txt").unlink(), r"val\.txt: no held-out part .*--val-fraction, or give --select test"),
    (lambda root: (root / "test.txt").unlink(), r"test\.txt: no such list"),
    (lambda root: (root / "train.txt").write_text("\n\n"), r"train\.txt: the list is empty"),
    (lambda root: (root / "train.txt").write_bytes(b"a.png 1\n\xff\xfe 1\n"), r"train\.txt:2: not UTF-8 text"),
    (lambda root: (root / "dataset.json").write_text("{"), r"dataset\.json:1: not valid JSON"),
    (lambda root: (root / "dataset.json").unlink(), r"no dataset\.json here; make the data set with prepare_dataset"),
]


def assert_one_line(capsys, complaint):
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert re.search(complaint, error), error


@pytest.mark.parametrize("damage, complaint", DAMAGE)
def test_a_damaged_data_set_stops_the_baseline(own_tiny, tmp_path, capsys, damage, complaint):
    damage(own_tiny)
    output = tmp_path / "b"
    assert run_main(baseline_resnet50, "--data-root", own_tiny, "--output", output, "--init", "none", *QUICK) == 2
    assert_one_line(capsys, complaint)
    assert not output.exists()
    assert not list(own_tiny.rglob("*.npy")) and not list(own_tiny.rglob("*.partial"))


@pytest.mark.parametrize("stage, group", [(baseline_cl_t1, "head"), (baseline_cl_t2, "middle"),
                                          (baseline_cl_t3, "tail"), (baseline_cl_s_weight, "tail")])
def test_a_group_without_classes(own_tiny, tmp_path, capsys, stage, group):
    others = [name for name in ("head", "middle", "tail") if name != group]
    change_groups(own_tiny, **{group: [], others[0]: [0, 1, 2], others[1]: [3, 4, 5]})
    assert run_main(stage, "--data-root", own_tiny, "--output", tmp_path / "s", "--init", "none", *QUICK) == 2
    assert_one_line(capsys, rf"dataset\.json: the group '{group}' holds no class, and stage \w+ needs one")
    assert not (tmp_path / "s").exists()


def test_fewer_images_than_a_batch(own_tiny, tmp_path, capsys):
    assert run_main(baseline_cl_t3, "--data-root", own_tiny, "--output", tmp_path / "t3", "--init", "none",
                    *QUICK, "--batch-size", "10") == 2
    assert_one_line(capsys, r"train\.txt: stage t3 has 9 training images, fewer than a batch of 10; give a smaller")


@pytest.mark.parametrize("stage, flags, complaint", [
    (baseline_cl_t1, (), r"baseline/best\.pt: no checkpoint of baseline here; run baseline_resnet50\.py .*--init"),
    (baseline_cl_t2, ("--init", "none"), r"t1/best\.pt: no checkpoint of t1 here; run baseline_cl_t1\.py .*--t1"),
    (dota_baseline_cl_t2, ("--init", "none"), r"no checkpoint of t1 here; run dota_baseline_cl_t1\.py first"),
    (dota_baseline_cl_t2, (), r"no checkpoint of baseline here; run dota_baseline_resnet50\.py first"),
    (baseline_resnet50, ("--init", "absent.pt"), r"absent\.pt: no such checkpoint"),
    (baseline_resnet50, ("--device", "gpu"), r"--device gpu: unknown device; expected auto, cpu"),
    (baseline_resnet50, ("--init", "none", "--sampler", "self-calibrated"), r"--sampler self-calibrated: needs"),
    (baseline_resnet50, ("--epochs", "0"), r"--epochs 0: expected 1 to"),
    (baseline_resnet50, ("--init", "baseline"), r"--init baseline: this is the baseline; expected none, imagenet or"),
    (baseline_resnet50, ("--init", "none", "--batch-size", "1"), r"--batch-size 1: leaves each process one image"),
    (baseline_resnet50, ("--seed", "-1"), r"--seed -1: expected 0 to"),
    (baseline_cl_s_weight, ("--test-only", "--weights", "gone.pt"), r"gone\.pt: no such checkpoint"),
])
def test_a_setting_that_cannot_be(tiny, tmp_path, capsys, stage, flags, complaint):
    flags = ("--data-root", tiny, "--output", tmp_path / "run" / "here", *QUICK, *flags)
    assert run_main(stage, *flags) == 2
    assert_one_line(capsys, complaint)
    assert not (tmp_path / "run").exists()


def test_tensorboard_without_its_package(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    flags = ("--data-root", tiny, "--output", tmp_path / "run", "--init", "none", *QUICK, "--tensorboard")
    assert run_main(baseline_resnet50, *flags) == 2
    assert_one_line(capsys, "--tensorboard: the package is not installed; pip install tensorboard")
    assert not (tmp_path / "run").exists()


def write_checkpoint(kind, path):
    torch.manual_seed(0)
    if kind == "other class count":
        torch.save(ResNet50(23).state_dict(), path)
    elif kind == "no state dict":
        torch.save(["a", "list"], path)
    elif kind == "truncated":
        torch.save(ResNet50(6).state_dict(), path)
        path.write_bytes(path.read_bytes()[:1_000_000])
    elif kind == "random bytes":
        path.write_bytes(os.urandom(4096))
    elif kind == "other class order":
        save_described(path, classes=list("bacdef"))


def save_described(path, **change):
    """A checkpoint as T1 of the tiny data would leave it, but for `change`."""
    description = {"stage": "t1", "classes": list("abcdef"), "groups": TINY_GROUPS, "epoch": 1, "selected_on": "val",
                   "preprocessing": {"image_size": 32}}
    torch.save({"model": ResNet50(6).state_dict(), "description": {**description, **change}}, path)


CHECKPOINTS = {
    "other class count": r"is for 23 classes; the data set has 6", "no state dict": "not a state dict",
    "truncated": r"not a usable checkpoint \(truncated, damaged", "random bytes": "not a usable checkpoint",
    "other class order": r"its class 0 is 'b', that of .*dataset\.json is 'a'; expected the same classes",
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_wrong_checkpoint_cannot_be_tested(tiny, tmp_path, capsys, kind):
    write_checkpoint(kind, tmp_path / "weights.pt")
    assert run_main(baseline_cl_s_weight, "--test-only", "--weights", tmp_path / "weights.pt", "--data-root", tiny,
                    "--output", tmp_path / "test", "--device", "cpu") == 2
    assert_one_line(capsys, r"weights\.pt: " + CHECKPOINTS[kind])
    assert not (tmp_path / "test").exists()


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_wrong_checkpoint_cannot_teach(tiny, tmp_path, capsys, kind):
    write_checkpoint(kind, tmp_path / "t1.pt")
    assert run_main(baseline_cl_t2, "--t1", tmp_path / "t1.pt", "--data-root", tiny, "--init", "none", "--output",
                    tmp_path / "t2", *QUICK) == 2
    assert_one_line(capsys, r"t1\.pt: " + CHECKPOINTS[kind])
    assert not (tmp_path / "t2").exists()


@pytest.mark.parametrize("change, complaint", [
    ({"classes": list("abcde")}, "its class 5 is None, that of .* is 'f'"),
    ({"stage": "student"}, "is a checkpoint of stage student; expected one of t1, or a baseline"),
    ({"groups": {"head": [0], "middle": [1, 2, 3], "tail": [4, 5]}}, "with other head, middle and tail classes"),
    ({"preprocessing": {"image_size": 224}}, "was trained at 224 pixels; this run is at 32; give --image-size 224"),
    ({"preprocessing": {"image_size": 32, "value_range": [0, 2047]}},
     r"was trained with the value range \[0, 2047\], that of .*dataset\.json is None; train the teachers anew"),
])
def test_a_teacher_of_another_run_cannot_teach(tiny, tmp_path, capsys, change, complaint):
    save_described(tmp_path / "t1.pt", **change)
    assert run_main(baseline_cl_t2, "--t1", tmp_path / "t1.pt", "--data-root", tiny, "--init", "none", "--output",
                    tmp_path / "t2", *QUICK) == 2
    assert_one_line(capsys, r"t1\.pt: .*" + complaint)
    assert not (tmp_path / "t2").exists()


def test_one_file_as_two_teachers_must_be_fit_to_be_each(tiny, tmp_path, capsys):
    save_described(tmp_path / "t1.pt")
    assert run_main(baseline_cl_t3, "--t1", tmp_path / "t1.pt", "--t2", tmp_path / "t1.pt", "--data-root", tiny,
                    "--init", "none", "--output", tmp_path / "t3", *QUICK) == 2
    assert_one_line(capsys, r"t1\.pt: is a checkpoint of stage t1; expected one of t2, or a baseline")


def test_a_baseline_of_other_classes_is_no_start(tiny, tmp_path, capsys):
    save_described(tmp_path / "other.pt", classes=list("bacdef"))
    assert run_main(baseline_cl_t1, "--init", tmp_path / "other.pt", "--data-root", tiny, "--output", tmp_path / "t1",
                    *QUICK) == 2
    assert_one_line(capsys, r"other\.pt: its class 0 is 'b'")


def test_a_run_does_not_go_on_with_other_lists(own_tiny, without_pictures, tmp_path, capsys):
    flags = ("--data-root", own_tiny, "--output", tmp_path / "b", "--init", "none", *QUICK, "--epochs", "1")
    assert run_main(baseline_resnet50, *flags) == 0
    (tmp_path / "b" / "results.json").unlink()
    path = own_tiny / "train.txt"
    path.write_text("".join(path.read_text().splitlines(True)[1:]))
    capsys.readouterr()
    assert run_main(baseline_resnet50, *flags, "--resume") == 2
    assert_one_line(capsys, "holds a run on other lists, classes or groups")


def test_a_checkpoint_that_no_run_can_go_on_from(tiny, without_pictures, tmp_path, capsys):
    flags = ("--data-root", tiny, "--output", tmp_path / "b", "--init", "none", *QUICK, "--epochs", "1")
    assert run_main(baseline_resnet50, *flags) == 0
    (tmp_path / "b" / "results.json").unlink()
    torch.save({"model": {}}, tmp_path / "b" / "last.pt")
    capsys.readouterr()
    assert run_main(baseline_resnet50, *flags, "--resume") == 2
    assert_one_line(capsys, r"last\.pt: not a checkpoint that this run can go on from")


def test_unusual_images_are_converted_and_trained_on(without_pictures, tmp_path):
    root = draw_tiny(tmp_path / "tiny")
    pixels = np.full((30, 50), 90, np.uint8)
    for number, image in enumerate((Image.fromarray(pixels.astype(np.uint16) * 257),
                                    Image.fromarray(pixels).convert("RGB").convert("CMYK"),
                                    Image.fromarray(pixels))):
        name = f"unusual{number}.{('png', 'jpg', 'gif')[number]}"
        more = {"save_all": True, "append_images": [Image.fromarray(pixels + 100)]} if number == 2 else {}
        image.save(root / "images" / name, **more)
        replace_line(root / "train.txt", number + 1, f"{name} 0")
    assert run_main(baseline_resnet50, "--data-root", root, "--output", tmp_path / "b", "--init", "none", *QUICK,
                    "--epochs", "1") == 0


def test_a_user_sees_one_line_and_no_traceback(tmp_path):
    done = run_program("baseline_resnet50.py", "--data-root", tmp_path / "nowhere", "--output", tmp_path / "b")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (f"error: {tmp_path / 'nowhere'}: no dataset.json here; make the data set with "
                           "prepare_dataset.py, or give --data-root\n")
