"""Print messages, tables and progress for people. Results go to stdout, the rest to stderr."""

import contextlib
import errno
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..errors import printable

ProgressCallback = Callable[[int, int], None]
"""Called with (items done, items); 0 items if unknown."""

_FIRST_SECONDS = 1.0  # before the first line of progress without a terminal
_LINE_SECONDS = 10.0  # between such lines
_LINE_WIDTH = 100  # columns of such a line
_BAR_WIDTH = 16
_PIPE_WIDTH = 10_000  # of a table without a terminal
_LEAST_WIDTH = 12  # of a column; rich drops the text of a table that is too narrow
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PER_SECOND = 5  # updates of a live line
_SAMPLE_SECONDS, _WINDOW = 2.0, 30  # the rate is that of the last minute


class _Console(Console):
    """A console that leaves a closed pipe to the command line; rich would exit with status 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


console = _Console(stderr=True)


def notify(message: str) -> None:
    """Print one line on stderr; a log on a full disk loses it, and does not end the work."""
    try:
        console.print(printable(message), highlight=False, markup=False, soft_wrap=True)
    except OSError as error:
        if error.errno not in _FULL:
            raise


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on stdout, the first column aligned left, the others right.

    A column without any value is left out. Lines fold at the width of a terminal, else nowhere: a
    file or a program wants whole names.
    """
    rows = list(rows)
    shown = [n for n in range(len(columns)) if not n or not rows or any(row[n] for row in rows)]
    table = Table(box=box.SIMPLE_HEAD)
    for n in shown:
        table.add_column(_escaped(columns[n]), justify="right" if n else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_escaped(row[n]) for n in shown))
    out = _Console()
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = _PIPE_WIDTH
    out.width = max(out.width, _LEAST_WIDTH * len(shown))
    out.print(table)


def _escaped(text: str) -> str:
    """Text that neither a terminal nor rich's markup interprets."""
    return escape(printable(text))


def duration(seconds: float) -> str:
    """Return ``3:20`` or ``2:03:20``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def progress_text(
    width: int,
    description: str,
    *,
    done: int = 0,
    total: int | None = None,
    note: str = "",
    rate: float | None = None,
) -> str:
    """Return a line of progress of at most ``width`` columns.

    Whole parts are omitted where it is too narrow, so that no number is cut: first the bar, then
    rate, share, count, note and time left.

    Args:
        width: columns.
        description: always shown, cut only if it alone is too long.
        done, total: items; total None if unknown.
        note: such as the loss.
        rate: items a second, if known.
    """
    left = total is not None and rate and f"{duration((total - done) / rate)} left"
    filled = round(_BAR_WIDTH * done / total) if total else 0
    parts = {
        "description": description,
        "bar": total and "━" * filled + "╌" * (_BAR_WIDTH - filled),
        "count": f"{done:,}/{total:,}" if total else done and f"{done:,}",
        "share": total and f"{done / total:.0%}",
        "note": note,
        "rate": rate and (f"{rate:,.1f}/s" if rate >= 1 else f"{1 / rate:,.1f} s each"),
        "left": left,
    }
    parts = {name: str(part) for name, part in parts.items() if part}
    for name in ("bar", "rate", "share", "count", "note", "left"):
        if len("  ".join(parts.values())) < width:
            break
        parts.pop(name, None)
    return "  ".join(parts.values())[: max(0, width - 1)]


class ProgressLine:
    """One line of progress: live on a terminal and in a notebook, else printed after a second and
    then every ten seconds.

    Args:
        description: the work, such as "embedding".
        total: number of items, if known.
        done: items already done.
    """

    def __init__(self, description: str, total: int | None = None, done: int = 0) -> None:
        self.description, self.total, self.done, self.note = description, total, done, ""
        self._samples: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self._live: Live | None = None
        self._display: Any = None
        self._shown = time.monotonic() + _FIRST_SECONDS - _LINE_SECONDS

    def __enter__(self) -> "ProgressLine":
        self._samples.append((time.monotonic(), self.done))
        if console.quiet:
            return self
        if console.is_jupyter:
            from IPython.display import display  # pyright: ignore[reportMissingImports]

            self._display = display(self._mime(), raw=True, display_id=True)
        elif console.is_terminal:
            live = Live(
                console=console,
                get_renderable=lambda: Text(self.text(console.width), no_wrap=True),
                refresh_per_second=_PER_SECOND,
                transient=True,
            )
            live.start()
            self._live = live
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        if self._display is not None:
            self._display.update(self._mime(), raw=True)

    def update(
        self,
        done: int | None = None,
        total: int | None = None,
        *,
        description: str | None = None,
        note: str | None = None,
    ) -> None:
        """Change what the line shows."""
        self.done = self.done if done is None else done
        self.total = self.total if total is None else total
        self.description = self.description if description is None else description
        self.note = self.note if note is None else note
        now = time.monotonic()
        if now - self._samples[-1][0] >= _SAMPLE_SECONDS:
            self._samples.append((now, self.done))
        if self._display is not None and now - self._shown >= 1 / _PER_SECOND:
            self._shown = now
            self._display.update(self._mime(), raw=True)
        elif not (self._live or self._display) and now - self._shown >= _LINE_SECONDS:
            self._shown = now
            notify(self.text(_LINE_WIDTH))

    def rate(self) -> float | None:
        """Return items a second over about the last minute; None at the beginning."""
        start, first = self._samples[0]
        seconds, items = time.monotonic() - start, self.done - first
        return items / seconds if items > 0 and seconds > 0 else None

    def text(self, width: int) -> str:
        """Return the line; see :func:`progress_text`."""
        return progress_text(
            width,
            printable(self.description),
            done=self.done,
            total=self.total,
            note=printable(self.note),
            rate=self.rate(),
        )

    def _mime(self) -> dict[str, str]:
        return {"text/plain": self.text(_LINE_WIDTH)}


@contextlib.contextmanager
def show_progress(description: str) -> Iterator[ProgressCallback]:
    """Show a :class:`ProgressLine`; the block reports ``(done, total)``, total 0 if unknown."""
    with ProgressLine(description) as line:
        yield lambda done, total: line.update(done, total or None)
