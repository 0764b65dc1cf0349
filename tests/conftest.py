"""Signals as in a terminal, a measured precision, runs without pictures, and a tiny drawn data set with teachers."""

import signal

import pytest
import torch

import prepare_dataset
from benchmarks.bench_training import save_teachers
from common.precision import resolve_precision
from dataset import read_info
from detection import pictures
from recognition import evaluation, report
from tests.support import draw_tiny


@pytest.fixture(scope="session", autouse=True)
def signals_of_a_terminal():
    """Tests started in the background or under nohup ignore these signals, and so would the programs they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def measured_precision():
    """Where `--precision auto` has to be measured it is now: the first program to do so has a line more on stderr."""
    resolve_precision("auto", torch.device("cpu"))


@pytest.fixture
def without_pictures():
    """What this test runs draws no pictures, which take up to a third of the time of runs so short."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((pictures, "draw_curves"), (pictures, "draw_precision_recall"), (pictures, "draw_sheet"),
                             (report, "draw_curves"), (evaluation, "draw_pictures"),
                             (prepare_dataset, "draw_class_counts")):
            patch.setattr(module, name, lambda *_: None)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny data set that no test may change."""
    return draw_tiny(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def teachers(tiny, tmp_path_factory):
    """A folder with checkpoints of random weights, baseline, t1, t2 and t3, that no test may change."""
    folder = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(0)
    save_teachers(folder, read_info(tiny), 32)
    return folder


@pytest.fixture
def own_tiny(tmp_path):
    """A tiny data set of this test alone, to be damaged."""
    return draw_tiny(tmp_path / "tiny")
