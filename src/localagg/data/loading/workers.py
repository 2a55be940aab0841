"""Worker processes: the items of a dataset in order, and one sentence where a worker dies."""

import atexit
import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.process import BaseProcess
from types import TracebackType

from torch.utils.data import DataLoader, Dataset

from ...errors import UserError
from ...io.allocator import keep_freed_memory

Progress = Callable[[int, int], None]  # (done, of)

DEATH = (
    "A worker process that reads images was killed, most often because memory (or /dev/shm)"
    " ran out; use fewer --workers, or 0 to read in the main process."
)


def through_workers(items: Dataset, workers: int, *, pin: bool = False) -> Iterator:
    """The items of a dataset in order, made by ``workers`` processes (0: by this one).

    Each worker is up to four items ahead.

    Args:
        items: whatever can be indexed.
        workers: processes.
        pin: hand tensors over in page-locked memory, from which CUDA copies while it computes.

    Raises:
        UserError: a worker has died.
    """
    keep_freed_memory()  # workers inherit that
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are fewer cores: workers wait for disks too
        loader = DataLoader(
            items,
            batch_size=None,
            num_workers=workers,
            worker_init_fn=_ignore_interrupt,
            prefetch_factor=4 if workers else None,
            pin_memory=pin,
        )
        others = set(multiprocessing.active_children())
        made = iter(loader)
    started = set(multiprocessing.active_children()) - others
    at_exit = functools.partial(_kill, started)
    atexit.register(at_exit)
    with convert_worker_death(started):
        yield from made
    atexit.unregister(at_exit)


def _one_has_died(workers: Iterable[BaseProcess]) -> bool:
    """Whether a worker is dead, or is within a second: sockets close a little before that."""
    return bool(multiprocessing.connection.wait([worker.sentinel for worker in workers], 1))


def _kill(workers: Iterable[BaseProcess]) -> None:
    """End what a loop that was left by an error has not ended. Workers do not hear SIGTERM, by
    which Python would end them, so that it would wait for them forever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would tell of their deaths
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def _ignore_interrupt(_: int) -> None:
    # Ctrl-C, and a scheduler that takes the machine away, are the parent's to handle.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _unheard


def _unheard(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A batch that was not fetched when the loop ended is no error; a worker's real ones are raised
    in the main process."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


@contextlib.contextmanager
def convert_worker_death(workers: Iterable[BaseProcess] = ()) -> Iterator[None]:
    """A worker that dies becomes one sentence.

    torch tells of it by a RuntimeError, wherever the main thread is at that moment; so loops over
    batches stand in such a block as a whole. Where items of ``workers`` are fetched a lost
    connection can tell of it before torch does: an item that is announced lies with its worker.

    Raises:
        UserError: a worker was killed, or has ended by itself.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        torch_tells = isinstance(error, RuntimeError)
        if not (worker_death(error) if torch_tells else _one_has_died(workers)):
            raise
        # One death is told once: torch's handler would raise again, wherever this thread is then.
        # A later loop still learns of deaths, as it looks after its workers while it waits.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise UserError("TODO", DEATH) from None


def worker_death(error: RuntimeError) -> str | None:
    """What to say where torch tells of a worker's death; None where it tells of something else."""
    if not str(error).startswith(("DataLoader worker", "Pin memory thread exited")):
        return None
    return DEATH


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Throttle:
    """Calls through at most every ``seconds``; progress bars need no more."""

    def __init__(self, call: Progress, seconds: float = 0.1) -> None:
        self.call, self.seconds, self.last = call, seconds, 0.0

    def __call__(self, done: int, of: int) -> None:
        now = time.monotonic()
        if done == of or now - self.last >= self.seconds:
            self.last = now
            self.call(done, of)
