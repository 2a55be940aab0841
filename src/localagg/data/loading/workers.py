"""Map a function over inputs in worker processes; report a worker's death as one error."""

import atexit
import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...errors import Code, UserError, first_line
from ...io.machine import check_process_count, keep_freed_memory

_TORCH_MESSAGES = ("DataLoader worker", "Pin memory thread exited")
_CANNOT_SEND = 71  # EX_OSERR of sysexits.h
_CRASHES = tuple(
    -getattr(signal, name)
    for name in ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL", "SIGFPE")
    if hasattr(signal, name)
)
_GUARD = (
    "A worker process ended while it started. On this system each worker runs the script again:"
    ' put the calls below if __name__ == "__main__":, or use workers=0.'
)
_NO_FILE = (
    "A program without a file of its own (read from stdin) cannot start workers on this system;"
    " save it as a file, or use workers=0."
)
_CANNOT_START = (
    "Worker processes cannot start ({}); make room in /dev/shm, raise the limits of processes and"
    " open files (ulimit -u, ulimit -n), or use --workers 0."
)
_DAEMONIC = "This process is daemonic and may start no workers; use workers=0, or daemon=False."
T = TypeVar("T")


class _Unshared(NamedTuple):
    """A tensor that shared memory had no room for; the pipe to the main process carries it."""

    array: np.ndarray


class _Failure(NamedTuple):
    """Code and message of the UserError that a worker's exception becomes."""

    code: Code
    message: str


class _Results(Dataset):
    def __init__(self, function: Callable[[Any], Any], inputs: Sequence[Any], workers: int) -> None:
        self.function, self.inputs, self.workers = function, inputs, workers

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, number: int) -> Any:
        if not self.workers:
            return self.function(self.inputs[number])
        try:
            return _map_leaves(_share, self.function(self.inputs[number]))
        except UserError as error:
            return _Failure(error.code, str(error))
        except MemoryError as error:
            reason = f" ({first_line(error)})" if str(error) else ""
            return _Failure(
                "too-large",
                f"A worker process has not enough memory{reason}; use fewer --workers, or smaller"
                " images.",
            )
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{os.path.basename(frame.filename)}:{frame.lineno}"
            name = "".join(traceback.format_exception_only(error)).strip()
            return _Failure(
                "worker-died",
                f"A worker process failed at {place}: {name}; use --workers 0 for a full report.",
            )


def _map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to each value in tuples, except in dicts, which hold no tensors."""
    if isinstance(value, tuple) and not isinstance(value, _Unshared | _Failure):
        parts = [_map_leaves(function, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return function(value)


def _share(value: Any) -> Any:
    """Move a tensor to shared memory, or return its values where /dev/shm is full.

    Docker gives 64 MB by default. torch would try in a thread that sends results, where a failure
    loses the result, and the main process waits for it forever (pytorch #5040).
    """
    if isinstance(value, Tensor):
        try:
            value.share_memory_()
        except (RuntimeError, OSError):
            return _Unshared(value.numpy())
    return value


def _unchanged(value: Any) -> Any:
    return value


def _received(value: Any) -> Any:
    return torch.from_numpy(value.array) if isinstance(value, _Unshared) else value


def check_workers(workers: int) -> None:
    """Raise a UserError if this process cannot start so many workers."""
    check_process_count("--workers", workers, 32)
    process = multiprocessing.current_process()
    if not workers:
        return
    if getattr(process, "_inheriting", False):  # a worker runs the user's script at its start
        raise UserError("worker-died", _GUARD)
    if process.daemon:
        raise UserError("environment", _DAEMONIC)
    file = getattr(sys.modules["__main__"], "__file__", None)
    if multiprocessing.get_start_method() != "fork" and file and not os.path.exists(file):
        raise UserError("environment", _NO_FILE)


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
        UserError: the function raised an exception in a worker, or a worker has died.
    """
    check_workers(workers)
    workers = min(workers, len(inputs))
    keep_freed_memory()  # workers inherit the setting
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about more workers than cores: workers wait for disks too
        loader = DataLoader(
            _Results(function, inputs, workers),
            batch_size=None,
            collate_fn=_unchanged,  # torch's would make tensors of arrays
            num_workers=workers,
            worker_init_fn=_initialize_worker,
            prefetch_factor=4 if workers else None,
            pin_memory=pin,
        )
        others = set(multiprocessing.active_children())
    started: set[BaseProcess] = set()
    at_exit = functools.partial(_kill, started)
    atexit.register(at_exit)
    with convert_worker_death(started):
        results = _start(loader)
        started |= set(multiprocessing.active_children()) - others
        for result in results:
            if isinstance(result, _Failure):
                raise UserError(*result)
            yield _map_leaves(_received, result)
    atexit.unregister(at_exit)


def _start(loader: DataLoader) -> Iterator[Any]:
    """Start the workers, or raise a UserError that says why the system does not allow it."""
    hook, reason = sys.unraisablehook, ""
    sys.unraisablehook = lambda _: None  # torch deletes its half-made iterator with a traceback
    try:
        return iter(loader)
    except OSError as error:  # no room in /dev/shm for semaphores, no more processes or files
        reason = error.strerror or str(error)
    except RuntimeError as error:
        if "new thread" not in str(error):
            raise
        reason = str(error)
    finally:
        sys.unraisablehook = hook
    raise UserError("environment", _CANNOT_START.format(reason))


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
        _ignore_deaths()
        raise UserError("worker-died", _cause_of_death(str(error), workers)) from None


def _ignore_deaths() -> None:
    """Remove torch's handler, which raises when a worker dies."""
    if hasattr(signal, "SIGCHLD"):  # Windows has none
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _cause_of_death(message: str, workers: Iterable[BaseProcess]) -> str:
    """Return what ended a worker, and the way out, by torch's message or its exit status."""
    if found := re.search(r"exit code (\d+)", message):
        status = int(found[1])
    else:
        multiprocessing.connection.wait([worker.sentinel for worker in workers], 1)
        codes = [worker.exitcode for worker in workers]
        status = next((code for code in codes if code), 0 if 0 in codes else -signal.SIGKILL)
    if status == _CANNOT_SEND:
        return (
            "A worker process could not send its images to the main process (its message is above);"
            " use fewer --workers, or --workers 0 to read in the main process."
        )
    if status > 0 and multiprocessing.get_start_method() != "fork":
        return _GUARD
    if status in _CRASHES:
        return (
            f"A worker process crashed ({signal.Signals(-status).name}), most often because a"
            " library failed on an image; use --workers 0 with PYTHONFAULTHANDLER=1 to see where."
        )
    if status >= 0:
        return (
            f"A worker process that reads images exited with status {status}; use --workers 0 to"
            " read in the main process and see why."
        )
    return (
        "A worker process that reads images was killed, most often because memory ran out;"
        " use fewer --workers, or --workers 0 to read in the main process."
    )


def _kill(workers: Iterable[BaseProcess]) -> None:
    """Kill the workers of a loop that an error ended. They ignore SIGTERM, by which Python would
    end them at exit, so that it would wait forever."""
    _ignore_deaths()
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def _initialize_worker(_: int) -> None:
    """Leave Ctrl-C and a scheduler's signals to the parent process, and end with it."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):  # Windows lacks the last two
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.excepthook = _skip_lost_connections
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_unsent)  # pyright: ignore
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_unsent(error: BaseException, _: Any) -> None:
    """End the worker if its result cannot be sent: the main process would wait for it forever."""
    sys.stderr.write(f"localagg: {type(error).__name__}: {error}\n")
    sys.stderr.flush()
    os._exit(_CANNOT_SEND)


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
