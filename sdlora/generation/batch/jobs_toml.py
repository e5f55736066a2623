"""Jobs as TOML: [defaults], [[jobs]], and [grid] with lists, whose product is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sdlora.config import load_config
from sdlora.errors import ConfigError
from sdlora.generation.batch.faults import Faults
from sdlora.generation.batch.grid import (
    MOST_PICTURES,
    REPLACE,
    Axis,
    Together,
    grid_points,
    make_axis,
    product_size,
    refuse_doubles,
)
from sdlora.generation.batch.job_draft import Draft
from sdlora.generation.batch.job_fields import by_field

_TABLES = ("defaults", "jobs", "grid")
_TOGETHER = "zip"


def read_toml_jobs(path: Path, faults: Faults) -> Iterator[Draft]:
    """Yield the jobs of a .toml file: each of [[jobs]], then every point of each [grid] or [[grid]]."""
    content = load_config(path)
    if unknown := [key for key in content if key not in _TABLES]:
        faults.tell(str(path), f"unknown table {unknown[0]}; known are {', '.join(_TABLES)}")
    defaults: dict[str, Any] = {}
    with faults.of(f"{path}: defaults"):
        defaults = _fields(content.get("defaults", {}))
    for where, job in _tables(path, content, "jobs", faults):
        with faults.of(where):
            yield Draft(where, _fields(job)).on(defaults)
    for where, grid in _tables(path, content, "grid", faults):
        with faults.of(where):
            yield from _grid_drafts(where, grid, defaults, path.parent)


def _tables(
    path: Path, content: Mapping[str, Any], name: str, faults: Faults
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (where, table) of [name] or [[name]]."""
    found = content.get(name, [])
    tables = [found] if isinstance(found, dict) else found
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        faults.tell(f"{path}: {name}", f"is no table; expected [[{name}]]")
        return
    for number, table in enumerate(tables, start=1):
        yield f"{path}: {name} {number}" if len(tables) > 1 else f"{path}: {name}", table


def _grid_drafts(where: str, grid: Mapping[str, Any], defaults: Mapping[str, Any], folder: Path) -> Iterator[Draft]:
    values, axes = _parts(grid, folder)
    together = _groups(axes, grid.get(_TOGETHER, []))
    refuse_doubles(together)
    if (size := product_size(together)) > MOST_PICTURES:
        raise ConfigError(f"makes {size:,} jobs; a batch has at most {MOST_PICTURES:,} pictures")
    shared = Draft(where, values).on(defaults)
    left = shared.defaults.difference(axis.field for axis in axes.values())
    for made, point in grid_points(together, shared.values):
        yield Draft(where, made, point, left)


def _parts(grid: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Axis]]:
    """Return what all points of a grid have in common, and its axes by the names that they are given there."""
    axes, shared = dict[str, Axis](), list[tuple[str, Any]]()
    for name, value in grid.items():
        if name == _TOGETHER:
            continue
        if isinstance(value, list):
            axes[name] = make_axis(name, value, folder)
        elif isinstance(value, str):
            axis = make_axis(name, [value], folder)
            if len(axis.values) > 1:
                axes[name] = axis
            else:
                shared.append((name, axis.values[0]))
        else:
            shared.append((name, value))
    return by_field(shared), axes


def _groups(axes: Mapping[str, Axis], together: Any) -> list[Together]:
    """Return the axes in their order, those that `zip` names as one. Raises ConfigError where it names others."""
    lists = [together] if isinstance(together, list) and all(isinstance(name, str) for name in together) else together
    if not isinstance(lists, list) or not all(isinstance(names, list) for names in lists):
        raise ConfigError(f'zip is {together!r}; expected for example zip = ["adapter", "weight"]')
    named = [str(name) for names in lists for name in names]
    if missing := [name for name in named if name not in axes]:
        raise ConfigError(f"zip names {missing[0]!r}, which is no list of this grid")
    if twice := [name for name in named if named.count(name) > 1]:
        raise ConfigError(f"zip names {twice[0]!r} twice")
    groups: list[Together] = []
    for name, axis in axes.items():
        group = next((names for names in lists if name in names), [name])
        if name == group[0]:
            groups.append((axis, *(axes[other] for other in group[1:])))
    return groups


def _fields(table: Any) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise ConfigError(f"is {table!r}; expected a table")
    if REPLACE in table:
        raise ConfigError(f"{REPLACE} belongs into [grid]")
    return by_field(list(table.items()))
