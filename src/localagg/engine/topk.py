"""Select the K largest values of all ranks, exactly, without sending rows or similarities.

The K-th largest value of each query is found digit by digit (a radix selection) on the values' own
bits: ranks sum histograms of 64 counts a query, 6 at most in float32 and 11 in float64. What goes
over the wire grows neither with N nor with K.

Legend of shape suffixes: B queries, C places for candidates of this rank, T queries with ties, G
buckets of a histogram, R ranks.
"""

import torch
from torch import Tensor

from ..distributed.collectives import World
from .search import cpu_backend_for
from .torch_backend import flatnonzero

_BITS = 6  # of a digit. Fewer send less, in more collectives; see benchmarks/scale.py
_BUCKETS = 1 << _BITS


def ordered(values: Tensor) -> Tensor:
    """Convert floats to integers of the same order: their bits, inverted for negative numbers.

    Equal floats are equal integers (-0.0 and 0.0 too). NaN lies beyond the infinities.

    Args:
        values: float32 or float64, any shape.

    Returns:
        int32 or int64 of the same shape.
    """
    kind = {torch.float32: torch.int32, torch.float64: torch.int64}[values.dtype]
    bits = (values + 0.0).view(kind)  # makes -0.0 positive
    return bits ^ (bits >> torch.iinfo(kind).bits - 1 & torch.iinfo(kind).max)


def disordered(keys: Tensor) -> Tensor:
    """Convert integers of :func:`ordered` back to floats."""
    kind = {torch.int32: torch.float32, torch.int64: torch.float64}[keys.dtype]
    bits = torch.iinfo(keys.dtype)
    return (keys ^ (keys >> bits.bits - 1 & bits.max)).view(kind)


def bounds(world: World, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return a lower bound [B] of the ``count``-th largest value of all ranks, and the largest [B].

    One all-reduce of [3, B]. The least value of a rank with ``count`` values is a lower bound, and
    so is the least value of all.

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
    world: World, value: Tensor, row: Tensor, count: int, between: tuple[Tensor, Tensor]
) -> Tensor:
    """Return which of this rank's candidates are among the ``count`` largest of all ranks.

    Ties at the last place go to the lowest rows. Ranks hold ranges of rows in order, so these are
    on the lowest ranks.

    Collectives: 1 to 6 (float64: to 11) all-reduces of [B, 64] int32, as many as the largest
    difference of ``between`` has digits; and one all-gather of [T] int64 where T > 0 queries have
    more rows tied at their last place than places.

    Args:
        world: the ranks.
        value: similarities [B, C]: of each query at least those of this rank that may be among the
            ``count`` largest, with the lowest rows among equals; -inf where a place is free.
        row: int64 [B, C], unique for a query.
        count: 1 or more, and at most the candidates of all ranks together.
        between: [B] and [B], the same on every rank: the ``count``-th largest lies between them.

    Returns:
        bool [B, C].
    """
    kth_B, left_B, tied_B = _kth_largest(world, value, count, between)
    chosen_BC = value >= kth_B.unsqueeze(1)
    if tied_B.any():  # on every rank or on none
        row_TC, equal_TC = row[tied_B], value[tied_B] == kth_B[tied_B].unsqueeze(1)
        left_T = left_B[tied_B] - world.stack(equal_TC.sum(dim=1))[: world.rank].sum(dim=0)
        others_last = torch.where(equal_TC, row_TC, torch.iinfo(row.dtype).max)
        place_TC = others_last.argsort(dim=1).argsort(dim=1)
        chosen_BC[tied_B] &= ~equal_TC | (place_TC < left_T.unsqueeze(1))
    return chosen_BC


def _kth_largest(
    world: World, value: Tensor, count: int, between: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``count``-th largest value of all ranks, how many values equal to it belong to the
    largest, and whether there are more of those; all [B] and the same on every rank."""
    low_B, high_B = ordered(between[0]), ordered(between[1])
    least, most = (high_B - low_B).aminmax()
    width = torch.iinfo(low_B.dtype).bits
    bits = width if int(least) < 0 else max(1, int(most).bit_length())
    left_B = torch.full_like(low_B, count, dtype=torch.int64)
    prefix_B, tied_B = torch.zeros_like(low_B), torch.zeros_like(low_B, dtype=torch.bool)
    offset_BC, known = offsets(value, low_B), 0
    for shift in _shifts(bits):
        counts_BG = world.sum(count_digits(offset_BC, known, prefix_B, shift)).long()
        down_BG = counts_BG.flip(1).cumsum(dim=1)  # values in this bucket or above
        place_B1 = (down_BG < left_B.unsqueeze(1)).sum(dim=1, keepdim=True)
        inside_B = counts_BG.flip(1).gather(1, place_B1).squeeze(1)
        left_B = left_B - (down_BG.gather(1, place_B1).squeeze(1) - inside_B)
        tied_B = inside_B > left_B
        bucket_B = _BUCKETS - 1 - place_B1.squeeze(1)
        prefix_B |= bucket_B.to(prefix_B.dtype) << shift
        known |= _BUCKETS - 1 << shift if shift + _BITS < width else -1 << shift  # signed
    return disordered(low_B + prefix_B), left_B, tied_B


def offsets(value: Tensor, low: Tensor) -> Tensor:
    """Return the distance of the integer of each value above ``low``.

    Values below ``low`` are clamped to it, which changes no count above it. Offsets may wrap
    around: their digits are read as unsigned. No two floats are so far apart that an offset is -1.

    Args:
        value: float [B, C]; -inf is none.
        low: [B], of :func:`ordered`.

    Returns:
        integers [B, C] in any order within a line; -1 in unused places.
    """
    if compiled := cpu_backend_for(value.flatten()):
        return compiled.offsets(value, low)
    offset_BC = torch.maximum(ordered(value), low.unsqueeze(1)) - low.unsqueeze(1)
    return offset_BC.masked_fill_(value == -torch.inf, -1)


def count_digits(offset: Tensor, known: int, prefix: Tensor, shift: int) -> Tensor:
    """Count the digits of offsets that agree with a prefix; the others are dropped.

    Args:
        offset: of :func:`offsets`, changed in place.
        known: the bits that must agree with the prefix.
        prefix: [B], with no other bits.
        shift: where the digit begins.

    Returns:
        int32 [B, 64].
    """
    B, C = offset.shape
    if offset.dtype == torch.int32 and (compiled := cpu_backend_for(offset.flatten())):
        return compiled.count_digits(offset, known, prefix, shift, _BUCKETS)
    offset.masked_fill_(offset & known != prefix.unsqueeze(1), -1)
    place = flatnonzero((offset != -1).flatten())
    digit = (offset.flatten().index_select(0, place) >> shift & _BUCKETS - 1).long()
    line = place.div(max(1, C), rounding_mode="floor")
    counts = torch.bincount(digit + line * _BUCKETS, minlength=B * _BUCKETS)
    return counts.to(torch.int32).view(B, _BUCKETS)


def _shifts(bits: int) -> list[int]:
    """Return the lowest bit of each digit of ``bits`` bits, highest first; the last may overlap."""
    return [max(0, top - _BITS) for top in range(bits, 0, -_BITS)]
