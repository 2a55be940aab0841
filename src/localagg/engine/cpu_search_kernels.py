"""Compiled CPU loops of the neighbor search; ``cpu_backend`` calls them.

Legend of shape suffixes: B queries, N rows of the bank, D embedding size, T rows of a tile, C
places of a candidate list, S lists of a query, k neighbors. Kernels release the interpreter's lock
and work on the queries ``first <= i < last`` or on their own lists, so that threads can share a
batch. ``cpu_kernel_primitives`` explains keys.
"""

import numpy as np
from numba import njit

from .cpu_kernel_primitives import (
    SUMS,
    key_of,
    ordered_bits,
    prefetch_later_row,
    row_at,
    to_float32,
    unsigned,
    value_of,
)


@njit(cache=True)
def _threshold_of_k(values, k, bits):
    """Return a threshold that exactly k of the integers reach; the k-th largest if it has equals.

    It is found bit by bit, because counting is vectorized. ``bits`` is the integers' width."""
    found = -(1 << (bits - 1))
    for bit in range(bits - 1, -1, -1):
        tried, reaching = values.dtype.type(found + (1 << bit)), 0
        for i in range(len(values)):
            reaching += values[i] >= tried
        if reaching >= k:
            found += 1 << bit
        if reaching == k:
            break
    return found


# --- The coarse pass ---


@njit(cache=True, nogil=True, fastmath=SUMS)
def round_rows(rows_TD, coarse_TD):
    """Round rows to the nearest bfloat16, given by its bits.

    Returns the largest squared rounding error and the largest squared norm of a row. Either is NaN
    or infinite if a row is not finite."""
    max_error = max_norm = np.float32(0)
    kept = np.empty(rows_TD.shape[1], np.uint32)
    numbers = kept.view(np.float32)
    for t in range(len(rows_TD)):
        bits = rows_TD[t].view(np.uint32)
        squared_error = squared_norm = np.float32(0)
        for d in range(len(bits)):
            b = bits[d]
            kept[d] = (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) & np.uint32(
                0xFFFF0000
            )
        for d in range(len(bits)):
            coarse_TD[t, d] = np.uint16(kept[d] >> np.uint32(16))
            error = rows_TD[t, d] - numbers[d]
            squared_error += error * error
            squared_norm += rows_TD[t, d] * rows_TD[t, d]
        if squared_error > max_error or squared_error != squared_error:
            max_error = squared_error
        if squared_norm > max_norm or squared_norm != squared_norm:
            max_norm = squared_norm
    return max_error, max_norm


@njit(cache=True, nogil=True, fastmath=SUMS)
def max_squared_norm(rows_TD):
    """Return the largest squared norm of a row; NaN or infinite if a row is not finite."""
    max_norm = np.float32(0)
    for t in range(len(rows_TD)):
        squared_norm = np.float32(0)
        for d in range(rows_TD.shape[1]):
            x = to_float32(rows_TD[t, d])
            squared_norm += x * x
        if squared_norm > max_norm or squared_norm != squared_norm:
            max_norm = squared_norm
    return max_norm


@njit(cache=True, nogil=True, fastmath=SUMS)
def multiply_few(queries_BD, rows_TD, sim_BT):
    """Write the products of few float32 queries with bfloat16 rows, as bits of bfloat16 numbers.

    A matrix product rearranges the rows first, which takes three times as long as one query."""
    for i in range(len(queries_BD)):
        query = queries_BD[i]
        for t in range(len(rows_TD)):
            row, product = rows_TD[t], np.float32(0)
            for d in range(len(query)):
                product += query[d] * to_float32(row[d])
            b = np.float32(product).view(np.uint32)
            b += np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))  # to the nearest
            sim_BT[i, t] = np.uint16(b >> np.uint32(16))


