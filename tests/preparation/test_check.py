"""What is wrong with a data set, as `prepare_dataset.py check` says it."""

import json

import pytest
from PIL import Image

from dataset import read_info, read_split
from tests.support import draw_folders, draw_noise, prepare

pytestmark = pytest.mark.usefixtures("without_pictures")


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
    draw_noise(tmp_path / "outside.png")
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
