"""Rooms of the package: imports point down the drawing in CONTRIBUTING.md, without circles."""

import ast
import functools
import re
from pathlib import Path

import pytest

import localagg

SRC = Path(localagg.__file__).parent
PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"
FILES = sorted(SRC.rglob("*.py"))
# Rooms of one floor that import one another, in this direction only.
SAME_FLOOR = {("bank", "objectives"), ("clustering", "bank"), ("checkpoint", "bank")}


def drawn_floors() -> list[list[str]]:
    """Rooms of CONTRIBUTING.md's drawing, top floor first; blank lines separate the floors."""
    drawing = PAGE.read_text().split("src/localagg/\n")[1].split("```")[0]
    floors = [re.findall(r"^  (\w+)(?:/|\.py) +\S", text, re.M) for text in drawing.split("\n\n")]
    assert sum(map(len, floors)) == len(drawing.split("\n")) - drawing.count("\n\n") - 1, drawing
    return floors


FLOOR = {room: -number for number, rooms in enumerate(drawn_floors()) for room in rooms}


def module_name(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def is_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(path: Path, node: ast.AST, *, late: bool) -> set[str]:
    """Return the modules of localagg that a file imports.

    Args:
        late: include imports within functions and under TYPE_CHECKING.
    """
    package = path.relative_to(SRC).parts[:-1]
    found = set()
    for child in ast.iter_child_nodes(node):
        module = getattr(child, "module", None) or ""
        absolute = isinstance(child, ast.ImportFrom) and module.split(".")[0] == "localagg"
        if isinstance(child, ast.ImportFrom) and (child.level or absolute):
            base = [] if absolute else [*package[: len(package) - child.level + 1]]
            home = ".".join(filter(None, [*base, *module.split(".")[absolute:]]))
            for alias in child.names:
                inner = f"{home}.{alias.name}" if home else alias.name
                found.add(inner if inner in MODULES else home)
        elif late or not (isinstance(child, ast.FunctionDef) or is_typing(child)):
            found |= imports(path, child, late=late)
    return found


@functools.cache
def graph(*, late: bool) -> dict[str, set[str]]:
    trees = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
    return {name: imports(MODULES[name], trees[name], late=late) - {name} for name in trees}


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Return the nodes of a circle, or an empty list."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        found = next(filter(None, (visit(n, [*path, node]) for n in arrows.get(node, ()))), [])
        done.add(node)
        return found

    return next(filter(None, (visit(node, []) for node in arrows)), [])


def test_the_drawing_lists_each_room_once():
    drawn = [room for rooms in drawn_floors() for room in rooms]
    rooms = {name.split(".")[0] for name in MODULES} - {"", "__main__"}
    assert sorted(drawn) == sorted(rooms)


@pytest.mark.parametrize("name", sorted(MODULES), ids=lambda name: name or "localagg")
def test_imports_point_down(name):
    room = name.split(".")[0]
    if room in ("", "__main__"):
        return
    for other in graph(late=True)[name]:
        assert other or room == "cli", f"{name} imports from the package above it"
        if not other:
            continue
        other_room = other.split(".")[0]
        down = FLOOR[other_room] < FLOOR[room] or (room, other_room) in SAME_FLOOR
        assert room == other_room or down, f"{name} imports {other}"


def test_no_modules_import_each_other_when_loaded():
    assert circle(graph(late=False)) == []


@pytest.mark.parametrize("depth", [1, 2])
def test_no_rooms_import_each_other(depth):
    """Neither the rooms, nor the folders of a room."""
    arrows: dict[str, set[str]] = {}
    for name, others in graph(late=True).items():
        for other in others - {""}:
            one, two = (folder_of(module, depth) for module in (name, other))
            if one and one != two and one.count("/") == two.count("/"):
                arrows.setdefault(one, set()).add(two)
    assert circle(arrows) == []


def folder_of(name: str, depth: int) -> str:
    folder = MODULES[name].relative_to(SRC).parts[:-1][:depth]
    return "/".join(folder) or name


def test_the_graph_sees_late_and_typing_imports():
    code = (
        "def f():\n    from ..errors import UserError\nif TYPE_CHECKING:\n    from . import files\n"
    )
    path = SRC / "io" / "example.py"
    assert imports(path, ast.parse(code), late=True) == {"errors", "io.files"}
    assert imports(path, ast.parse(code), late=False) == set()
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_files_and_folders_are_small():
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: n for name, n in lengths.items() if n > 400} == {}
    folders = {path.parent for path in FILES}
    sizes = {folder.name: len(list(folder.glob("*.py"))) for folder in folders}
    assert {name: n for name, n in sizes.items() if n > 17} == {}  # 16 and __init__


def test_no_two_modules_have_one_name():
    """But a command's module is named like the command, which may be that of the code it runs."""
    library = [path for path in FILES if path.relative_to(SRC).parts[0] != "cli"]
    names = [path.stem for path in library if not path.stem.startswith("__")]
    twice = {name for name in names if names.count(name) > 1}
    assert twice <= {"search"}  # of bank rows in engine, of images in embeddings


def test_objectives_import_torch_the_engine_and_checks_of_arguments_alone():
    tree = ast.parse((SRC / "objectives.py").read_text())
    found = imports(SRC / "objectives.py", tree, late=True)
    assert {name.split(".")[0] for name in found} == {"config", "engine"}
    external = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [node.names[0].name])
    }
    assert external == {"torch"}
