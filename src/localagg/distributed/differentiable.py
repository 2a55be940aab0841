"""Collectives through which gradients flow. With one rank they return their argument."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .collectives import World


def gather_rows(world: World, rows: Tensor, total: int, dtype: torch.dtype) -> Tensor:
    """Return the rows of all ranks [total, D] in ``dtype``; the gradient goes back to their owners.

    Forward: one all-gather of ceil(total / R) rows in their own dtype. Backward: one reduce-scatter
    of as many rows in ``dtype``.

    Args:
        world: the ranks.
        rows: [b, D], this rank's share of the rows.
        total: number of rows on all ranks.
        dtype: of the result, at least as precise as ``rows``.
    """
    if world.size == 1:
        return rows.to(dtype)
    return _GatherRows.apply(rows, world, total, dtype)


def sum_over_ranks(world: World, tensor: Tensor) -> Tensor:
    """Return the sum over ranks; each rank's gradient is that of its own term.

    Forward: one all-reduce of the tensor. Backward: none.
    """
    return tensor if world.size == 1 else _SumOverRanks.apply(tensor, world)


class _GatherRows(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: World, total: int, dtype: torch.dtype) -> Tensor:
        ctx.world, ctx.dtype = world, rows.dtype
        return world.gather(rows, total).to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        return ctx.world.scatter_sum(gradient).to(ctx.dtype), None, None, None


class _SumOverRanks(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, world: World) -> Tensor:
        return world.sum(tensor.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        return gradient, None
