"""A tiny drawn data set."""

import pytest

from tests.support import draw_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny data set that no test may change."""
    return draw_tiny(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture
def own_tiny(tmp_path):
    """A tiny data set of this test alone, to be damaged."""
    return draw_tiny(tmp_path / "tiny")
