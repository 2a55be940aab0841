"""The collectives of a job over ``torch.distributed``. One rank alone calls none.

A job has R ranks. Rows of the bank and samples of a batch are split by :func:`share`: contiguous
ranges in the order of the ranks, whose sizes differ by at most one. So every rank can compute the
range of every other, and no sizes are exchanged.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError

# torch 2.14 renames the two and warns about their old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


T = TypeVar("T")


class CollectiveError(RuntimeError):
    """A collective failed: another rank has ended, hangs, or cannot be reached."""


def share(size: int, rank: int, ranks: int) -> range:
    """Return the part of 0..size-1 that a rank has; the first ``size % ranks`` have one more."""
    each, more = divmod(size, ranks)
    start = rank * each + min(rank, more)
    return range(start, start + each + (rank < more))


def lower_gloo_priority() -> None:
    """Schedule gloo's polling thread as a batch task, so that it preempts no other thread.

    While another gloo thread holds a connection's lock, the polling thread retries without pause.
    If it also preempts that thread, both wait for the scheduler's next tick. A collective of 32 KB
    among busy cores took 3.3 ms on average before and 0.26 ms after (two processes, Linux 6.18).
    """
    for name in Path("/proc/self/task").glob("*/comm"):  # only on Linux
        with contextlib.suppress(OSError):  # the thread has just ended
            if name.read_bytes() == b"gloo_tcp_loop\n":  # other names need not be text
                os.sched_setscheduler(int(name.parent.name), os.SCHED_BATCH, os.sched_param(0))


class World:
    """The ranks of a job and their collectives.

    All ranks call each method in the same order, with tensors of equal shape and dtype, and get
    identical bits. Each method raises :class:`CollectiveError` if the collective fails.

    Args:
        rank: this process, 0..R-1.
        size: R. With 1, every method returns its argument.
        local_rank: this process among those of its machine; selects the GPU.

    Attributes:
        calls: number of collectives begun; shows which rank lags behind.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank, self.calls = rank, size, local_rank, 0

    @classmethod
    def current(cls) -> "World":
        """Return the default process group of ``torch.distributed``, or one rank without it."""
        if not dist.is_initialized():
            return cls()
        local_rank = int(os.environ.get("LOCAL_RANK", 0))  # set by torchrun
        return cls(dist.get_rank(), dist.get_world_size(), local_rank)

    def part(self, size: int) -> range:
        """Return this rank's :func:`share` of 0..size-1."""
        return share(size, self.rank, self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place. One all-reduce of the tensor."""
        if self.size > 1:
            self._all_reduce(tensor, dist.ReduceOp.SUM)
        return tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        """Take the maximum over ranks, in place. One all-reduce of the tensor."""
        if self.size > 1:
            self._all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def stack(self, tensor: Tensor) -> Tensor:
        """Stack the tensors of all ranks to [R, ...]. One all-gather of the tensor."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        out = tensor.new_empty(self.size * tensor.numel())
        self._all_gather(out, tensor.contiguous().flatten())
        return out.view(self.size, *tensor.shape)

    def gather(self, rows: Tensor, total: int) -> Tensor:
        """Concatenate the shares of all ranks to [total, ...].

        One all-gather of ceil(total / R) rows a rank.

        Raises:
            ValueError: ``rows`` is not this rank's :func:`share` of ``total`` rows.
        """
        if len(rows) != len(self.part(total)):
            raise ValueError(
                f"rank {self.rank} of {self.size} has {len(rows)} of {total} rows, not its share"
                f" of {len(self.part(total))}"
            )
        if self.size == 1:
            return rows
        padded = rows.new_zeros(len(share(total, 0, self.size)), *rows.shape[1:])
        padded[: len(rows)] = rows
        return self.stack(padded).flatten(0, 1)[self._padded_positions(total, rows.device)]

    def scatter_sum(self, rows: Tensor) -> Tensor:
        """Return this rank's :func:`share` of the sum over ranks of ``rows`` [total, ...].

        One reduce-scatter of ceil(total / R) rows a rank.
        """
        if self.size == 1:
            return rows
        longest = len(share(len(rows), 0, self.size))
        padded = rows.new_zeros(self.size * longest, *rows.shape[1:])
        padded[self._padded_positions(len(rows), rows.device)] = rows
        out = rows.new_empty(longest, *rows.shape[1:])
        self._reduce_scatter(out, padded)
        return out[: len(self.part(len(rows)))]

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the Python values of all ranks. They are pickled: use for few, small values."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self._call(dist.all_gather_object, values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks. One all-reduce of a number."""
        self.sum(torch.zeros(1))

    def rank_zero_first(self, call: Callable[[], T]) -> T:
        """Run ``call`` on rank 0 first; the others then find the files it wrote. One barrier."""
        if self.rank:
            self.barrier()
            return call()
        try:
            return call()
        finally:
            self.barrier()

    def _padded_positions(self, total: int, device: torch.device) -> Tensor | slice:
        """Return the positions [total] of the rows when each share is padded to the longest."""
        each, more = divmod(total, self.size)
        if not more:
            return slice(None)
        row = torch.arange(total, device=device)
        beyond = (row - more * (each + 1)).clamp(min=0)  # row number within the shorter shares
        return row + (beyond.div(each, rounding_mode="floor") if each else 0)

    # The three calls of torch.distributed on tensors; tests replace them by threads.

    def _all_reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        self._call(dist.all_reduce, tensor, operation)

    def _all_gather(self, out: Tensor, tensor: Tensor) -> None:
        self._call(_all_gather, out, tensor)

    def _reduce_scatter(self, out: Tensor, tensor: Tensor) -> None:
        self._call(_reduce_scatter, out, tensor)

    def _call(self, collective: Callable[..., Any], *arguments: Any) -> None:
        self.calls += 1
        try:
            collective(*arguments)
        except RuntimeError as error:
            raise CollectiveError(str(error)) from error
        if self.calls == 1:  # gloo's threads exist and are named from now on
            lower_gloo_priority()


@contextlib.contextmanager
def raise_on_all_ranks(world: World, unfinished: Path) -> Iterator[None]:
    """Raise the first rank's UserError on every rank; rank 0 removes the unfinished folder."""
    failure = None
    try:
        yield
    except UserError as error:
        failure = (error.code, str(error))
    if failures := [found for found in world.gather_objects(failure) if found is not None]:
        if world.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(*failures[0])
