"""The plan of the code: few files in a room, none too long, no long chain of imports."""

import ast
from functools import cache
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
FILES = {
    ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("jobs", "pipelines", "mar_model")
    for path in PROJECT.glob(f"{package}/**/*.py")
}
LONGEST_FILE, MOST_FILES, LONGEST_CHAIN = 300, 12, 13


@cache
def imported(module: str) -> frozenset[str]:
    """The project's modules that a module imports when it is imported; not those that functions import, nor those for type checking."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                names = [f"{child.module}.{alias.name}" for alias in child.names]
                found.update(name if name in FILES else child.module for name in names)
            visit(child)

    visit(ast.parse(FILES[module].read_text()))
    return frozenset(found & FILES.keys() - {module})


@cache
def longest(module: str) -> tuple[str, ...]:
    """The longest chain of imports that begins at the module."""
    return (module, *max((longest(other) for other in imported(module)), key=len, default=()))


def test_no_chain_of_imports_is_long() -> None:
    chain = max((longest(module) for module in FILES), key=len)
    assert len(chain) <= LONGEST_CHAIN, " > ".join(chain)


@pytest.mark.parametrize("package", ["jobs", "pipelines", "mar_model"])
def test_files_are_short(package: str) -> None:
    lines = {name: len(path.read_text().splitlines()) for name, path in FILES.items() if name.startswith(package)}
    assert {name: count for name, count in lines.items() if count > LONGEST_FILE} == {}


def test_rooms_hold_few_files() -> None:
    assert len([entry for entry in (PROJECT / "pipelines").iterdir() if entry.is_dir() and entry.name != "__pycache__"]) <= 10
    rooms = {path.parent for name, path in FILES.items() if name.startswith("pipelines")}
    counts = {str(room.relative_to(PROJECT)): len(list(room.glob("*.py"))) for room in rooms}
    assert {room: count for room, count in counts.items() if count > MOST_FILES} == {}
