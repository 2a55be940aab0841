"""The house: imports point down, and names come without weight."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import localagg

SRC = Path(localagg.__file__).parent
# Ground first. A module imports from its own floor and below (data and models not each other).
FLOORS = [
    {"config", "objectives", "draws", "crc32c", "files", "runlock", "distributed", "ragged"}
    | {"printable", "image_files", "allocation"}
    | {"streaming", "prepared", "threads", "triton_search", "triton_losses"}
    | {"neighbors_torch", "neighbors_numba", "neighbors_triton"}
    | {"neighbors_kernels", "list_kernels", "kernel_parts"},
    {
        "neighbors",
        "bank",
        "lloyd",
        "late",
        "clustering",
        "clusters",
        "knn",
        "models",
        "data",
        "logbook",
        "shards",
        "batch_norm",
        "device",
        "sizing",
        "schedule",
        "health",
        "watch",
        "signals",
        "tensor_files",
        "selection",
        "sharded",
    },
    {"checkpoint", "reference_recipes", "results", "commands", "ranks"},
    {"embed", "embedding_table", "interop", "recipes", "migrate", "first_rows", "launch"},
    {"evaluate", "learner", "report", "search", "shared_neighbors"},
    {"scoring", "record", "readout", "probe", "forecast", "features", "logistic", "ledger"},
    {"pretrain", "transfer", "parse", "quick", "few_labels"},
    {"demo", "epoch_time"},
    {"actions"},
    {"cli"},
    {"__init__", "__main__"},
]
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}


def imported(path: Path) -> set[str]:
    """Modules of localagg that a file imports, by their first name."""
    inside = path.relative_to(SRC).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = inside[: len(inside) - node.level + 1]
            where = [*base, *(node.module or "").split(".")] if node.module else list(base)
            found |= {where[0]} if where else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda p: str(p.relative_to(SRC)))
def test_imports_point_down(path):
    module = path.relative_to(SRC).parts[0].removesuffix(".py")
    assert module in FLOOR, f"{module} has no floor yet"
    if module == "__init__":
        return
    for other in imported(path) - {module, "__version__"}:
        assert FLOOR[other] <= FLOOR[module], f"{module} imports {other} from a higher floor"
        assert {module, other} != {"models", "data"}


def test_objectives_know_torch_and_the_engine_alone():
    tree = ast.parse((SRC / "objectives.py").read_text())
    roots = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (
            [node.module] if getattr(node, "module", None) else [a.name for a in node.names]
        )
    }
    assert roots == {"torch", "streaming", "prepared"}


@pytest.mark.parametrize(
    "code", ["import localagg", "import localagg.cli", "from localagg import RECIPES"]
)
def test_torch_waits_until_it_is_needed(code):
    heavy = "[m for m in ('torch', 'faiss', 'datasets') if m in sys.modules]"
    check = f"import sys\n{code}\nprint({heavy})"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "first", ["import localagg.pretrain", "from localagg.embed import Embedded"]
)
def test_public_names_are_functions_whatever_was_imported_before(first):
    names = "embed, knn_accuracy, pretrain, transfer"
    check = f"{first}\nfrom localagg import {names}\nprint(all(map(callable, ({names}))))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_every_public_name_exists():
    assert {name for name in localagg.__all__ if getattr(localagg, name) is None} == set()
    assert set(localagg.__all__) <= set(dir(localagg))
    with pytest.raises(AttributeError, match="no attribute 'pretrian'"):
        localagg.pretrian  # noqa: B018


@pytest.mark.parametrize(
    ("given", "wanted"),
    [({}, "30000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None")],
)
def test_threads_of_torch_spin_shortly_unless_told_otherwise(given, wanted):
    code = "import localagg, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    names = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    environment = {name: value for name, value in os.environ.items() if name not in names} | given
    told = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment)
    assert told.strip() == wanted
