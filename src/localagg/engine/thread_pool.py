"""Work shared out over as many threads as torch has, each of which computes alone.

torch's own threads wait for their next product by spinning, and would take the cores from what runs
between products; on a busy machine each product would wait for the slowest.
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
    """``call`` of as many stretches of ``range(size)``, in order, as torch has threads."""
    threads = torch.get_num_threads()
    step = max(1, -(-size // threads))
    stretches = [range(start, min(size, start + step)) for start in range(0, size, step)]
    if len(stretches) < 2:
        return [call(stretch) for stretch in stretches]
    return list(_pool(threads).map(call, stretches))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    met = threading.Barrier(threads)
    pool = ThreadPoolExecutor(threads, initializer=_alone)
    list(pool.map(lambda _: met.wait(), range(threads)))
    torch.set_num_threads(threads)
    return pool


def _alone() -> None:
    """From now on this thread computes alone.

    A thread takes the number that was set last, by whichever thread, when it first computes or
    asks; later it keeps its own. So it asks before the others are given theirs back. With teams of
    their own beside the main thread's, OpenMP would see more threads than cores, let all of them
    sleep instead of spin, and double the time of a small network's step.
    """
    torch.set_num_threads(1)
    torch.get_num_threads()


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads stay with the parent
