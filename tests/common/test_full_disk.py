"""A disk that fills up, or a quota that is reached: what was there stays whole, one line says why, and nothing
half-written is left."""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import baseline_resnet50
from common import image_cache
from common.files import append_json_line, load_checkpoint, save_checkpoint, write_json
from common.image_cache import ImageCache
from common.runtime import UserError
from dataset import read_info, read_split, write_dataset
from tests.support import PROJECT, QUICK, contents, draw_tiny, run_main, run_program

resource = pytest.importorskip("resource", reason="this system has no quotas to set")

CHECKPOINT = 95_000_000  # bytes of a ResNet50; with its momentum, as in last.pt, twice that


@contextlib.contextmanager
def quota(size):
    """No file may grow beyond `size` bytes. Python is told of it as of a full disk: the write fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


STATE = {"model": {f"weight{number}": torch.zeros(5000) for number in range(50)}}  # a megabyte


@pytest.mark.parametrize("size", [0, 1, 64, 5000, 100_000, 1_000_000])
def test_a_checkpoint_beyond_the_quota_leaves_the_old_one(tmp_path, size):
    save_checkpoint(tmp_path / "last.pt", {"epoch": 1})
    before = contents(tmp_path)
    with quota(size), pytest.raises(UserError, match=r"last\.pt: could not be written \(File too large\); what was"):
        save_checkpoint(tmp_path / "last.pt", STATE)
    assert contents(tmp_path) == before
    save_checkpoint(tmp_path / "last.pt", STATE)
    assert torch.equal(load_checkpoint(tmp_path / "last.pt")["model"]["weight9"], torch.zeros(5000))


def test_a_json_file_and_a_list_beyond_the_quota_leave_the_old_ones(own_tiny):
    info = read_info(own_tiny)
    before = {path: path.read_bytes() for path in own_tiny.rglob("*.*")}
    with quota(100):
        with pytest.raises(UserError, match=r"dataset\.json: could not be written \(File too large\)"):
            write_json(own_tiny / "dataset.json", ["long"] * 100)
        with pytest.raises(UserError, match=r"train\.txt: could not be written \(File too large\)"):
            write_dataset(info, {"train": [("a.png", 0)] * 100})
    assert {path: path.read_bytes() for path in own_tiny.rglob("*.*")} == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_log_on_a_full_disk_is_one_error(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"log\.jsonl: could not be written \(No space left on device\)"):
        append_json_line(tmp_path / "log.jsonl", {"epoch": 1})


def all_samples(info):
    return [sample for split in ("train", "val", "test") for sample in read_split(info, split)]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_cache_beyond_the_quota_is_one_error_and_leaves_the_old_one(own_tiny, tmp_path, processes):
    info = read_info(own_tiny)
    ImageCache(info.images, read_split(info, "test"), 32, tmp_path / "cache")
    before = contents(tmp_path / "cache")
    with quota(50_000), pytest.raises(UserError, match=r"images_32_\w+\.npy: could not be written \(File too large"):
        ImageCache(info.images, all_samples(info), 32, tmp_path / "cache", processes=processes)
    assert contents(tmp_path / "cache") == before


def test_a_cache_larger_than_the_free_space_is_not_begun(tiny, tmp_path, monkeypatch):
    info = read_info(tiny)
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="the image cache needs .* are free; give a smaller --image-size or"):
        ImageCache(info.images, all_samples(info), 32, tmp_path / "cache")
    assert list(contents(tmp_path / "cache")) == [".lock"]


def test_a_run_that_reached_its_quota_goes_on_when_there_is_room(tiny, without_pictures, tmp_path, capsys):
    flags = ("--data-root", tiny, "--output", tmp_path / "b", "--init", "none", *QUICK, "--epochs", "1")
    with quota(CHECKPOINT + 20_000_000):  # room for best.pt, not for last.pt
        assert run_main(baseline_resnet50, *flags) == 2
    assert capsys.readouterr().err == (f"error: {tmp_path / 'b' / 'last.pt'}: could not be written (File too large); "
                                       "what was there before is untouched\n")
    assert sorted(os.listdir(tmp_path / "b")) == ["best.pt", "log.jsonl", "settings.json"]
    assert load_checkpoint(tmp_path / "b" / "best.pt")["description"]["epoch"] == 1
    assert run_main(baseline_resnet50, *flags, "--resume") == 0
    records = [json.loads(line) for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1] and (tmp_path / "b" / "results.json").exists()


# ---- a real disk that is full ----------------------------------------------------------------------------------------


def on_a_small_disk(folder, megabytes, *commands):
    """Run shell commands in a namespace of their own, where `folder` is a disk of so many megabytes in memory. Returns
    the finished process. Skips the test where the system does not let us."""
    folder.mkdir(exist_ok=True)
    mount = f"mount -t tmpfs -o size={megabytes}m none {shlex.quote(str(folder))}"

    def run(*lines):
        return subprocess.run(["unshare", "-rm", "sh", "-c", "\n".join(lines)], capture_output=True, text=True,
                              cwd=PROJECT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, timeout=600)

    if not shutil.which("unshare"):
        pytest.skip("there is no unshare here")
    tried = run(mount)
    if tried.returncode:
        pytest.skip(f"no disk may be mounted here: {tried.stderr.strip()}")
    return run(f"{mount} || exit", *commands)


def test_a_disk_that_fills_up_in_the_second_epoch_keeps_the_checkpoints_of_the_first(tiny, tmp_path):
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    flags = ("--data-root", tiny, "--output", disk / "b", "--init", "none", *QUICK)
    done = on_a_small_disk(
        disk, 34 * CHECKPOINT // 10 >> 20,  # best.pt and last.pt fill three parts; to replace one takes a fourth
        shlex.join([sys.executable, "baseline_resnet50.py", *map(str, flags)]),
        "status=$?", f"cp -a {shlex.quote(str(disk / 'b'))} {shlex.quote(str(kept))}", "exit $status")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"error: {disk / 'b'}{os.sep}"), done.stderr
    assert done.stderr.endswith(".pt: could not be written (No space left on device); what was there before is "
                                "untouched\n")
    assert not list(kept.glob(".*")), list(kept.iterdir())
    best, last = load_checkpoint(kept / "best.pt"), load_checkpoint(kept / "last.pt")
    assert best["description"]["epoch"] == last["epoch"] == 1
    assert all(torch.equal(value, last["model"][name]) for name, value in best["model"].items())


FILL_THE_CACHE = """
import sys
sys.path.insert(0, ".")
import os, pathlib
from types import SimpleNamespace
from common.runtime import run_script
from common import image_cache
from dataset import read_info
from tests.common.test_full_disk import all_samples

