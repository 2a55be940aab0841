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
def aggregate(first, last, close_BK, temperature, eps, loss_B, weight_BK):
    """-log of the close ones' share of the weights exp((similarity - the largest) / t), which its
    slope in each similarity replaces."""
    for i in range(first, last):
        weight, close, near, far = weight_BK[i], close_BK[i], 0.0, 0.0
        for c in range(len(weight)):
            near += weight[c] if close[c] else np.float32(0)
            far += np.float32(0) if close[c] else weight[c]
        share, rest = near / (near + far), far / (near + far)
        # The rest of a share near 1 is exact, and 1 - share is not.
        loss_B[i] = -math.log(share + eps) if share < 0.5 else -math.log1p(eps - rest)
        scale = 1 / (temperature * (share + eps) * (near + far))
        near_scale, far_scale = np.float32(-rest * scale), np.float32(share * scale)
        for c in range(len(weight)):
            weight[c] *= near_scale if close[c] else far_scale


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
