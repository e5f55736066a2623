import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sdlora

SCRIPT = """
import sys, time
start = time.process_time()
import sdlora
seconds = time.process_time() - start
heavy = {"torch", "numpy", "diffusers", "transformers", "peft", "PIL", "gradio", "pydantic"} & set(sys.modules)
print(seconds, *sorted(heavy))
"""


def test_importing_the_package_is_quick_and_loads_no_heavy_library():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    seconds, *heavy = result.stdout.split()
    assert heavy == []
    assert float(seconds) < 0.5


@pytest.mark.parametrize(
    ("setting", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_waiting_threads_spin_briefly_unless_the_user_chose(setting, spins):
    kept = {key: value for key, value in os.environ.items() if key not in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}}
    script = "import sdlora, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    result = subprocess.run(
        [sys.executable, "-c", script], env={**kept, **setting}, capture_output=True, text=True, check=True
    )
    assert result.stdout == f"{spins}\n"


def test_all_names_are_listed_once_and_in_order():
    assert sdlora.__all__ == sorted(sdlora._HOMES)


def test_type_checkers_see_the_same_names_from_the_same_homes():
    tree = ast.parse(Path(sdlora.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    seen = {name.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names}
    assert seen == sdlora._HOMES


@pytest.mark.parametrize("name", sdlora.__all__)
def test_every_public_name_is_there(name):
    assert getattr(sdlora, name) is getattr(importlib.import_module(sdlora._HOMES[name]), name)


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'sdlora' has no attribute 'trian'"):
        sdlora.trian  # noqa: B018