@njit(cache=True, nogil=True)
def sample_thresholds(sim_BT, shift, rank, first, threshold_B):
    """Set each query's threshold to the ``rank``-th largest of its products (given by bits)."""
    keys = np.empty(sim_BT.shape[1], np.int16)
    for i in range(len(sim_BT)):
        for t in range(len(keys)):
            bits = np.int16(sim_BT[i, t] >> shift)
            keys[t] = bits ^ ((bits >> np.int16(15)) & np.int16(0x7FFF))
        threshold_B[first + i] = value_of(np.int16(_threshold_of_k(keys, rank, 16)))


@njit(cache=True, nogil=True)
def collect_candidates(
    sim_BT, shift, start, k, error_B, max_error_B, threshold_B, rows_BC, keys_BC, at, end, count_B
):
    """Append to each query's list the rows of a tile whose similarity may reach ``threshold_B``.

    Args:
        sim_BT: bits of the products, int16 (bfloat16) or int32 (float32), with ``shift`` 0 or 16.
        start: the first row of the tile.
        error_B: bound on how far a product of this tile lies below the true similarity.
        max_error_B: the largest such bound of the tiles so far.
        threshold_B: a similarity that k rows should reach; raised when a list is full.
        at, end: the list's places in ``rows_BC`` and ``keys_BC``.
        count_B: length of each list; -1 if too many rows reach even the raised threshold.
    """
    T = sim_BT.shape[1]
    reached_T, groups = np.zeros((T + 7) // 8 * 8, np.uint8), np.empty((T + 7) // 8, np.int32)
    for i in range(len(sim_BT)):
        if count_B[i] >= 0 and at + count_B[i] + T > end:
            count_B[i] = _raise_threshold(
                k, max_error_B[i], i, at, threshold_B, rows_BC[i], keys_BC[i], count_B[i]
            )
            if at + count_B[i] + T > end:
                count_B[i] = -1
        if count_B[i] < 0:
            continue
        cut = key_of(threshold_B[i] - error_B[i])
        rows, keys = rows_BC[i, at:end], keys_BC[i, at:end]
        if cut > 0:
            least = sim_BT.dtype.type(np.int64(cut) << shift)  # bits have the order of numbers
            n = count_B[i]
            count_B[i] = _append_candidates(
                sim_BT[i], shift, start, least, reached_T, groups, rows, keys, n
            )
            continue
        n = count_B[i]
        for t in range(T):
            bits = np.int16(sim_BT[i, t] >> shift)
            key = np.int16(bits ^ ((bits >> np.int16(15)) & np.int16(0x7FFF)))
            rows[n], keys[n] = start + t, key
            n += np.int64(key >= cut)
        count_B[i] = n


@njit(cache=True)
def _append_candidates(sim_T, shift, start, least, reached_T, groups, rows, keys, n):
    """Append the products that reach ``least``, which is positive; returns the list's length.

    Branches on the products would be mispredicted. Instead, groups of eight that contain one are
    listed, then their products."""
    T = len(sim_T)
    for t in range(T):
        reached_T[t] = sim_T[t] >= least
    eights, listed = reached_T.view(np.uint64), 0
    for e in range(T // 8):
        groups[listed] = 8 * e
        listed += np.int64(eights[e] != 0)
    for e in range(listed):
        for b in range(8):
            t = unsigned(groups[e] + b)
            rows[unsigned(n)], keys[unsigned(n)] = start + groups[e] + b, sim_T[t] >> shift
            n += np.int64(reached_T[t])
    for t in range(T // 8 * 8, T):
        rows[n], keys[n] = start + t, sim_T[t] >> shift
        n += np.int64(reached_T[t])
    return n


@njit(cache=True)
def _raise_threshold(k, error, i, at, threshold_B, rows_C, keys_C, count):
    """Raise the threshold to a similarity that k rows of the list surely reach, and drop the rows
    that cannot reach it; returns the list's length."""
    if count < k:
        return count
    kth = _threshold_of_k(keys_C[at : at + count], k, 16)
    reached = value_of(np.int16(max(kth - 1, -32768))) - error
    if not reached > threshold_B[i]:
        return count
    threshold_B[i] = reached
    cut, kept = key_of(reached - error), at
    for c in range(at, at + count):
        rows_C[unsigned(kept)], keys_C[unsigned(kept)] = rows_C[unsigned(c)], keys_C[unsigned(c)]
        kept += np.int64(keys_C[unsigned(c)] >= cut)
    return kept - at


# --- The exact pass ---


@njit(cache=True, nogil=True)
def merge_lists(
    first,
    last,
    k,
    error_B,
    tile,
    owner,
    width,
    threshold_SB,
    rows_BC,
    keys_BC,
    count_SB,
    threshold_B,
    count_B,
):
    """Merge the lists of each query, in the order of rows, and raise its threshold.

    List s begins at place s * width and holds rows of the tiles whose ``owner`` it is, in order.
    ``count_B`` is -1 if one of the lists overflowed."""
    S = len(count_SB)
    rows, keys = np.empty(S * width, np.int32), np.empty(S * width, np.int16)
    place = np.empty(S, np.int64)
    for i in range(first, last):
        threshold_B[i], n = threshold_SB[:, i].max(), 0
        if count_SB[:, i].min() < 0:
            count_B[i] = -1
            continue
        for s in range(S):
            place[s] = s * width
        for number in range(len(owner)):
            s, row_end = owner[number], (number + 1) * tile
            c, end = place[s], s * width + count_SB[s, i]
            while c < end and rows_BC[i, unsigned(c)] < row_end:
                rows[unsigned(n)], keys[unsigned(n)] = (
                    rows_BC[i, unsigned(c)],
                    keys_BC[i, unsigned(c)],
                )
                n += 1
                c += 1
            place[s] = c
        n = _raise_threshold(k, error_B[i], i, 0, threshold_B, rows, keys, n)
        rows_BC[i, :n], count_B[i] = rows[:n], n


@njit(cache=True, nogil=True, fastmath=SUMS)
def _dots(query, bank_ND, rows, sim, c, count, end):
    """Compute products with the listed rows below ``end``, from place c on; returns the next place.

    Four at a time hide the memory's latency; past the end of the list, the last row is repeated.
    All similarities come from this loop, so that equal rows have equal ones: another loop might sum
    in another order.
    """
    last = count - 1
    while c < count and rows[c] < end:
        for more in range(4):
            prefetch_later_row(bank_ND, rows[:count], c + more)
        p, q, r = min(c + 1, last), min(c + 2, last), min(c + 3, last)
        one, two = row_at(bank_ND, rows[c]), row_at(bank_ND, rows[p])
        three, four = row_at(bank_ND, rows[q]), row_at(bank_ND, rows[r])
        a, b, e, f = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for d in range(len(query)):
            a += query[d] * to_float32(one[d])
            b += query[d] * to_float32(two[d])
            e += query[d] * to_float32(three[d])
            f += query[d] * to_float32(four[d])
        sim[c], sim[p], sim[q], sim[r] = a, b, e, f
        c += 4
    return c


@njit(cache=True, nogil=True)
def rescore(first, last, chunk, queries_BD, bank_ND, rows_BC, count_B, sim_BC):
    """Compute the float32 similarities of listed rows. The bank is read chunk by chunk, each row
    once for all queries that list it."""
    place = np.zeros(last - first, np.int64)
    for end in range(chunk, len(bank_ND) + chunk, chunk):
        for i in range(first, last):
            c = place[i - first]
            c = _dots(queries_BD[i], bank_ND, rows_BC[i], sim_BC[i], c, count_B[i], end)
            place[i - first] = c


@njit(cache=True, nogil=True)
def find_incomplete(first, last, k, floor_B, threshold_B, count_B, sim_BC, incomplete_B):
    """Mark the queries with fewer than k rows that reach the threshold: unlisted rows might be
    nearer. A threshold at or below ``floor_B`` is sufficient, because lower rows are not wanted."""
    for i in range(first, last):
        reaching = 0
        for c in range(count_B[i]):
            reaching += sim_BC[i, c] >= threshold_B[i]
        incomplete_B[i] = count_B[i] < 0 or (reaching < k and not threshold_B[i] <= floor_B[i])


@njit(cache=True, nogil=True)
def search_all_rows(
    first, last, k, chunk, incomplete_B, queries_BD, bank_ND, rows_BC, count_B, sim_BC
):
    """Make new lists for incomplete queries, from the similarities of all rows."""
    C, sim = rows_BC.shape[1], np.empty(chunk, np.float32)
    kth_B = np.full(last - first, np.nan, np.float32)  # no number is at most NaN
    for i in range(first, last):
        count_B[i] = 0 if incomplete_B[i] else count_B[i]
    for start in range(0, len(bank_ND), chunk):
        rows = np.arange(start, min(start + chunk, len(bank_ND)))
        for i in range(first, last):
            if not incomplete_B[i]:
                continue
            _dots(queries_BD[i], bank_ND, rows, sim, 0, len(rows), len(bank_ND))
            n = count_B[i]
            for j in range(len(rows)):
                rows_BC[i, n], sim_BC[i, n] = rows[j], sim[j]
                n += not sim[j] <= kth_B[i - first]  # rows come in order, so a tie is dropped
                if n == C:
                    n = k
                    kth_B[i - first] = _keep_top_k(k, C, rows_BC[i], sim_BC[i])
            count_B[i] = n


@njit(cache=True)
def _keep_top_k(k, count, rows_C, sim_C):
    """Keep the k most similar of a list, in order, the first of equal ones; returns the lowest
    similarity that is kept."""
    ordered = np.empty(count, np.int32)
    for c in range(count):
        ordered[c] = ordered_bits(sim_C[c])
    kth = _threshold_of_k(ordered, k, 32)
    equal, reaching, m, c, least = k, 0, 0, 0, np.float32(np.inf)
    for o in ordered:
        equal -= o > kth
        reaching += o >= kth
    if reaching == k:  # without ties, no step depends on the one before
        for c in range(count):
            rows_C[unsigned(m)], sim_C[unsigned(m)] = rows_C[unsigned(c)], sim_C[unsigned(c)]
            m += np.int64(ordered[unsigned(c)] >= kth)
    while m < k:  # without branches, which would be mispredicted
        alike = (ordered[unsigned(c)] == kth) & (equal > 0)
        rows_C[unsigned(m)], sim_C[unsigned(m)] = rows_C[unsigned(c)], sim_C[unsigned(c)]
        m += (ordered[unsigned(c)] > kth) | alike
        equal -= alike
        c += 1
    for c in range(k):
        least = min(least, sim_C[c])
    return least


@njit(cache=True, nogil=True)
def drop_below_floor(first, last, floor_B, rows_BC, count_B, sim_BC):
    """Drop the rows of each list that do not reach its floor."""
    for i in range(first, last):
        rows, sim, kept = rows_BC[i], sim_BC[i], 0
        for c in range(count_B[i]):
            rows[unsigned(kept)], sim[unsigned(kept)] = rows[unsigned(c)], sim[unsigned(c)]
            kept += np.int64(sim[unsigned(c)] >= floor_B[i])
        count_B[i] = kept


@njit(cache=True, nogil=True)
def select_top_k(first, last, k, rows_BC, count_B, sim_BC, rows_Bk, sim_Bk):
    """Copy the k most similar rows of each list, in order; among equals the lowest rows."""
    for i in range(first, last):
        if count_B[i] > k:
            _keep_top_k(k, count_B[i], rows_BC[i], sim_BC[i])
        n = min(k, count_B[i])
        rows_Bk[i, :n], sim_Bk[i, :n] = rows_BC[i, :n], sim_BC[i, :n]
        rows_Bk[i, n:], sim_Bk[i, n:] = -1, -np.inf
