"""Write and read the metrics of a run: ``metrics.jsonl``, and the same values as curves."""

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line
from .console import notify
from .loggers import close_logger

MetricsCallback = Callable[[int, dict[str, Any]], None]
"""Called with a number (step or epoch) and metrics."""


class MetricsLog:
    """Append to ``metrics.jsonl`` and to TensorBoard's file in a run folder.

    The lines depend on the run alone and not on the machine, so a run that was killed and resumed
    has the lines of one that was not.

    Args:
        run: run folder.
        keep: bytes of metrics.jsonl to keep. Lines after the last checkpoint are cut off, because
            the resumed run writes them again.
        step: step from which the curves continue.
        on_write: called as ``on_write(step, values)`` with each line.
        logger: a further logger, from :func:`.open_logger`.
    """

    def __init__(
        self,
        run: Path,
        *,
        keep: int = 0,
        step: int = 0,
        on_write: MetricsCallback | None = None,
        logger: Any = None,
    ) -> None:
        self._on_write, self._logger = on_write, logger
        self._file = open(run / "metrics.jsonl", "a+b")  # noqa: SIM115 - closed by close()
        self._file.truncate(self._complete_bytes(keep))
        self._curves = _TensorBoardFile(run / "tensorboard", step)

    def _complete_bytes(self, keep: int) -> int:
        """Return ``keep``, or the end of the last complete line of a file that is shorter."""
        if self._file.seek(0, os.SEEK_END) >= keep:
            return keep
        self._file.seek(0)
        kept = self._file.read().rfind(b"\n") + 1
        notify(f"'{self._file.name}' was cut or lost; the metrics after byte {kept:,} are missing.")
        return kept

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write one line and one point on each curve.

        Raises:
            OSError: disk full, or another error of the file system.
        """
        self._file.write(json.dumps({"step": step, **values}).encode() + b"\n")
        self._file.flush()
        self.curve(step, values)
        if self._on_write is not None:
            self._on_write(step, values)

    def curve(self, step: int, values: dict[str, Any]) -> None:
        """Write points on curves only, for values that depend on the machine."""
        self._curves.write(step, values)
        if self._logger is not None:
            numbers = {n: value for n, value in values.items() if isinstance(value, int | float)}
            self._logger.log_metrics(numbers, step)

    def flushed(self) -> int:
        """Force both files to disk; return the size of metrics.jsonl in bytes."""
        self._curves.flush()
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Close both files. Values that do not fit on a full disk are lost."""
        for file in (self._file, self._curves):
            with contextlib.suppress(OSError):
                file.close()
        if self._logger is not None:
            close_logger(self._logger)


class NoMetricsLog:
    """A :class:`MetricsLog` that writes nothing, for all ranks but the first."""

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Do nothing."""

    def curve(self, step: int, values: dict[str, float]) -> None:
        """Do nothing."""

    def flushed(self) -> int:
        """Return 0."""
        return 0

    def close(self) -> None:
        """Do nothing."""


class _TensorBoardFile:
    """TensorBoard events, written directly. The SummaryWriter of tensorboardX writes in a thread,
    which a full disk ends; the run would then wait for it forever."""

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]

        folder.mkdir(exist_ok=True)
        self._file = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        if step:  # makes TensorBoard drop points that a killed run wrote after its checkpoint
            log = SessionLog(status=SessionLog.START)
            self._file.write_event(Event(wall_time=time.time(), step=step, session_log=log))
        self.flush, self.close = self._file.flush, self._file.close

    def write(self, step: int, values: dict[str, Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined]
        from tensorboardX.summary import scalar

        for name, value in values.items():
            if isinstance(value, (int, float)):
                event = Event(wall_time=time.time(), step=step, summary=scalar(name, value))
                self._file.write_event(event)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return all lines of a run's metrics.jsonl.

    Raises:
        UserError: a line is damaged.
    """
    path = run / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        reason = first_line(error)
        raise UserError(
            "damaged", f"'{path}' is damaged ({reason}); restore it from a copy, or delete it."
        ) from None
