"""Progress: whole numbers at any width, lines without a terminal."""

import contextlib
import errno
import io
import re

import pytest

from localagg.io import console as console_module
from localagg.io.console import ProgressLine, duration, print_table, progress_text, show_progress

FULL = {
    "done": 1234,
    "total": 98765,
    "note": "LA loss 1.423, 12% without",
    "rate": 34.5,
}


@pytest.mark.parametrize("width", range(40, 121))
def test_no_width_cuts_a_number(width):
    whole = progress_text(1000, "epoch 12/50", **FULL)
    text = progress_text(width, "epoch 12/50", **FULL)
    assert len(text) < width
    numbers = re.findall(r"[\d.,:/%]*\d[\d.,:/%]*", text)
    assert set(numbers) <= set(re.findall(r"[\d.,:/%]*\d[\d.,:/%]*", whole))
    assert text.startswith("epoch 12/50")
    assert text.endswith("47:07 left")
    assert width < 80 or "LA loss 1.423" in text


def test_a_table_keeps_its_values_in_any_width(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1")
    print_table(["", "accuracy", "note"], [["200-NN", "78.8%", "held out"]])
    shown = capsys.readouterr().out
    for value in ("200-NN", "accuracy", "78.8%", "held out"):
        assert value in shown


def test_unknown_totals_show_the_count_and_slow_work_the_time_of_each():
    assert progress_text(80, "counting", done=7000).split() == ["counting", "7,000"]
    assert "4.0 s each" in progress_text(80, "x", done=1, total=3, rate=0.25)
    assert (duration(200), duration(7400)) == ("3:20", "2:03:20")


def test_without_a_terminal_a_line_comes_after_a_second_and_then_every_ten(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now[0])
    with show_progress("embedding") as show:
        for second in range(1, 36):
            now[0] = float(second)
            show(second * 100, 10_000)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[:1] for line in lines] == [["embedding"]] * 4
    assert "100/10,000" in lines[0]
    assert "1,100/10,000" in lines[1]
    assert "1:29 left" in lines[1]
    assert "100.0/s" in lines[3]


def test_a_terminal_of_80_columns_shows_the_time_left(monkeypatch):
    import io

    from rich.console import Console

    screen = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(console_module, "console", screen)
    with ProgressLine("epoch 12/50", total=500, done=20) as line:
        line.update(30, note="LA loss 1.42, 12% without a close neighbor")
    shown = screen.file.getvalue()
    assert "30/500" in shown
    assert re.search(r"\d+:\d\d left", shown)
    assert "…" not in shown


def test_a_notebook_shows_one_line_that_changes(monkeypatch):
    shown = []

    class Handle:
        def update(self, data, raw):
            shown.append(data["text/plain"])

    def display(data, **_):
        shown.append(data["text/plain"])
        return Handle()

    module = type("display", (), {"display": staticmethod(display)})
    monkeypatch.setitem(__import__("sys").modules, "IPython", module)
    monkeypatch.setitem(__import__("sys").modules, "IPython.display", module)
    monkeypatch.setattr(console_module.console, "is_jupyter", True)
    with show_progress("embedding") as show:
        show(3, 10)
    assert shown[0] == "embedding"
    assert "3/10" in shown[-1]


@pytest.mark.parametrize(("number", "raised"), [(errno.ENOSPC, False), (errno.EBADF, True)])
def test_a_log_on_a_full_disk_does_not_end_the_work(monkeypatch, number, raised):
    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(number, "cannot write")

    monkeypatch.setattr("sys.stderr", Full())
    with pytest.raises(OSError, match="cannot write") if raised else contextlib.nullcontext():
        console_module.notify("a line")
