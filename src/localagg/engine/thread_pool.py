"""Work split over as many threads as torch has, each of which computes alone.

torch's own threads spin while they wait for the next product. They would take the cores from the
work between products, and on a busy machine each product would wait for the slowest thread.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
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
    return list(_pool(threads).map(call, parts))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    started = threading.Barrier(threads)
    pool = ThreadPoolExecutor(threads, initializer=_use_one_thread)
    list(pool.map(lambda _: started.wait(), range(threads)))
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
