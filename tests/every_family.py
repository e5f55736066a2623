"""The fixture by which a folder of tests runs on a tiny variant of each family: imported by its conftest.py."""

import pytest

SHAPES = ("sd1", "sd2", "sdxl")


@pytest.fixture(params=SHAPES)
def shape(request) -> str:
    return request.param
