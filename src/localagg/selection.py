"""Which rows are the K largest of all ranks, exactly, without sending rows or similarities.

The K-th largest value of each query is found digit by digit (a radix selection) on the values' own
bits: ranks sum histograms of 64 counts a query, 6 at most in float32 and 11 in float64. What goes
over the wire grows neither with N nor with K.

Legend of shape suffixes: B queries, C places for candidates of this rank, F candidates of all
queries one after the other, G buckets of a histogram, R ranks.
"""

import numpy as np
import torch
from torch import Tensor

from .distributed import World

_BITS = 6  # of a digit. Fewer send less, in more collectives; see benchmarks/scale.py
_BUCKETS = 1 << _BITS


def ordered(values: Tensor) -> Tensor:
    """Floats as integers of the same order: their bits, of negative numbers turned around.

    Equal floats are equal integers (-0.0 and 0.0 too). NaN lies beyond the infinities.

    Args:
        values: float32 or float64, any shape.

    Returns:
        int32 or int64 of the same shape.
    """
    kind = {torch.float32: torch.int32, torch.float64: torch.int64}[values.dtype]
    bits = (values + 0.0).view(kind)  # makes -0.0 positive
    return bits ^ (bits >> torch.iinfo(kind).bits - 1 & torch.iinfo(kind).max)


def bounds(world: World, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Two values [B] that the ``count``-th largest of all ranks' lies between, and the second is
    the largest of all. One all-reduce of [3, B].

    A rank with ``count`` values has its least as a lower bound; the least of all is one always.

    Args:
        world: the ranks.
        values: [B, C], this rank's; C may differ from rank to rank.
        count: at most the values of all ranks together.
    """
    bounds_3B = values.new_full((3, len(values)), -torch.inf)
    if values.shape[1]:
        least_B, bounds_3B[0] = values.amin(dim=1), values.amax(dim=1)  # aminmax is slow on CPUs
        bounds_3B[1] = -least_B
        if values.shape[1] >= count:
            bounds_3B[2] = least_B
    high_B, turned_B, low_B = world.maximum(bounds_3B)
    return torch.maximum(low_B, -turned_B), high_B


def largest(
    world: World,
    value: Tensor,
    row: Tensor,
    counts: Tensor,
    count: int,
    between: tuple[Tensor, Tensor],
) -> Tensor:
    """Which of this rank's candidates are among the ``count`` largest of all ranks' candidates.

    Where several tie at the last place the lowest rows are taken: those of the lowest ranks, as
    rows are split by range, and of a rank its lowest.

    Collectives: 1 to 6 (float64: to 11) all-reduces of [B, 64] int32, as many as the largest
    difference of ``between`` has digits; and one all-gather of [T] int64 where T > 0 queries have
    more rows tied at their last place than places.

    Args:
        world: the ranks.
        value: similarities [F]: of each query at least those of this rank that may be among the
            ``count`` largest, with the lowest rows among equals.
        row: int64 [F], unique for a query.
        counts: int64 [B], how many candidates each query has here.
        count: 1 or more, and at most the candidates of all ranks together.
        between: [B] and [B], the same on every rank: the ``count``-th largest lies between them.

    Returns:
        bool [F].
    """
    key_F, B = ordered(value), len(counts)
    line_F = torch.arange(B, dtype=torch.int32, device=row.device).repeat_interleave(counts)
    kth_B, left_B, tied_B = _kth_largest(world, key_F, line_F, count, between)
    kth_F = kth_B.index_select(0, line_F)
    chosen_F = key_F >= kth_F
    if tied_B.any():  # on every rank or on none
        equal = positions((key_F == kth_F) & tied_B.index_select(0, line_F))
        equal = equal[row[equal].argsort()]
        equal = equal[line_F[equal].argsort(stable=True)]  # query by query, the lowest rows first
        line = line_F[equal].long()
        ties_B = torch.bincount(line, minlength=B)
        left_B[tied_B] -= world.stack(ties_B[tied_B])[: world.rank].sum(dim=0)
        place = torch.arange(len(equal), device=row.device) - (ties_B.cumsum(0) - ties_B)[line]
        chosen_F[equal] = place < left_B[line]
    return chosen_F


def _kth_largest(
    world: World, key: Tensor, line: Tensor, count: int, between: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count``-th largest key over all ranks, how many equal to it are still to be taken, and
    whether there are more of those; all [B] and the same on every rank."""
    low_B, high_B = ordered(between[0]), ordered(between[1])
    # What lies below the lower bound stands at it: that changes no count above it. Offsets may wrap
    # around; their digits are read as unsigned.
    low_F = low_B.index_select(0, line)
    offset = torch.maximum(key, low_F) - low_F
    least, most = (high_B - low_B).aminmax()
    bits = torch.iinfo(key.dtype).bits if int(least) < 0 else max(1, int(most).bit_length())
    B = len(low_B)
    left_B = torch.full((B,), count, dtype=torch.int64, device=key.device)
    prefix_B = torch.zeros_like(low_B)
    tied_B = torch.zeros(B, dtype=torch.bool, device=key.device)
    for shift in _shifts(bits):
        digit = (offset >> shift & _BUCKETS - 1).to(torch.int32)
        counts = torch.bincount(digit + line * _BUCKETS, minlength=B * _BUCKETS)
        counts_BG = world.sum(counts.to(torch.int32).view(B, _BUCKETS)).long()
        down_BG = counts_BG.flip(1).cumsum(dim=1)  # keys in this bucket or above
        place_B1 = (down_BG < left_B.unsqueeze(1)).sum(dim=1, keepdim=True)
        inside_B = counts_BG.flip(1).gather(1, place_B1).squeeze(1)
        left_B = left_B - (down_BG.gather(1, place_B1).squeeze(1) - inside_B)
        tied_B = inside_B > left_B
        bucket_B = (_BUCKETS - 1 - place_B1.squeeze(1)).to(torch.int32)
        prefix_B |= bucket_B.to(prefix_B.dtype) << shift
        keep = positions(digit == bucket_B.index_select(0, line))
        offset, line = offset.index_select(0, keep), line.index_select(0, keep)
    return low_B + prefix_B, left_B, tied_B


def _shifts(bits: int) -> list[int]:
    """Where the digits of ``bits`` bits begin, the highest first; the last may overlap."""
    return [max(0, top - _BITS) for top in range(bits, 0, -_BITS)]


def positions(mask: Tensor) -> Tensor:
    """Where a flat mask is true: int64. On the CPU by numpy, which takes a tenth of the time."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().squeeze(1)


def kth_of_line(values: Tensor, k: int) -> Tensor:
    """The k-th largest of each line: [B] of [B, n]. On the CPU by numpy, as :func:`positions`."""
    if values.device.type == "cpu":
        place = values.shape[1] - k
        return torch.from_numpy(np.partition(values.numpy(), place, axis=1)[:, place].copy())
    return values.topk(k, dim=1, sorted=False).values.amin(dim=1)
