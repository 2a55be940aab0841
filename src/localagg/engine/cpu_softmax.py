"""The softmax over a bank by products in bfloat16, on a CPU; its large terms in float32.

A term is large if its probability is at least ``LARGE``, by an estimate of the partition from a
sample of rows. There are few, and they hold what can be lost: a trained network's own row has most
of the probability. The products of a tile are rounded to bfloat16, the compiled loop replaces them
by their rounded exponentials, which the second product reads, and adds the large terms in float64.

Error: bfloat16 rounds a number by at most 2^-9 of it. With unit rows the exponent of a small term
is off by at most e = (2^-8 + 2^-9 + 2^-16) / t: inputs, product, and sums in float32. So log Z is
off by at most e + 2^-9, and the mean row, whose norm is at most 1, by 2 (exp(2 e) - 1) + 2^-7.
These are worst cases, in which all roundings agree; benchmarks/results/instance_precision.md has
measured errors, a hundredth of them.
"""

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from . import SETTINGS
from .cpu_backend import bits
from .cpu_kernel_primitives import SUMS, to_float32, unsigned
from .searchable_bank import SearchableBank
from .thread_pool import in_threads

LARGE = 2.0**-10
"""Probability from which a term is computed in float32: at most 1,024 terms of a query."""
_SAMPLE = 2048  # rows that the partition is estimated from
_LOG2_E = np.float32(math.log2(math.e))
_LEAST = np.float32(-87)  # exponent from which float32 has numbers of full precision
# 2^f for |f| <= 1/2 by Taylor's series: error below 3e-6, a thousandth of bfloat16's.
_C1, _C2, _C3, _C4, _C5 = (np.float32(math.log(2) ** n / math.factorial(n)) for n in range(1, 6))


def log_partition(query: Tensor, bank: SearchableBank) -> tuple[Tensor, Tensor]:
    """Return log sum_j exp(q . M_j) [B] and the softmax-weighted mean row [B, D].

    Args:
        query: float32 [B, D].
        bank: float32 rows [N, D].
    """
    rows, rounded = bank.refresh().rows, bank.rounded
    query, low_BD = query.contiguous(), query.bfloat16()
    count = min(len(rows), _SAMPLE)
    sample_BS = query @ bank.sample_rows(count).to(query.dtype).T
    estimate_B = torch.logsumexp(sample_BS, dim=1) + math.log(len(rows) / count)
    tile = max(1, SETTINGS.tile_products // len(query))

    # A thread has fixed rows, not whichever are left: sums are then the same in every call.
    def sum_part(part: range) -> tuple[np.ndarray, np.ndarray, Tensor]:
        sum_B, large_BD = np.zeros(len(query)), np.zeros(query.shape)
        small_BD, buffer = torch.zeros_like(query), low_BD.new_empty(len(query) * tile)
        for start in range(part.start, part.stop, tile):
            here = slice(start, min(part.stop, start + tile))
            rows_TD = rows[here]
            low_TD = rows_TD.bfloat16() if rounded is None else rounded[here]
            weight_BT = buffer[: len(query) * len(low_TD)].view(len(query), -1)
            torch.mm(low_BD, low_TD.T, out=weight_BT)
            _exponentials(
                *(bits(weight_BT), estimate_B.numpy(), query.numpy(), rows_TD.numpy()),
                *(sum_B, large_BD),
            )
            small_BD += torch.mm(weight_BT, low_TD)
        return sum_B, large_BD, small_BD

    parts = in_threads(sum_part, len(rows))
    sum_PB, large_PBD, small_PBD = zip(*parts, strict=True)
    sum_B = torch.from_numpy(np.sum(sum_PB, axis=0))
    mean_BD = torch.from_numpy(np.sum(large_PBD, axis=0)) + torch.stack(small_PBD).double().sum(0)
    log_Z_B = estimate_B.double() + sum_B.log()
    return log_Z_B.float(), (mean_BD / sum_B.unsqueeze(1)).float()


@njit(cache=True, inline="always")
def _exp(x):
    """Return exp(x) of a float32 in [-87, 88]."""
    power = x * _LOG2_E
    whole = np.float32(np.floor(power + np.float32(0.5)))
    f = power - whole
    value = np.float32(1) + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * _C5))))
    return value * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(cache=True, nogil=True, fastmath=SUMS)
def _exponentials(sim_BT, estimate_B, query_BD, rows_TD, sum_B, large_BD):
    """Replace products, given by their bits, by exp(product - estimate); 0 for the large terms.

    Adds all terms to ``sum_B``, and the large ones times their rows to ``large_BD``."""
    T = sim_BT.shape[1]
    most = np.float32(math.log(LARGE))
    large_T = np.zeros((T + 7) // 8 * 8, np.uint8)
    eights = large_T.view(np.uint64)
    for i in range(len(sim_BT)):
        sim_T, estimate, total, found = sim_BT[i], estimate_B[i], np.float32(0), 0
        for t in range(T):
            x = to_float32(sim_T[t]) - estimate
            is_small = x < most  # false for NaN
            weight = _exp(max(x, _LEAST)) if is_small else np.float32(0)
            number = np.float32(weight).view(np.uint32) + np.uint32(0x8000)
            kept = np.uint16(number >> np.uint32(16))
            sim_T[t], large_T[t] = kept, not is_small
            total += to_float32(kept)
            found += np.int64(not is_small)
        sum_B[i] += total
        if not found:
            continue
        for e in range(len(eights)):
            if eights[unsigned(e)]:
                for t in range(8 * e, min(8 * e + 8, T)):
                    if large_T[unsigned(t)]:
                        _add_large(query_BD[i], rows_TD[t], estimate, sum_B, large_BD, i)


@njit(cache=True, nogil=True, fastmath=SUMS)
def _add_large(query_D, row_D, estimate, sum_B, large_BD, i):
    product, mean_D = np.float32(0), large_BD[i]
    for d in range(len(query_D)):
        product += query_D[d] * row_D[d]
    weight = math.exp(np.float64(product) - np.float64(estimate))
    sum_B[i] += weight
    for d in range(len(query_D)):
        mean_D[d] += weight * row_D[d]
