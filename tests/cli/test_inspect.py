import re
import subprocess
import sys

import pytest

from localagg.cli import inspect


def test_counting_files_ends_after_a_second(pictures, monkeypatch):
    files = ((f"{number}.jpg", 0) for number in range(10**9))
    monkeypatch.setattr(inspect, "walk_images", lambda folder: files)
    assert re.search(r"more than [\d,]+000 ", inspect.count_files(str(pictures)))


PRINT_PROGRESS = """
import sys
from localagg.io import console
from localagg.cli import main
original = console.show_progress
def print_progress(description):
    print(description, "torch" in sys.modules, file=sys.stderr)
    return original(description)
console.show_progress = print_progress
sys.exit(main(["inspect", sys.argv[1], "--recipe", "none"]))
"""


@pytest.mark.slow
def test_files_are_counted_before_torch_is_imported(tmp_path, pictures):
    """The import takes seconds."""
    (tmp_path / "a").symlink_to(pictures / "train" / "temple")
    for number in range(2000):
        (tmp_path / f"{number}.txt").touch()
    (tmp_path / "b").symlink_to(pictures / "train" / "temple")
    words = [sys.executable, "-c", PRINT_PROGRESS, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert lines[1] == "counting False"
    assert re.fullmatch(r"starting: 48 .* False", lines[2])
    assert "inspecting train True" in lines