def main():
    info, folder = read_info(sys.argv[1]), pathlib.Path(sys.argv[2])
    image_cache.shutil.disk_usage = lambda folder: SimpleNamespace(free=10**12)  # it fills up after the look
    try:
        image_cache.ImageCache(info.images, all_samples(info), 224, folder, processes=2)
    finally:
        print(sorted(os.listdir(folder)))

run_script(main)
"""


def test_a_disk_that_fills_up_under_the_image_cache_is_one_error_and_leaves_none(tmp_path):
    root = draw_tiny(tmp_path / "tiny", train=[40, 20, 10, 5, 5, 5])  # 6 MB of squares
    done = on_a_small_disk(tmp_path / "disk", 3, shlex.join(
        [sys.executable, "-c", FILL_THE_CACHE, str(root), str(tmp_path / "disk")]))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {tmp_path / 'disk'}{os.sep}images_224_") and done.stderr.count("\n") == 1
    assert done.stderr.endswith(".npy: could not be written (No space left on device); what was there before is "
                                "untouched\n")
    assert done.stdout == "['.lock']\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_output_that_goes_to_a_full_disk_is_one_error():
    program = "from common.runtime import run_script, say; run_script(lambda: say('words'))"
    done = run_program("-c", f"import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1); {program}")
    assert done.returncode != 0 and done.stderr == "error: No space left on device\n"
