"""Signals as in a terminal, and a tiny drawn data set."""

import signal

import pytest

from tests.support import draw_tiny


@pytest.fixture(scope="session", autouse=True)
def signals_of_a_terminal():
    """Tests started in the background or under nohup ignore these signals, and so would the programs they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny data set that no test may change."""
    return draw_tiny(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture
def own_tiny(tmp_path):
    """A tiny data set of this test alone, to be damaged."""
    return draw_tiny(tmp_path / "tiny")
