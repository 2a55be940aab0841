"""Map a function over inputs in worker processes; report a worker's death as one error."""

import atexit
import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

from ...errors import UserError
from ...io.machine import keep_freed_memory

_TORCH_MESSAGES = ("DataLoader worker", "Pin memory thread exited")
T = TypeVar("T")


class _Results(Dataset):
    def __init__(self, function: Callable[[Any], Any], inputs: Sequence[Any]) -> None:
        self.function, self.inputs = function, inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, number: int) -> Any:
        return self.function(self.inputs[number])


def map_in_workers(
    function: Callable[[Any], T], inputs: Sequence[Any], workers: int, *, pin: bool = False
) -> Iterator[T]:
    """Yield ``function(input)`` of all inputs in order, computed by worker processes.

    Each worker is up to four inputs ahead.

    Args:
        function: can be pickled, or is inherited by forked workers.
        inputs: copied to each worker at the start.
        workers: processes; 0: this one.
        pin: return tensors in page-locked memory, from which CUDA copies while it computes.

    Raises:
        UserError: a worker has died.
    """
    keep_freed_memory()  # workers inherit the setting
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about more workers than cores: workers wait for disks too
        loader = DataLoader(
            _Results(function, inputs),
            batch_size=None,
            num_workers=workers,
            worker_init_fn=_initialize_worker,
            prefetch_factor=4 if workers else None,
            pin_memory=pin,
        )
        others = set(multiprocessing.active_children())
        results = iter(loader)
    started = set(multiprocessing.active_children()) - others
    at_exit = functools.partial(_kill, started)
    atexit.register(at_exit)
    with convert_worker_death(started):
        yield from results
    atexit.unregister(at_exit)


@contextlib.contextmanager
def convert_worker_death(workers: Iterable[BaseProcess] = ()) -> Iterator[None]:
    """Convert a worker's death to UserError, wherever in the block it is noticed.

    torch raises RuntimeError from a signal handler, wherever the main thread is at that moment; so
    a whole loop over batches belongs into this block.

    Args:
        workers: processes whose items are fetched in the block. A lost connection to them can show
            the death before torch does: an item that was announced stays with its worker.

    Raises:
        UserError: a worker was killed, or ended early.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError):
            died = str(error).startswith(_TORCH_MESSAGES)
        else:  # sockets close up to a second before the process ends
            died = bool(multiprocessing.connection.wait([w.sentinel for w in workers], 1))
        if not died:
            raise
        # Report one death once: torch's handler would raise again, wherever this thread is then.
        # A later loop still notices deaths, because it polls its workers while it waits.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise UserError(
            "worker-died",
            "A worker process that reads images was killed, most often because memory (or /dev/shm)"
            " ran out; use fewer --workers, or --workers 0 to read in the main process.",
        ) from None


def _kill(workers: Iterable[BaseProcess]) -> None:
    """Kill the workers of a loop that an error ended. They ignore SIGTERM, by which Python would
    end them at exit, so that it would wait forever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report these deaths
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def _initialize_worker(_: int) -> None:
    """Leave Ctrl-C and a scheduler's signals to the parent process, and end with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _skip_lost_connections
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End the worker when its parent was killed. PyTorch checks this between two items only; a
    worker that waits for room in the pipe to a dead process would wait forever."""
    if (parent := multiprocessing.parent_process()) is not None:
        while os.getppid() == parent.pid:
            time.sleep(1)
        os._exit(1)


def _skip_lost_connections(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print an exception, unless a batch was not fetched when the loop ended. The main process
    raises a worker's real errors."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)
