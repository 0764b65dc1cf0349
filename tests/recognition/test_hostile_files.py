"""Files made to do harm, and whole programs that are given garbage: one line, exit status 2, nothing run or written."""

import io
import os
import random
import re
import subprocess
import zipfile

import pytest
import torch

import baseline_cl_t2
import baseline_resnet50
import predict
from common.files import load_checkpoint, read_json
from common.images import decode_grey
from common.runtime import UserError, run_script
from dataset import DatasetInfo, read_info, read_list, write_dataset
from tests.support import FILES, QUICK, SMALL, alarm, printed_line, run_main, run_program, saved

# ---- hostile files ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name, read", [
    ("train.txt", lambda path: read_list(path, 5)), ("any.json", read_json),
    ("dataset.json", lambda path: read_info(path.parent)), ("weights.pt", load_checkpoint), ("a.png", decode_grey)])
def test_a_named_pipe_is_not_waited_for(tmp_path, name, read):
    os.mkfifo(tmp_path / name)
    with alarm(10), pytest.raises((UserError, OSError), match="no such|not a file|no dataset.json"):
        read(tmp_path / name)


def test_postscript_is_refused_and_no_program_run(tmp_path, monkeypatch):
    def run(*command, **options):
        raise AssertionError("ran a program")

    for name in ("Popen", "run", "call", "check_call"):
        monkeypatch.setattr(subprocess, name, run)
    (tmp_path / "ship.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match="PostScript is a program"):
        decode_grey(tmp_path / "ship.png")


def test_a_checkpoint_that_would_grow_when_read_is_refused(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(io.BytesIO(saved({"weight": torch.zeros(10**6)}))) as plain, zipfile.ZipFile(
            path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert path.stat().st_size < 20_000
    with pytest.raises(UserError, match=r"bomb\.pt: not a usable checkpoint \(refused: compressed"):
        load_checkpoint(path)


def test_an_error_does_not_steer_the_terminal(capsys):
    line = printed_line(UserError("x.json: holds \x1b[2J\r\x9b\u2028\ud800 " + "y" * 10_000 + " here"))
    assert line.startswith("error: x.json: holds \\x1b[2J \\x9b \\ud800 yyy") and line.endswith("yyy here\n")
    assert len(line) < 2000


def test_a_name_that_is_no_text_does_not_stop_a_program_and_is_not_written_into_a_list(tmp_path):
    """What a file's name in another encoding than that of the system becomes in Python."""
    program = "from common.runtime import run_script, say; run_script(lambda: say('schl\\udce4fer.png'))"
    done = run_program("-c", program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "schl\\udce4fer.png\n", "")
    info = DatasetInfo(tmp_path, "x", ["a"], {"head": [0], "middle": [], "tail": []}, "by hand", tmp_path)
    with pytest.raises(UserError, match=r"train\.txt: could not be written \('utf-8' codec"):
        write_dataset(info, {"train": [("schl\udce4fer.png", 0)]})
    assert not list(tmp_path.iterdir())


# ---- whole programs --------------------------------------------------------------------------------------------------


BAD_BYTES = {"nothing": lambda content: b"", "its first bytes": lambda content: content[:40],
             "random bytes": lambda content: random.Random(0).randbytes(3000)}
PLACES = {"image": "images/train_0_3.png", "list": "train.txt", "json": "dataset.json", "checkpoint": "init.pt"}
COMPLAINTS = {"image": r"train\.txt:4: .*train_0_3\.png: not (an image that Pillow can read|readable as an image)",
              "list": r"train\.txt(: the list is empty|:\d: expected 'relative/path label'|:\d: not UTF-8 text)",
              "json": r"dataset\.json(:\d: not valid JSON|: could not be read \('utf-8' codec)",
              "checkpoint": r"init\.pt: not a usable checkpoint \(truncated, damaged, or not a file that torch wr"}


def tree(folder):
    """Every file, but for the cache of images, and its content."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.parent.name != "cache"}


@pytest.mark.parametrize("damage", BAD_BYTES)
@pytest.mark.parametrize("kind", PLACES)
def test_a_stage_given_garbage_says_one_line_and_writes_nothing(own_tiny, tmp_path, capsys, kind, damage):
    (own_tiny / "init.pt").write_bytes(FILES[0])
    place = own_tiny / PLACES[kind]
    place.write_bytes(BAD_BYTES[damage](place.read_bytes()))
    before, init = tree(tmp_path), own_tiny / "init.pt" if kind == "checkpoint" else "none"
    assert run_main(baseline_resnet50, "--data-root", own_tiny, "--output", tmp_path / "b", "--init", init,
                    *QUICK) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*{COMPLAINTS[kind]}.*\n", said), said
    assert tree(tmp_path) == before and not (tmp_path / "b").exists()
    assert not list(tmp_path.rglob(".*.partial"))


@pytest.mark.parametrize("flag", ["--data-root", "--output", "--init", "--weights", "--t1"])
def test_a_name_too_long_for_a_file_is_one_line(tiny, tmp_path, capsys, flag):
    flags = {"--data-root": tiny, "--output": tmp_path / "b", "--init": "none", flag: tmp_path / ("long" * 100)}
    more = ["--test-only"] if flag == "--weights" else []
    stage = baseline_cl_t2 if flag == "--t1" else baseline_resnet50
    assert run_main(stage, *(part for pair in flags.items() for part in pair), *more, *QUICK) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "longlong" in said


@pytest.mark.parametrize("damage", BAD_BYTES)
def test_predict_given_garbage_as_weights_says_one_line(tmp_path, capsys, damage):
    (tmp_path / "weights.pt").write_bytes(BAD_BYTES[damage](FILES[0]))
    flags = ["--weights", str(tmp_path / "weights.pt"), str(tmp_path), "--device", "cpu"]
    with pytest.raises(SystemExit) as exit_:
        run_script(lambda: predict.main(flags))
    said = capsys.readouterr()
    assert exit_.value.code == 2 and said.out == ""
    assert said.err == (f"error: {tmp_path / 'weights.pt'}: not a usable checkpoint (truncated, damaged, or not a file "
                        "that torch wrote)\n")


@pytest.mark.parametrize("name, content, complaint", [
    ("last.pt", random.Random(0).randbytes(3000), r"last\.pt: not a usable checkpoint \(truncated, damaged"),
    ("last.pt", saved({**SMALL[0], "epoch": 7}), r"last\.pt: not a checkpoint that this run can go on from"),
    ("settings.json", b'{"data": ' + b"1" * 5000 + b"}", r"settings\.json: could not be read \(Exceeds the limit"),
    ("settings.json", b'["\x1b[2J"]', r"settings\.json:1: not valid JSON \(Invalid control character"),
])
def test_a_run_does_not_go_on_from_garbage(tiny, tmp_path, capsys, name, content, complaint):
    (tmp_path / "last.pt").write_bytes(FILES[0])  # without it nothing was trained, and the folder is free
    (tmp_path / name).write_bytes(content)
    before = tree(tmp_path)
    assert run_main(baseline_resnet50, "--data-root", tiny, "--output", tmp_path, "--init", "none", *QUICK,
                    "--resume") == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*{complaint}.*\n", said), said
    assert tree(tmp_path) == before
