"""The few collectives in use, over ``torch.distributed``. On one rank none is called.

A job has R ranks. Whatever is split over them (rows of the bank, samples of a batch) is split by
:func:`share`: contiguous ranges in the order of the ranks, whose sizes differ by one at most. So
every rank knows every other's part, and nothing about sizes goes over the wire.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.14 renames the two that take one tensor for all ranks, and warns of their old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


T = TypeVar("T")


class CollectiveError(RuntimeError):
    """A collective has failed: another rank has ended, hangs, or cannot be reached."""


def share(size: int, rank: int, ranks: int) -> range:
    """The part of 0..size-1 that a rank has: the first ``size % ranks`` ranks have one more.

    Args:
        size: what is split; fewer than ranks leaves the last ranks with nothing.
        rank: 0..ranks-1.
        ranks: R.
    """
    each, more = divmod(size, ranks)
    start = rank * each + min(rank, more)
    return range(start, start + each + (rank < more))


def _calm_gloo() -> None:
    """Let gloo's thread that waits for messages take no core from another one that runs.

    While one of gloo's threads holds a connection's lock, that one asks for events again and again;
    where it also has the other's core, both wait for the scheduler's next tick. Among busy cores a
    collective of 32 KB took 3.3 ms in the mean, and takes 0.26 so (two processes, Linux 6.18).
    """
    for name in Path("/proc/self/task").glob("*/comm"):  # Linux; elsewhere there is none
        with contextlib.suppress(OSError):  # the thread has just ended
            if name.read_bytes() == b"gloo_tcp_loop\n":  # a name need not be text
                os.sched_setscheduler(int(name.parent.name), os.SCHED_BATCH, os.sched_param(0))


class World:
    """The ranks of a job, and what they tell one another. Each method is one collective that all
    ranks call in the same order with tensors of the same shape and dtype; all get the same bits.

    Args:
        rank: of this process.
        size: R. With 1 every method returns its argument.
        local: of this process among those of its machine, by which it has its GPU.

    Attributes:
        calls: collectives that were begun, by which a rank that lags behind the others is found.

    Raises:
        CollectiveError: of each method, where a collective fails.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank, self.calls = rank, size, local_rank, 0

    @classmethod
    def current(cls) -> "World":
        """The default process group of ``torch.distributed``; one rank where there is none."""
        if not dist.is_initialized():
            return cls()
        local = int(os.environ.get("LOCAL_RANK", 0))  # torchrun's
        return cls(dist.get_rank(), dist.get_world_size(), local)

    def part(self, size: int) -> range:
        """This rank's :func:`share` of 0..size-1."""
        return share(size, self.rank, self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place. One all-reduce of the tensor."""
        if self.size > 1:
            self._all_reduce(tensor, dist.ReduceOp.SUM)
        return tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        """The maximum over ranks, in place. One all-reduce of the tensor."""
        if self.size > 1:
            self._all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def stack(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, [R, ...]. One all-gather of the tensor."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        out = tensor.new_empty(self.size * tensor.numel())
        self._all_gather(out, tensor.contiguous().flatten())
        return out.view(self.size, *tensor.shape)

    def gather(self, rows: Tensor, total: int) -> Tensor:
        """The shares of all ranks as one, [total, ...].

        One all-gather of ceil(total / R) rows a rank.

        Args:
            rows: this rank's :func:`share` of them.
            total: rows of all ranks together.

        Raises:
            ValueError: another number of rows than the share.
        """
        if len(rows) != len(self.part(total)):
            raise ValueError(
                f"rank {self.rank} of {self.size} has {len(rows)} of {total} rows, not its share"
                f" of {len(self.part(total))}"
            )
        if self.size == 1:
            return rows
        longest = len(share(total, 0, self.size))
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        return self.stack(padded).flatten(0, 1)[self._places(total, rows.device)]

    def scatter_sum(self, rows: Tensor) -> Tensor:
        """This rank's :func:`share` of the rows of the sum over ranks.

        One reduce-scatter of ceil(total / R) rows a rank.

        Args:
            rows: [total, ...].
        """
        if self.size == 1:
            return rows
        part = self.part(len(rows))
        longest = len(share(len(rows), 0, self.size))
        padded = rows.new_zeros(self.size * longest, *rows.shape[1:])
        padded[self._places(len(rows), rows.device)] = rows
        out = rows.new_empty(longest, *rows.shape[1:])
        self._reduce_scatter(out, padded)
        return out[: len(part)]

    def gather_objects(self, value: Any) -> list[Any]:
        """The Python values of all ranks: a few small ones, now and then. They are pickled."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        self._call(dist.all_gather_object, found, value)
        return found

    def barrier(self) -> None:
        """Wait until all ranks are here. One all-reduce of a number."""
        self.sum(torch.zeros(1))

    def rank_zero_first(self, call: Callable[[], T]) -> T:
        """What a call returns, which rank 0 makes before the others: it may leave a file that they
        find then. One barrier."""
        if self.rank:
            self.barrier()
            return call()
        try:
            return call()
        finally:
            self.barrier()

    def _places(self, total: int, device: torch.device) -> Tensor | slice:
        """Where the rows stand when each rank's share is padded to the longest: [total]."""
        each, more = divmod(total, self.size)
        if not more:
            return slice(None)
        row = torch.arange(total, device=device)
        beyond = (row - more * (each + 1)).clamp(min=0)  # how far into the shorter shares
        return row + (beyond.div(each, rounding_mode="floor") if each else 0)

    # --- What torch.distributed does; a test puts threads in its place ---

    def _all_reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        self._call(dist.all_reduce, tensor, operation)

    def _all_gather(self, out: Tensor, tensor: Tensor) -> None:
        self._call(_all_gather, out, tensor)

    def _reduce_scatter(self, out: Tensor, tensor: Tensor) -> None:
        self._call(_reduce_scatter, out, tensor)

    def _call(self, collective: Callable[..., Any], *tensors: Any) -> None:
        self.calls += 1
        try:
            collective(*tensors)
        except RuntimeError as error:
            raise CollectiveError(str(error)) from error
        if self.calls == 1:  # now its threads have their names
            _calm_gloo()
