"""What is wrong with annotations, as check_data says it, and images that are both trained on and tested."""

import re

import numpy as np
import pytest

from common.runtime import UserError, run_script
from detection import check_data
from detection.data.annotations import check_apart, for_training, read_annotations
from tests.support import draw_noise, real, run_program
from tests.support import write_coco as coco
from tests.support import write_voc as voc


def check(capsys, *arguments):
    """(exit status, output) of check_data in this process."""
    status = check_data.main([*map(str, arguments), "--processes", "1"])
    return status, capsys.readouterr().out


def test_check_data_counts_and_finds_nothing_wrong(tmp_path, capsys):
    path = coco(tmp_path, [{"bbox": [1, 2, 31, 33], "area": 1023}, {"bbox": [1, 2, 32, 32]},
                           {"bbox": [0, 0, 9, 9], "iscrowd": 1},
                           {"bbox": [0, 0, 9, 9], "category_id": 9, "area": 9216}])
    status, out = check(capsys, path)
    lines = out.splitlines()
    assert [line.split() for line in lines[1:5]] == [
        ["id", "class", "objects", "images", "difficult", "small", "medium", "large"],
        ["0", "plane", "3", "1", "1", "2", "1", "0"],
        ["1", "ship", "1", "1", "0", "0", "0", "1"],
        ["all", "classes", "4", "1", "1", "2", "1", "1"]]
    assert lines[5] == "2 images, 1 of them without objects"
    assert lines[-2].startswith(f"note: {path}: images without objects, trained on as background: 1, the first: ")
    assert status == 0 and lines[-1] == "0 errors, 2 notes: fit for training and testing"


def test_check_data_lists_every_error_and_exits_with_1(tmp_path):
    path = coco(tmp_path, [{"bbox": [1, 2, 0, 5]}, {"bbox": [99, 2, 3, 4]}, {"bbox": [1, 2, 3, 4]}])
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    draw_noise(tmp_path / "images" / "b.png", size=(40, 60))
    done = run_program("-m", "detection.check_data", path)
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    expected = ["annotation 100: box [1, 2, 0, 5] has no area", "annotation 101: box [99, 2, 3, 4] lies outside",
                "a.png: not an image that Pillow can read", "b.png: is 40 x 60 pixels; expected 60 x 40"]
    assert all(words in error for words, error in zip(expected, errors, strict=True)), errors
    assert done.returncode == 1 and done.stderr == ""
    assert done.stdout.splitlines()[-1] == "4 errors, 2 notes: not fit for training and testing"


def test_check_data_given_garbage_says_one_line_and_exits_with_2(tmp_path, capsys):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(SystemExit) as exit_:
        run_script(lambda: check_data.main([str(tmp_path / "a.json")]))
    said = capsys.readouterr()
    assert exit_.value.code == 2 and said.out == ""
    assert re.fullmatch(r"error: .*a\.json:1: not valid JSON .*\n", said.err)


def test_check_data_finds_images_of_training_among_those_of_testing(tmp_path, capsys):
    train = coco(tmp_path / "a", [{"bbox": [1, 2, 3, 4]}])
    test = coco(tmp_path / "b", [{"bbox": [1, 2, 3, 4]}], images=((7, "z.png"), (3, "y.png")))
    assert check(capsys, train, test)[0] == 0
    (tmp_path / "b" / "images" / "z.png").write_bytes((tmp_path / "a" / "images" / "b.png").read_bytes())
    status, out = check(capsys, train, test)
    assert status == 1
    assert re.search(r"\nerror: the same image is in 2 sources, so that what is tested was trained on: "
                     r"\S*a/images/b\.png \(\S*\); \S*b/images/z\.png \(\S*\)\n", out), out


