import re

from localagg.cli import inspect


def test_counting_files_ends_after_a_second(pictures, monkeypatch):
    files = ((f"{number}.jpg", 0) for number in range(10**9))
    monkeypatch.setattr(inspect, "walk_images", lambda folder: files)
    assert re.search(r"more than [\d,]+000 ", inspect.count_files(str(pictures)))
