"""Real photos in the folder ``shared`` beside the project; tests skip without it."""

from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[3] / "shared" / "data"


def shared_data(name: str) -> Path:
    """Return a folder of photos, or skip the test."""
    folder = _ROOT / name
    if not folder.exists():
        pytest.skip(f"needs ../shared/data/{name}")
    return folder
