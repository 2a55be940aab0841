"""Compiled CPU loops over lists of rows, for the losses and the top-k over ranks.

Legend as in ``cpu_search_kernels``; K listed rows, P places of a shorter list, G buckets of a
histogram, H clusterings.
"""

import math

import numpy as np
from numba import njit

from .cpu_kernel_primitives import (
    SUMS,
    ordered_bits,
    prefetch_later_row,
    row_at,
    to_float32,
    unsigned,
)

# --- Top-k over ranks ---


@njit(cache=True, nogil=True)
def compact(first, last, rows_BC, sim_BC, kept_BC, rows_BP, sim_BP):
    """Copy the kept entries of each list; -1 and -inf fill the rest."""
    for i in range(first, last):
        n, c, wanted = 0, 0, kept_BC[i].sum()
        while n < wanted:
            rows_BP[i, unsigned(n)], sim_BP[i, unsigned(n)] = (
                rows_BC[i, unsigned(c)],
                sim_BC[i, unsigned(c)],
            )
            n += np.int64(kept_BC[i, unsigned(c)])
            c += 1
        rows_BP[i, n:], sim_BP[i, n:] = -1, -np.inf


@njit(cache=True, nogil=True)
def offsets(first, last, sim_BC, low_B, offset_BC):
    """See ``topk.offsets``; -1 ends a list."""
    for i in range(first, last):
        n = 0
        for sim in sim_BC[i]:
            key = ordered_bits(sim + np.float32(0))  # makes -0.0 positive
            offset_BC[i, unsigned(n)] = np.int32(max(key, low_B[i]) - low_B[i])
            n += np.int64(sim > -np.inf)
        if n < len(offset_BC[i]):
            offset_BC[i, n] = -1


@njit(cache=True, nogil=True)
def count_digits(first, last, offset_BC, known, prefix_B, shift, counts_BG):
    """See ``topk.count_digits``; -1 ends a list."""
    digits = np.int32(counts_BG.shape[1] - 1)
    for i in range(first, last):
        c, n, C = 0, 0, len(offset_BC[i])
        while c < C and offset_BC[i, unsigned(c)] != -1:
            offset = offset_BC[i, unsigned(c)]
            agrees = offset & known == prefix_B[i]
            offset_BC[i, unsigned(n)] = offset
            counts_BG[i, unsigned((offset >> shift) & digits)] += np.int32(agrees)
            n += np.int64(agrees)
            c += 1
        if n < C:
            offset_BC[i, n] = -1


# --- Losses ---


@njit(cache=True, nogil=True)
def mark_close(first, last, labels_NH, own_BH, rows_BK, close_BK):
    """Mark the listed rows that share a cluster with the sample in any clustering; not row -1."""
    for i in range(first, last):
        for c in range(rows_BK.shape[1]):
            close, row = False, max(0, rows_BK[i, c])
            for h in range(labels_NH.shape[1]):
                close |= labels_NH[row, h] == own_BH[i, h]
            close_BK[i, c] = close & (rows_BK[i, c] >= 0)


@njit(cache=True, nogil=True, fastmath=SUMS)
def sum_inside_and_outside(first, last, weight_BC, inside_BC, sums_2B):
    """Sums of the weights inside and outside of a set."""
    for i in range(first, last):
        weight, inside, near, far = weight_BC[i], inside_BC[i], 0.0, 0.0
        for c in range(len(weight)):
            near += weight[c] if inside[c] else np.float32(0)
            far += np.float32(0) if inside[c] else weight[c]
        sums_2B[0, i], sums_2B[1, i] = near, far


@njit(cache=True, nogil=True, fastmath=SUMS)
def scale_inside_and_outside(first, last, inside_BC, scale_B, other_scale_B, weight_BC):
    """Multiply the weights by one scale inside of a set and by another outside, in place."""
    for i in range(first, last):
        weight, inside = weight_BC[i], inside_BC[i]
        scale, other_scale = np.float32(scale_B[i]), np.float32(other_scale_B[i])
        for c in range(len(weight)):
            weight[c] *= scale if inside[c] else other_scale


@njit(cache=True, nogil=True, fastmath=SUMS)
def weigh_rows(first, last, chunk, bank_ND, rows_BK, weight_BK, sum_BD):
    """Compute sum_k weight_ik M_[rows_ik]. The bank is read chunk by chunk, as in ``rescore``."""
    place = np.zeros(last - first, np.int64)
    sum_BD[first:last] = 0
    for end in range(chunk, len(bank_ND) + chunk, chunk):
        for i in range(first, last):
            total, rows, weight, c = sum_BD[i], rows_BK[i], weight_BK[i], place[i - first]
            while c + 3 < len(rows) and rows[c + 3] < end:
                for more in range(4):
                    prefetch_later_row(bank_ND, rows, c + more)
                one, two = row_at(bank_ND, rows[c]), row_at(bank_ND, rows[c + 1])
                three, four = row_at(bank_ND, rows[c + 2]), row_at(bank_ND, rows[c + 3])
                for d in range(len(total)):
                    total[d] += (
                        weight[c] * to_float32(one[d])
                        + weight[c + 1] * to_float32(two[d])
                        + weight[c + 2] * to_float32(three[d])
                        + weight[c + 3] * to_float32(four[d])
                    )
                c += 4
            while c < len(rows) and rows[c] < end:
                row = bank_ND[rows[c]]
                for d in range(len(total)):
                    total[d] += weight[c] * to_float32(row[d])
                c += 1
            place[i - first] = c


# --- Softmax by rounded products ---
#
# A term is large if its probability is at least LARGE, by an estimate of the partition from a
# sample of rows. There are few, and they hold what can be lost: a trained network's own row has
# most of the probability. The others are products rounded to bfloat16, whose exponentials, rounded
# too, a second product reads.
#
# Error: bfloat16 rounds a number by at most 2^-9 of it. With unit rows the exponent of a small term
# is off by at most e = (2^-8 + 2^-9 + 2^-16) / t: inputs, product, and sums in float32. So log Z is
# off by at most e + 2^-9, and the mean row, whose norm is at most 1, by 2 (exp(2 e) - 1) + 2^-7.
# These are worst cases, in which all roundings agree; benchmarks/results/instance_precision.md has
# measured errors, a hundredth of them.

LARGE = 2.0**-10
"""Probability from which a term is computed in float32: at most 1,024 terms of a query."""
_LOG2_E = np.float32(math.log2(math.e))
_LEAST = np.float32(-87)  # exponent from which float32 has numbers of full precision
# 2^f for |f| <= 1/2 by Taylor's series: error below 3e-6, a thousandth of bfloat16's.
_C1, _C2, _C3, _C4, _C5 = (np.float32(math.log(2) ** n / math.factorial(n)) for n in range(1, 6))


@njit(cache=True, inline="always")
def _exp(x):
    """Return exp(x) of a float32 in [-87, 88]."""
    power = x * _LOG2_E
    whole = np.float32(np.floor(power + np.float32(0.5)))
    f = power - whole
    value = np.float32(1) + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * _C5))))
    return value * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(cache=True, nogil=True, fastmath=SUMS)
def exponentials(sim_BT, estimate_B, query_BD, rows_TD, sum_B, large_BD):
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
