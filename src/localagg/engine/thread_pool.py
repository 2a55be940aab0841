"""Work split over as many threads as torch has, each of which computes alone.

torch's own threads (OpenMP) spin while they wait for the next product. They would take the cores
from the work, and on a busy machine each product would wait for the slowest thread. So they are
ended before the work begins, whenever torch was imported; torch starts them anew.
"""

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")


def in_threads(call: Callable[[range], T], size: int) -> list[T]:
    """Split ``range(size)`` into a part for each torch thread; return ``call(part)`` in order."""
    threads = torch.get_num_threads()
    step = max(1, -(-size // threads))
    parts = [range(start, min(size, start + step)) for start in range(0, size, step)]
    if len(parts) < 2:
        return [call(part) for part in parts]
    release_torch_threads()
    return list(_pool(threads).map(call, parts))


def take_from(queue: deque[int]) -> Iterator[int]:
    """Yield the numbers of a queue that threads share, each to the first that is free."""
    while True:
        try:
            yield queue.popleft()
        except IndexError:
            return


def release_torch_threads() -> None:
    """End the threads that wait for this thread's next torch operation, which starts new ones.

    That takes 0.1 ms, where the library that torch computes with has the function; where it lacks
    it, and in a forked child, whose threads are gone, nothing happens.
    """
    if os.getpid() == _PROCESS and (library := _openmp()):
        library.omp_pause_resource(1, library.omp_get_initial_device())  # 1: omp_pause_soft


_PROCESS = os.getpid()


@cache
def _openmp() -> ctypes.CDLL | None:
    """Return torch's library, through which its OpenMP's functions are found, or None."""
    try:
        (file,) = (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")
        library = ctypes.CDLL(str(file))
        return library if library.omp_pause_resource and library.omp_get_initial_device else None
    except (OSError, ValueError, AttributeError):
        return None


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    started = threading.Barrier(threads)
    pool = ThreadPoolExecutor(threads, initializer=_use_one_thread)
    try:
        list(pool.map(lambda _: started.wait(), range(threads)))
    except RuntimeError:  # no further thread can start: those that wait would never end
        started.abort()
        raise
    torch.set_num_threads(threads)
    return pool


def _use_one_thread() -> None:
    """Make torch compute with this thread alone.

    A thread copies torch's global count on first use, so it is read here, before :func:`_pool`
    restores the count. Otherwise OpenMP would see more threads than cores, let all of them sleep
    instead of spin, and double the time of a small network's step.
    """
    torch.set_num_threads(1)
    torch.get_num_threads()


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has no threads of its own
