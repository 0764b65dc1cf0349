"""Drawn scenes for the tests that need no others."""

import pytest

from demo.draw_scenes import write_demo
from tests.support import QUICK_DETECTOR


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder with train.json (10 scenes), test.json (4 scenes) and their images."""
    folder = tmp_path_factory.mktemp("scenes") / "tiny"
    write_demo(folder, seed=0, train=10, test=4, size=64)
    return folder


@pytest.fixture(scope="module")
def flags(scenes):
    return ("--train", scenes / "train.json", "--test", scenes / "test.json", *QUICK_DETECTOR)
