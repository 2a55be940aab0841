"""The loops of ``cpu_backend``, compiled for the processor that they run on: the search.

Legend of shape suffixes: B queries, N rows of the bank, D embedding size, T rows of a tile, C
places in a list of candidates, K neighbors. Kernels release the interpreter's lock and work on the
queries ``first <= i < last`` or on a list of their own, so that threads can share a batch. Of keys
see ``cpu_kernel_primitives``.
"""

import numpy as np
from numba import njit

from .cpu_kernel_primitives import (
    SUMS,
    ahead,
    key_of,
    number_of,
    ordered_bits,
    row_of,
    unsigned,
    wide,
)


@njit(cache=True)
def _kth(values, k, bits):
    """What exactly k integers of so many bits reach, at most the k-th largest, which it is where
    others are equal to it. Bit by bit: counting runs in vectors."""
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
    """Rows to the nearest bfloat16, given by bits; (what rounding took from a row, a row's length),
    the largest of each, squared. Either is NaN or infinite where a row is not finite."""
    most_lost = longest = np.float32(0)
    kept = np.empty(rows_TD.shape[1], np.uint32)
    numbers = kept.view(np.float32)
    for t in range(len(rows_TD)):
        bits = rows_TD[t].view(np.uint32)
        lost = length = np.float32(0)
        for d in range(len(bits)):
            b = bits[d]
            kept[d] = (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) & np.uint32(
                0xFFFF0000
            )
        for d in range(len(bits)):
            coarse_TD[t, d] = np.uint16(kept[d] >> np.uint32(16))
            error = rows_TD[t, d] - numbers[d]
            lost += error * error
            length += rows_TD[t, d] * rows_TD[t, d]
        most_lost = lost if lost > most_lost or lost != lost else most_lost
        longest = length if length > longest or length != length else longest
    return most_lost, longest


@njit(cache=True, nogil=True, fastmath=SUMS)
def longest_row(rows_TD):
    """The largest squared length of a row; NaN or infinite where a row is not finite."""
    longest = np.float32(0)
    for t in range(len(rows_TD)):
        length = np.float32(0)
        for d in range(rows_TD.shape[1]):
            x = wide(rows_TD[t, d])
            length += x * x
        longest = length if length > longest or length != length else longest
    return longest


@njit(cache=True, nogil=True)
def sample_thresholds(sim_BT, shift, rank, first, guess_B):
    """The number below the ``rank``-th largest of each line of products, given by bits."""
    keys = np.empty(sim_BT.shape[1], np.int16)
    for i in range(len(sim_BT)):
        for t in range(len(keys)):
            bits = np.int16(sim_BT[i, t] >> shift)
            keys[t] = bits ^ ((bits >> np.int16(15)) & np.int16(0x7FFF))
        guess_B[first + i] = number_of(np.int16(_kth(keys, rank, 16)))