def test_a_file_is_not_both_trained_on_and_tested(tmp_path, capsys, monkeypatch):
    path = coco(tmp_path, [{"bbox": [1, 2, 3, 4]}])
    monkeypatch.chdir(tmp_path)
    for spelling in (path, "train.json", "./train.json", "../" + tmp_path.name + "/train.json"):
        status, out = check(capsys, path, spelling)
        assert status == 1 and "\nerror: the same image is in 2 sources" in out
        with pytest.raises(UserError, match=r"train\.json: 2 of its 2 images are trained on too, the first: .*a\.png"):
            check_apart(read_annotations(path), read_annotations(spelling))
        with pytest.raises(UserError, match=r"\A.*a\.png is also in.*\Z"):  # in one line
            read_annotations(f"{path},{spelling}")
    other = coco(tmp_path / "b", [{"bbox": [1, 2, 3, 4]}])
    check_apart(read_annotations(path), read_annotations(other))
    (tmp_path / "b" / "images" / "b.png").unlink()
    (tmp_path / "b" / "images" / "b.png").symlink_to(tmp_path / "images" / "b.png")
    with pytest.raises(UserError, match="1 of its 2 images are trained on too"):
        check_apart(read_annotations(path), read_annotations(other))


def test_check_data_takes_the_folder_of_the_images_to_test_on(tmp_path, capsys):
    train, test = (coco(tmp_path / part, [{"bbox": [1, 2, 3, 4]}], images=images)
                   for part, images in (("a", ((7, "a.png"), (3, "b.png"))), ("b", ((7, "y.png"), (3, "z.png")))))
    for part in "ab":
        (tmp_path / part / "images").rename(tmp_path / f"images_{part}")
    assert check(capsys, train, test, "--images", tmp_path / "images_a", "--test-images", tmp_path / "images_b")[0] == 0


def test_check_data_notes_what_is_odd(tmp_path, capsys):
    path = coco(tmp_path, [{"bbox": [50, 2, 30, 4]}, {"bbox": [1, 2, 3, 4]}, {"bbox": [1, 2, 3, 4]}],
                images=((7, "a.png"), (3, "b.png"), (4, "c.png")))
    (tmp_path / "images" / "c.png").write_bytes((tmp_path / "images" / "b.png").read_bytes())
    status, out = check(capsys, path)
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    expected = ["boxes that reach outside their image: 1, the first: ",
                "boxes that are there more than once: 1, the first: ",
                "images without objects, trained on as background: 2, the first: ",
                "classes without objects: 1, the first: ship", "the same image is 2 times in "]
    assert all(words in note for words, note in zip(expected, notes, strict=True)), notes
    assert status == 0 and "plane [1.0, 2.0, 4.0, 6.0]" in notes[1]
    assert out.splitlines()[-1] == "0 errors, 5 notes: fit for training and testing"


def test_check_data_notes_small_images_and_calls_data_without_objects_unfit(tmp_path, capsys):
    status, out = check(capsys, voc(tmp_path / "a", {"1": [("cat", 1, 1, 9, 9, "")]}, size=(60, 31)))
    assert status == 1 and "images with a side below 32 pixels, not trained on: 1" in out
    assert "trainval.txt: no object that could be trained on\n" in out
    train = voc(tmp_path / "b", {"1": [("cat", 1, 1, 9, 9, "")]})
    with pytest.raises(UserError, match=r"test\.txt: unknown category 'dog' \(in 2\.jpg\); expected cat"):
        check(capsys, train, voc(tmp_path / "c", {"2": [("dog", 1, 1, 9, 9, "")]}, split="test"))


# ---- real images -----------------------------------------------------------------------------------------------------


@pytest.mark.real_data
def test_nwpu_has_the_published_counts_and_nothing_wrong(capsys):
    folder = real("nwpu_vhr10")
    train, test = (read_annotations(folder / f"instances_{part}2017.json") for part in ("train", "val"))
    counts = [np.bincount(np.concatenate([record.labels for record in part.records])) for part in (train, test)]
    assert counts[0].tolist() == [562, 230, 470, 325, 404, 137, 134, 205, 96, 426]
    assert counts[1].tolist() == [195, 68, 192, 66, 120, 22, 29, 34, 28, 178]
    assert (len(train.records), len(test.records)) == (520, 130) and train.classes == test.classes
    assert len(for_training(train).records) == 520
    status, out = check(capsys, test.source)
    assert status == 0 and out.endswith("0 errors, 0 notes: fit for training and testing\n")
