"""Print messages, tables and progress for people. Results go to stdout, the rest to stderr."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ..errors import printable

ProgressCallback = Callable[[int, int], None]
"""Called with (items done, items); 0 items if unknown."""

_BAR_SECONDS = 0.1  # between updates of a bar
_LINE_SECONDS = 10.0  # between lines of progress without a terminal
console = Console(stderr=True)


def notify(message: str) -> None:
    """Print one line on stderr."""
    console.print(printable(message), highlight=False, markup=False, soft_wrap=True)


class _TableConsole(Console):
    """A console that leaves a closed pipe to the command line; rich would exit with status 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on stdout, the first column aligned left, the others right."""
    table = Table(box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(_escaped(column), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_escaped, row))
    _TableConsole().print(table)


def _escaped(text: str) -> str:
    """Text that neither a terminal nor rich's markup interprets."""
    return escape(printable(text))


class _ItemsPerSecond(ProgressColumn):
    """Speed, which rich's own column shows only while the total is unknown."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.1f}/s")


def progress_bar() -> Progress:
    """Return a bar with count, speed, share, elapsed and remaining time; off without a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        _ItemsPerSecond(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


@contextlib.contextmanager
def show_progress(description: str) -> Iterator[ProgressCallback]:
    """Show a bar; the block reports ``(done, total)``, total 0 if unknown.

    Without a terminal it prints a line every ten seconds.
    """
    with progress_bar() as bar:
        task = bar.add_task(_escaped(description), total=None, note="")
        updated, line = 0.0, time.monotonic()

        def show(done: int, total: int) -> None:
            nonlocal updated, line
            now = time.monotonic()
            if done != total and now - updated < _BAR_SECONDS:
                return
            updated = now
            bar.update(task, completed=done, total=total or None)
            if bar.disable and now - line >= _LINE_SECONDS:
                line = now
                notify(f"{description}: {done:,} of {total:,}")

        yield show
