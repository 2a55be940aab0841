import pytest


@pytest.fixture
def run(tmp_path):
    """An empty run folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    return folder
