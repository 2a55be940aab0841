"""What a run tells: the console, metrics.jsonl, TensorBoard, and where its time went."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:  # it takes seconds to load, and a bar can be seen meanwhile
    import torch

_LINE_SECONDS = 10.0
console = Console(stderr=True)  # results go to stdout and files, everything else here


def notify(message: str) -> None:
    """One line to the user, on stderr."""
    console.print(printable(message), highlight=False, markup=False, soft_wrap=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on stdout: the first column to the left, the others to the right."""
    table = Table(box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(_plain(column), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_plain, row))
    Console().print(table)


def _plain(text: str) -> str:
    """Text that a terminal and rich's markup leave as it is."""
    return escape(printable(text))


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
def show_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that reports ``(done, of)``, with 0 where nobody knows of how many; off a
    terminal, a line every ten seconds."""
    with progress_bar() as bar:
        task = bar.add_task(_plain(what), total=None, note="")
        last = time.monotonic()

        def show(done: int, of: int) -> None:
            nonlocal last
            bar.update(task, completed=done, total=of or None)
            if bar.disable and time.monotonic() - last >= _LINE_SECONDS:
                last = time.monotonic()
                notify(f"{what}: {done:,} of {of:,}")

        yield show


class Metrics:
    """metrics.jsonl and TensorBoard of a run.

    Lines hold what a run has learned and nothing of the machine it ran on, so that a run that was
    killed and went on has the lines of one that never was.

    Args:
        run: the run folder.
        keep: bytes of metrics.jsonl to keep; what a killed run wrote after its last checkpoint
            is cut off and will be written again.
        step: where TensorBoard's curves go on.
    """

    def __init__(self, run: Path, *, keep: int = 0, step: int = 0) -> None:
        self._file = open(run / "metrics.jsonl", "ab")  # noqa: SIM115 - closed by close()
        self._file.truncate(keep)
        self._board = _Board(run / "tensorboard", step)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line, and one point on each curve.

        Raises:
            OSError: the disk is full, or otherwise refuses.
        """
        self._file.write(json.dumps({"step": step, **values}).encode() + b"\n")
        self._file.flush()
        self._board.write(step, values)

    def curve(self, step: int, values: dict[str, float]) -> None:
        """A point on each curve alone, for what belongs to the machine."""
        self._board.write(step, values)

    def flushed(self) -> int:
        """Bytes of metrics.jsonl that are safely on disk now."""
        self._board.flush()
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Close both. What a full disk did not take is left out."""
        for file in (self._file, self._board):
            with contextlib.suppress(OSError):
                file.close()


class NoMetrics:
    """The :class:`Metrics` of the ranks that write none."""

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Nothing."""

    def curve(self, step: int, values: dict[str, float]) -> None:
        """Nothing."""

    def flushed(self) -> int:
        """No bytes."""
        return 0

    def close(self) -> None:
        """Nothing."""


class _Board:
    """TensorBoard's file, by tensorboardX's writer of records. Its SummaryWriter writes from a
    thread, where a full disk ends the thread and leaves the run waiting for it without end."""

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]

        folder.mkdir(exist_ok=True)
        self._file = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        if step:  # what a killed run wrote after its last checkpoint is not to be shown
            log = SessionLog(status=SessionLog.START)
            self._file.write_event(Event(wall_time=time.time(), step=step, session_log=log))

    def write(self, step: int, values: dict[str, Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined]
        from tensorboardX.summary import scalar

        for name, value in values.items():
            if isinstance(value, (int, float)):
                event = Event(wall_time=time.time(), step=step, summary=scalar(name, value))
                self._file.write_event(event)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Shares:
    """Seconds by part of a run, for the table at its end.

    On CUDA only every 20th step is timed, with a synchronization at each part's ends, so that the
    other steps run free; the sums are scaled up.
    """

    def __init__(self, device: "torch.device") -> None:
        import torch

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
