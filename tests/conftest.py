"""A tiny drawn data set, and ways to run the scripts as a user does."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import DatasetInfo, write_dataset

PROJECT = Path(__file__).resolve().parent.parent
TINY_GROUPS = {"head": [0, 1], "middle": [2, 3], "tail": [4, 5]}
TINY_TRAIN = [14, 12, 9, 8, 5, 4]


def draw_tiny(root, train=TINY_TRAIN, val=2, test=4, groups=TINY_GROUPS, seed=0):
    """A prepared data set of grey 40 x 40 noise with a bright band whose height tells the class. Returns its folder."""
    generator = np.random.default_rng(seed)
    images, lists = root / "images", {}
    images.mkdir(parents=True)
    for split, counts in (("train", train), ("val", [val] * len(train)), ("test", [test] * len(train))):
        lists[split] = []
        for label, count in enumerate(counts):
            for number in range(count):
                pixels = generator.integers(0, 60, (40, 40), dtype=np.uint8)
                pixels[label * 6:label * 6 + 6] += 150
                Image.fromarray(pixels).save(images / f"{split}_{label}_{number}.png")
                lists[split].append((f"{split}_{label}_{number}.png", label))
    write_dataset(DatasetInfo(root, "tiny", list("abcdef")[:len(train)], groups, "by hand", images), lists)
    return root


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny data set that no test may change."""
    return draw_tiny(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture
def own_tiny(tmp_path):
    """A tiny data set of this test alone, to be damaged."""
    return draw_tiny(tmp_path / "tiny")


def run_program(*command, **options):
    """Run a script of the project, with Python's own flags before it if need be, in a process of its own, from the
    project's folder. Returns the finished process, output as text."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **options.pop("env", {})}
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=PROJECT,
                          env=environment, timeout=900, **options)


def run_tool(script, *arguments):
    """The main program of a script in this process. Returns its exit status."""
    from runtime import run_script

    with pytest.raises(SystemExit) as exit_:
        run_script(lambda: script.main([str(argument) for argument in arguments]))
    return exit_.value.code or 0


def one_line(capsys):
    """What stderr holds, which must be one line of an error."""
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def run_main(module, *arguments):
    """Run a stage script's program in this process. Returns its exit status."""
    from engine import run_stage

    with pytest.raises(SystemExit) as exit_:
        run_stage(module.STAGE, module.SETTINGS, "", [str(argument) for argument in arguments])
    return exit_.value.code or 0


QUICK = ("--image-size", "32", "--batch-size", "8", "--epochs", "2", "--device", "cpu", "--precision", "fp32",
         "--schedule", "one-cycle", "--lr", "0.01")
