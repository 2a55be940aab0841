"""What a run tells: the console, metrics.jsonl, TensorBoard, and where its time went."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
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

console = Console(stderr=True)  # results go to stdout and files, everything else here


def say(message: str) -> None:
    """One line to the user, on stderr."""
    console.print(message, highlight=False, markup=False, soft_wrap=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on stdout: the first column to the left, the others to the right."""
    table = Table(box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


class _Rate(ProgressColumn):
    """Items a second; rich's own column shows them only while the total is unknown."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.1f}/s")


def progress_bar() -> Progress:
    """A bar with count, rate, share, elapsed and remaining time; silent where nobody watches."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        _Rate(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


@contextlib.contextmanager
def showing(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that reports ``(done, of)``."""
    with progress_bar() as bar:
        task = bar.add_task(what, total=None, note="")
        yield lambda done, of: bar.update(task, completed=done, total=of)


class Metrics:
    """metrics.jsonl and TensorBoard of a run.

    Args:
        run: the run folder.
        keep: bytes of metrics.jsonl to keep; what a killed run wrote after its last checkpoint
            is cut off and will be written again.
        step: where TensorBoard's curves go on.
    """

    def __init__(self, run: Path, *, keep: int = 0, step: int = 0) -> None:
        from tensorboardX import SummaryWriter

        self._file = open(run / "metrics.jsonl", "ab")  # noqa: SIM115 - closed by close()
        self._file.truncate(keep)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step or None)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line, and one point on each curve."""
        self._file.write(json.dumps({"step": step, **values}).encode() + b"\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(name, value, step)

    def flushed(self) -> int:
        """Bytes of metrics.jsonl that are safely on disk now."""
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Close both."""
        self._file.close()
        self._board.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Shares:
    """Seconds by part of a run, for the table at its end.

    On CUDA only every 20th step is timed, with a synchronization at each part's ends, so that the
    other steps run free; the sums are scaled up.
    """

    def __init__(self, device: torch.device) -> None:
        self._wait = torch.cuda.synchronize if device.type == "cuda" else None
        self._every = 20 if self._wait else 1
        self._step = 0
        self.seconds: dict[str, float] = {}

    def next_step(self) -> None:
        """A new step begins."""
        self._step += 1

    @contextlib.contextmanager
    def __call__(self, part: str, *, once: bool = False) -> Iterator[None]:
        """Time a part of the step, or of the run (``once``)."""
        if not once and self._step % self._every:
            yield
            return
        if self._wait:
            self._wait()
        start = time.perf_counter()
        yield
        if self._wait:
            self._wait()
        spent = (time.perf_counter() - start) * (1 if once else self._every)
        self.seconds[part] = self.seconds.get(part, 0.0) + spent

    def shares(self) -> dict[str, float]:
        """Each part's share of the sum, 0-1."""
        whole = sum(self.seconds.values()) or 1.0
        return {part: spent / whole for part, spent in self.seconds.items()}
