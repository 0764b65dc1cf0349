"""One cache for processes that start at once, none from a killed process, a new one when an image has changed."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from common.image_cache import ImageCache
from common.images import decode_square
from dataset import read_info, read_split
from tests.support import PROJECT, draw_tiny

BUILD = """
import os, pathlib, sys, time
sys.path.insert(0, ".")
import numpy as np
from common import image_cache
from dataset import read_info, read_split

root, folder, name, seconds = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3], float(sys.argv[4])
decode, build = image_cache.decode_square, image_cache._build_cache

def slow_decode(*arguments):
    time.sleep(seconds)
    return decode(*arguments)

def noted_build(*arguments):
    (folder / f"{name}.built").touch()
    build(*arguments)

image_cache.decode_square, image_cache._build_cache = slow_decode, noted_build
(folder / f"{name}.ready").touch()
while not (folder / "start").exists():
    time.sleep(0.001)
info = read_info(root)
cache = image_cache.ImageCache(info.images, read_split(info, "train"), 32, folder / "cache", processes=2)
np.save(folder / f"{name}.npy", cache.array)
"""  # python -c BUILD DATA FOLDER NAME SECONDS: build a cache in FOLDER, SECONDS an image, once FOLDER/start is there


def start_builders(data, folder, names, seconds):
    """Processes that build the cache of `data` in `folder`, all at the same moment. Returns them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folder.mkdir(exist_ok=True)
    (folder / "start").unlink(missing_ok=True)
    started = [subprocess.Popen([sys.executable, "-c", BUILD, str(data), str(folder), name, str(seconds)], text=True,
                                cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
               for name in names]
    wait_for(lambda: all((folder / f"{name}.ready").exists() for name in names), started)
    (folder / "start").touch()
    return started


def wait_for(happened, processes=()):
    """Return once `happened()`; fail if it takes a minute, or a process fails meanwhile."""
    for _ in range(6000):
        if happened():
            return
        for process in processes:
            assert not process.poll(), process.stderr.read()
        time.sleep(0.01)
    pytest.fail("waited for a minute")


def finish(processes):
    """Wait for the processes and expect that they succeeded, and that they had nothing to say."""
    for process in processes:
        said = process.communicate(timeout=120)
        assert process.returncode == 0 and said == ("", ""), said


def expected(data):
    """The squares of the training images, as a loop reads them."""
    info = read_info(data)
    paths = sorted(sample.path for sample in read_split(info, "train"))
    return [decode_square(info.images / path, 32) for path in paths]


def names_in(folder):
    """Files of the cache, keys left out."""
    return sorted(name.split("_")[0] for name in os.listdir(folder))


def test_processes_that_start_at_once_build_one_cache(tiny, tmp_path):
    names = ("one", "two", "three")
    finish(start_builders(tiny, tmp_path, names, 0.01))
    assert len(list(tmp_path.glob("*.built"))) == 1
    for name in names:
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), expected(tiny))
    assert names_in(tmp_path / "cache") == [".lock", "images"]


@pytest.fixture(scope="module")
def two_chunks(tmp_path_factory):
    """A data set of 66 training images, which are a chunk of 64 and one of 2, and so work for two processes."""
    return draw_tiny(tmp_path_factory.mktemp("data") / "two_chunks", train=[30, 15, 8, 5, 4, 4])


def children_of(process):
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        return [int(child) for child in file.read().split()]


def is_alive(number):
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells of the decoding processes")
def test_a_cache_half_built_by_a_killed_process_is_never_used_and_never_waited_for(two_chunks, tmp_path):
    killed, = start_builders(two_chunks, tmp_path, ["killed"], 0.5)
    wait_for(lambda: len(children_of(killed)) == 2, [killed])
    decoders = children_of(killed)
    killed.kill()
    killed.communicate(timeout=60)  # until the decoders have closed its output
    wait_for(lambda: not any(map(is_alive, decoders)))
    left, = (tmp_path / "cache").glob(".images_32_*.npy.*.partial")

    finish(start_builders(two_chunks, tmp_path, ["second"], 0))
    assert np.array_equal(np.load(tmp_path / "second.npy"), expected(two_chunks))
    assert names_in(tmp_path / "cache") == [".lock", "images"] and not left.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="a process group gets the signal")
def test_an_interrupted_build_says_one_word_and_leaves_nothing(two_chunks, tmp_path):
    program = f"from common.runtime import run_script\nrun_script(lambda: exec({BUILD!r}, {{}}))"
    (tmp_path / "start").touch()
    process = subprocess.Popen([sys.executable, "-c", program, str(two_chunks), str(tmp_path), "stopped", "0.3"],
                               cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    wait_for(lambda: list((tmp_path / "cache").glob(".*.partial")), [process])
    time.sleep(1.5)  # now the decoder of the shorter chunk waits for work, and that of the other has 19 seconds of it
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "interrupted\n")
    assert process.returncode == 130 and names_in(tmp_path / "cache") == [".lock"]


def test_an_image_replaced_within_the_same_second_is_noticed(own_tiny, tmp_path):
    info = read_info(own_tiny)
    samples = read_split(info, "test")
    path = info.images / samples[5].path
    second = 1_700_000_000 * 10**9
    keys = []
    for value, nanoseconds in ((10, 1_000_000), (20, 2_000_000)):
        pixels = np.full((40, 40), value, np.uint8)
        path.write_bytes(b"P5 40 40 255\n" + pixels.tobytes())  # a grey picture as plain bytes, so of equal size
        os.utime(path, ns=(second, second + nanoseconds))
        cache = ImageCache(info.images, samples, 32, tmp_path / "cache", processes=1)
        assert (cache.array[cache.row_of[samples[5].path]] == value).all()
        keys.append((cache.key, path.stat().st_size, int(path.stat().st_mtime)))
    assert keys[0][0] != keys[1][0] and keys[0][1:] == keys[1][1:]