@njit(cache=True, nogil=True)
def collect(
    sim_BT, shift, start, k, margin_B, worst_B, least_B, rows_BC, keys_BC, at, end, count_B
):
    """Append to each query's list the rows of a tile whose product may stand for ``least_B``.

    Args:
        sim_BT: bits of the products, int16 (bfloat16) or int32 (float32), with ``shift`` 0 or 16.
        start: the first row of the tile.
        margin_B: how far a product of this tile can lie below the true similarity.
        worst_B: the largest such margin of the tiles so far.
        least_B: a true similarity that suffices; raised where a list is full.
        at, end: the list's places in the lines of ``rows_BC`` and ``keys_BC``.
        count_B: length of each list; -1 where even the sufficing ones are too many.
    """
    T = sim_BT.shape[1]
    reaches_T, some = np.zeros((T + 7) // 8 * 8, np.uint8), np.empty((T + 7) // 8, np.int32)
    for i in range(len(sim_BT)):
        if count_B[i] >= 0 and at + count_B[i] + T > end:
            count_B[i] = _tighten(k, worst_B[i], i, at, least_B, rows_BC[i], keys_BC[i], count_B[i])
            if at + count_B[i] + T > end:
                count_B[i] = -1
        if count_B[i] < 0:
            continue
        cut = key_of(least_B[i] - margin_B[i])
        rows, keys = rows_BC[i, at:end], keys_BC[i, at:end]
        if cut > 0:
            least = sim_BT.dtype.type(np.int64(cut) << shift)  # bits have the order of numbers
            n = count_B[i]
            count_B[i] = _append(sim_BT[i], shift, start, least, reaches_T, some, rows, keys, n)
            continue
        n = count_B[i]
        for t in range(T):
            bits = np.int16(sim_BT[i, t] >> shift)
            key = np.int16(bits ^ ((bits >> np.int16(15)) & np.int16(0x7FFF)))
            rows[n], keys[n] = start + t, key
            n += np.int64(key >= cut)
        count_B[i] = n


@njit(cache=True)
def _append(sim_T, shift, start, least, reaches_T, some, rows, keys, n):
    """As in :func:`collect` for a cut above zero. Which products reach it nobody could predict, so
    nothing branches on that: eights are listed that hold one, then those in them."""
    T = len(sim_T)
    for t in range(T):
        reaches_T[t] = sim_T[t] >= least
    eights, listed = reaches_T.view(np.uint64), 0
    for e in range(T // 8):
        some[listed] = 8 * e
        listed += np.int64(eights[e] != 0)
    for e in range(listed):
        for b in range(8):
            t = unsigned(some[e] + b)
            rows[unsigned(n)], keys[unsigned(n)] = start + some[e] + b, sim_T[t] >> shift
            n += np.int64(reaches_T[t])
    for t in range(T // 8 * 8, T):
        rows[n], keys[n] = start + t, sim_T[t] >> shift
        n += np.int64(reaches_T[t])
    return n


@njit(cache=True)
def _tighten(k, margin, i, at, least_B, rows_C, keys_C, count):
    """Raise what suffices to what the k best of a list reach for sure, and drop the rest."""
    if count < k:
        return count
    kth = _kth(keys_C[at : at + count], k, 16)
    reached = number_of(np.int16(max(kth - 1, -32768))) - margin
    if not reached > least_B[i]:
        return count
    least_B[i] = reached
    cut, kept = key_of(reached - margin), at
    for c in range(at, at + count):
        rows_C[unsigned(kept)], keys_C[unsigned(kept)] = rows_C[unsigned(c)], keys_C[unsigned(c)]
        kept += np.int64(keys_C[unsigned(c)] >= cut)
    return kept - at


# --- The exact pass ---


@njit(cache=True, nogil=True)
def join(first, last, k, margin_B, places, least_SB, rows_BC, keys_BC, count_SB, least_B, count_B):
    """Join the lists of each query into one in the order of rows, tightened; list s begins at
    s * places. ``count_B`` is -1 where one has overflown."""
    for i in range(first, last):
        least_B[i], count_B[i] = least_SB[:, i].max(), 0
        for s in range(len(count_SB)):
            if count_SB[s, i] < 0 or count_B[i] < 0:
                count_B[i] = -1
                continue
            for c in range(count_SB[s, i] if s else 0):
                to, place = unsigned(count_B[i] + c), unsigned(s * places + c)
                rows_BC[i, to], keys_BC[i, to] = rows_BC[i, place], keys_BC[i, place]
            count_B[i] += count_SB[s, i]
        if count_B[i] > 0:
            count_B[i] = _tighten(k, margin_B[i], i, 0, least_B, rows_BC[i], keys_BC[i], count_B[i])


@njit(cache=True, nogil=True, fastmath=SUMS)
def _dots(query, bank_ND, rows, sim, c, count, end):
    """Products with the listed rows below ``end`` from place c on; returns the next place.

    Four at a time, which hides memory's latency (past the end of the list the last one again). All
    similarities come from here, so that those of equal rows are equal: another loop might sum in
    another order.
    """
    last = count - 1
    while c < count and rows[c] < end:
        for more in range(4):
            ahead(bank_ND, rows[:count], c + more)
        p, q, r = min(c + 1, last), min(c + 2, last), min(c + 3, last)
        one, two = row_of(bank_ND, rows[c]), row_of(bank_ND, rows[p])
        three, four = row_of(bank_ND, rows[q]), row_of(bank_ND, rows[r])
        a, b, e, f = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for d in range(len(query)):
            a += query[d] * wide(one[d])
            b += query[d] * wide(two[d])
            e += query[d] * wide(three[d])
            f += query[d] * wide(four[d])
        sim[c], sim[p], sim[q], sim[r] = a, b, e, f
        c += 4
    return c


@njit(cache=True, nogil=True)
def rescore(first, last, chunk, queries_BD, bank_ND, rows_BC, count_B, sim_BC):
    """True similarities of listed rows, in float32. Stretches of the bank go by in turn, so that a
    row is read once for all queries that list it."""
    place = np.zeros(last - first, np.int64)
    for end in range(chunk, len(bank_ND) + chunk, chunk):
        for i in range(first, last):
            c = place[i - first]
            c = _dots(queries_BD[i], bank_ND, rows_BC[i], sim_BC[i], c, count_B[i], end)
            place[i - first] = c


@njit(cache=True, nogil=True)
def judge(first, last, k, floor_B, least_B, count_B, sim_BC, misled_B):
    """Whether fewer than k of a list reach what suffices, so that others might be nearer; not where
    that is as low as ``floor_B``, below which nothing is wanted."""
    for i in range(first, last):
        reaching = 0
        for c in range(count_B[i]):
            reaching += sim_BC[i, c] >= least_B[i]
        misled_B[i] = count_B[i] < 0 or (reaching < k and not least_B[i] <= floor_B[i])


@njit(cache=True, nogil=True)
def search_whole(first, last, k, chunk, misled_B, queries_BD, bank_ND, rows_BC, count_B, sim_BC):
    """New lists for misled queries, from the similarities of all rows."""
    C, sim = rows_BC.shape[1], np.empty(chunk, np.float32)
    kth_B = np.full(last - first, np.nan, np.float32)  # nothing is at most that
    for i in range(first, last):
        count_B[i] = 0 if misled_B[i] else count_B[i]
    for start in range(0, len(bank_ND), chunk):
        rows = np.arange(start, min(start + chunk, len(bank_ND)))
        for i in range(first, last):
            if not misled_B[i]:
                continue
            _dots(queries_BD[i], bank_ND, rows, sim, 0, len(rows), len(bank_ND))
            n = count_B[i]
            for j in range(len(rows)):
                rows_BC[i, n], sim_BC[i, n] = rows[j], sim[j]
                n += not sim[j] <= kth_B[i - first]  # an equal one has to be lower than all so far
                if n == C:
                    n = k
                    kth_B[i - first] = _keep_best(k, C, rows_BC[i], sim_BC[i])
            count_B[i] = n


@njit(cache=True)
def _keep_best(k, count, rows_C, sim_C):
    """Keep the k most similar of a list in their order, the first of equal ones; the least kept."""
    ordered = np.empty(count, np.int32)
    for c in range(count):
        ordered[c] = ordered_bits(sim_C[c])
    kth = _kth(ordered, k, 32)
    equal, reaching, m, c, least = k, 0, 0, 0, np.float32(np.inf)
    for o in ordered:
        equal -= o > kth
        reaching += o >= kth
    if reaching == k:  # no ties to settle, so that nothing waits for the last one's answer
        for c in range(count):
            rows_C[unsigned(m)], sim_C[unsigned(m)] = rows_C[unsigned(c)], sim_C[unsigned(c)]
            m += np.int64(ordered[unsigned(c)] >= kth)
    while m < k:  # without branches, which nobody could predict
        alike = (ordered[unsigned(c)] == kth) & (equal > 0)
        rows_C[unsigned(m)], sim_C[unsigned(m)] = rows_C[unsigned(c)], sim_C[unsigned(c)]
        m += (ordered[unsigned(c)] > kth) | alike
        equal -= alike
        c += 1
    for c in range(k):
        least = min(least, sim_C[c])
    return least


@njit(cache=True, nogil=True)
def drop_lower(first, last, floor_B, rows_BC, count_B, sim_BC):
    """Take those from each list that do not reach its floor."""
    for i in range(first, last):
        rows, sim, kept = rows_BC[i], sim_BC[i], 0
        for c in range(count_B[i]):
            rows[unsigned(kept)], sim[unsigned(kept)] = rows[unsigned(c)], sim[unsigned(c)]
            kept += np.int64(sim[unsigned(c)] >= floor_B[i])
        count_B[i] = kept


@njit(cache=True, nogil=True)
def choose(first, last, k, rows_BC, count_B, sim_BC, rows_Bk, sim_Bk):
    """The k most similar of each list, in the order of rows; among equals the lowest rows."""
    for i in range(first, last):
        if count_B[i] > k:
            _keep_best(k, count_B[i], rows_BC[i], sim_BC[i])
        n = min(k, count_B[i])
        rows_Bk[i, :n], sim_Bk[i, :n] = rows_BC[i, :n], sim_BC[i, :n]
        rows_Bk[i, n:], sim_Bk[i, n:] = -1, -np.inf
