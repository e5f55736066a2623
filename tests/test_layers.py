"""Who may import whom, checked from the syntax tree, so that imports inside functions count too."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GROUND = {
    "errors",
    "quiet",
    "assets",
    "diffusion",
    "headers",
    "storage",
    "pickles",
    "config",
    "sqlite_index",
    "lettering",
}
SHARED = GROUND | {"families", "data", "adapters"}
# Each part of the program and the parts it may import, itself aside. "sdlora" is the package's public names.
ALLOWED: dict[str, set[str]] = {
    "sdlora": set(),
    "errors": set(),
    "quiet": set(),
    "assets": set(),
    "diffusion": set(),
    "lettering": set(),
    "headers": {"errors"},
    "storage": {"errors", "headers"},
    "pickles": {"errors"},
    "sqlite_index": {"errors"},
    "config": {"errors", "storage"},
    "families": GROUND,
    "data": GROUND | {"families"},
    "adapters": GROUND | {"families"},
    "training": SHARED,
    "generation": SHARED,
    "sharing": SHARED,
    "doctor": {"sdlora", "config", "errors", "families", "training"},
    "cli": {"sdlora", "app", "doctor", "training", "generation", "sharing"} | SHARED,
    "app": {"sdlora", "training", "generation", "sharing"} | SHARED,
    "train": {"sdlora", "cli", "training", "generation"} | SHARED,
    "benchmarks": {"sdlora", "cli", "training", "generation"} | SHARED,
}


@dataclass(frozen=True)
class Import:
    """One import of one module, as written in `file`."""

    file: Path
    line: int
    target: str
    relative: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.target}"


def sources() -> list[Path]:
    return sorted(file for folder in ("sdlora", "app", "train", "benchmarks") for file in (ROOT / folder).rglob("*.py"))


def module_of(file: Path) -> str:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "app":
        parts.insert(0, "sdlora")  # as it is installed
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """Return the part of the program that a module is in, or "" for other people's modules."""
    first, *rest = module.split(".")
    if first == "sdlora":
        return rest[0] if rest else "sdlora"
    return first if first in ALLOWED else ""


def imports_of(file: Path) -> Iterator[Import]:
    """Yield every import that can run; those under TYPE_CHECKING never do."""
    package = module_of(file).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    waiting: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
        elif isinstance(node, ast.Import):
            for name in node.names:
                yield Import(file, node.lineno, name.name, False)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for name in node.names:
                inner = f"{module}.{name.name}"
                yield Import(file, node.lineno, inner if inner in MODULES else module, bool(node.level))
        else:
            waiting += ast.iter_child_nodes(node)


MODULES = {module_of(file) for file in sources()}
IMPORTS = [found for file in sources() for found in imports_of(file)]


def test_the_syntax_trees_show_the_imports():
    edges = {(module_of(found.file), found.target) for found in IMPORTS}
    assert ("sdlora.config.reading", "sdlora.errors") in edges
    assert ("sdlora.storage", "safetensors.torch") in edges  # inside a function
    assert ("sdlora.adapters.write", "sdlora.adapters.formats.kohya") in edges
    assert ("sdlora.storage", "torch") not in edges  # for type checkers only
    assert ("sdlora.app.main", "sdlora.app.jobs") in edges  # relative


def test_every_part_has_its_place():
    assert {part_of(module) for module in MODULES} <= set(ALLOWED)


def test_nothing_imports_a_part_above_or_beside_it():
    wrong = [
        str(found)
        for found in IMPORTS
        if (part := part_of(found.target))
        and part != part_of(module_of(found.file))
        and part not in ALLOWED[part_of(module_of(found.file))]
    ]
    assert wrong == []


def test_the_table_itself_has_no_way_up():
    assert list(TopologicalSorter(ALLOWED).static_order())
    assert "generation" not in ALLOWED["training"]
    assert "training" not in ALLOWED["generation"]
    assert not {"training", "generation"} & ALLOWED["sharing"]


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """Return the nodes of one cycle, the first again as the last, or nothing where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_a_cycle_would_be_seen():
    assert set(cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}})) == {"b", "c"}


def test_there_are_no_import_cycles():
    graph: dict[str, set[str]] = {}
    for found in IMPORTS:
        if found.target in MODULES and found.target != module_of(found.file):
            graph.setdefault(module_of(found.file), set()).add(found.target)
    assert cycle_in(graph) == []


def importers(*libraries: str) -> set[str]:
    return {found.file.relative_to(ROOT).as_posix() for found in IMPORTS if found.target.split(".")[0] in libraries}


def test_few_modules_import_peft():
    # A benchmark may run another trainer, peft and all; the program itself has one door.
    ours = {file for file in importers("peft") if not file.startswith("benchmarks/")}
    assert ours == {f"sdlora/adapters/{name}.py" for name in ("dora_norms", "live", "trainable")}


def test_only_the_families_know_the_model_libraries():
    inside = {file for file in importers("diffusers", "transformers") if file.startswith(("sdlora/", "app/"))}
    assert inside and all(file.startswith("sdlora/families/") for file in inside)


def test_the_page_imports_no_torch():
    heavy = importers("torch", "diffusers", "transformers", "accelerate", "bitsandbytes", "peft")
    assert {file for file in heavy if file.startswith("app/")} == set()


def test_the_pages_files_see_each_other_relatively():
    inside = [found for found in IMPORTS if found.file.is_relative_to(ROOT / "app") and part_of(found.target) == "app"]
    assert [str(found) for found in inside if not found.relative] == []


def test_the_packages_files_see_each_other_by_full_names():
    inside = [found for found in IMPORTS if found.file.is_relative_to(ROOT / "sdlora")]
    assert [str(found) for found in inside if found.relative] == []


def test_every_package_is_installed():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [file.parent.relative_to(ROOT) for file in (ROOT / "sdlora").rglob("__init__.py")]
    assert declared == sorted(["sdlora.app", *(".".join(folder.parts) for folder in folders)])
