"""The fixture by which a folder of tests runs on a tiny variant of each family: imported by its conftest.py."""

import pytest

SHAPES = ("sd1", "sd2", "sdxl")


@pytest.fixture(params=SHAPES)
def shape(request) -> str:
    return request.param


one_family = pytest.mark.parametrize("shape", ["sd1"])
"""For a test of what no family enters into: files that are kept, refusals, signals, the order of work."""
two_families = pytest.mark.parametrize("shape", ["sd1", "sdxl"])
"""For a test of what only the number of text encoders enters into."""
