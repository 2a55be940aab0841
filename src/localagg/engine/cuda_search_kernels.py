"""Triton kernels of the exact neighbor search on a GPU; ``cuda_backend`` launches them.

Legend: B queries, N bank rows, D embedding size, K neighbors, S sampled rows, C places in a query's
list of candidates. BLOCK_B and BLOCK_D are B's share and D rounded up to powers of two, TILE the
bank rows handled at a time.

A candidate is one int64: the similarity as an integer of the same order above 32 bits that fall
with the row. So candidates are distinct, larger is better, and among equal similarities the lowest
row is best. NaN is larger than every number, as in ``torch.topk``.
"""

# Triton's compiler has its own types.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl

EMPTY = tl.constexpr(-(2**63))  # an empty place: below every candidate
TAKEN = tl.constexpr(-(2**31))  # a product that was listed: below every int32 key
LAST_ROW = tl.constexpr(2**31 - 1)
NAN_KEY = tl.constexpr(0x7FC00000)
COUNT_STRIDE = tl.constexpr(32)  # each counter has its own cache line: see collect


# --- Numbers in order -----------------------------------------------------------------------------


@triton.jit
def key_of(value):
    """Return a float32 as an int32 of the same order; -0 equals 0, NaN is above infinity."""
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(value == value, key, NAN_KEY)


@triton.jit
def value_of(key):
    """Return the float32 of a key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def candidate_of(value, row):
    """Return the candidate, int64, of a float32 similarity and a row below 2**31."""
    return (key_of(value).to(tl.int64) << 32) | (row.to(tl.int64) ^ LAST_ROW)


@triton.jit
def value_in(candidate):
    """Return a candidate's similarity."""
    return value_of((candidate >> 32).to(tl.int32))


@triton.jit
def row_in(candidate):
    """Return a candidate's row."""
    return (candidate & 0xFFFFFFFF) ^ LAST_ROW


@triton.jit
def floor_of_k_largest(first, list_ptr, count, K, FREE: tl.constexpr, BLOCK: tl.constexpr):
    """Return a floor that exactly the K largest of a list of distinct integers reach.

    Bisects the integers. K or more of the list's ``count`` entries are above FREE; those at FREE
    are empty. ``first`` holds its first BLOCK entries in registers, FREE past the list's end; later
    entries are read in every round. With repeated integers the floor is the K-th largest, which
    more than K may reach.
    """
    at = tl.arange(0, BLOCK)
    high = tl.max(first, 0)
    low = tl.min(tl.where(first > FREE, first, high), 0)
    for start in range(BLOCK, count, BLOCK):
        more = tl.load(list_ptr + start + at, mask=start + at < count, other=FREE)
        high = tl.maximum(high, tl.max(more, 0))
        low = tl.minimum(low, tl.min(tl.where(more > FREE, more, high), 0))
    while low < high:
        # The upper middle, written so that it cannot overflow.
        middle = (low & high) + ((low ^ high) >> 1) + ((low ^ high) & 1)
        above = tl.sum((first >= middle).to(tl.int32), 0)
        for start in range(BLOCK, count, BLOCK):
            more = tl.load(list_ptr + start + at, mask=start + at < count, other=FREE)
            above += tl.sum((more >= middle).to(tl.int32), 0)
        if above == K:
            low = middle
            high = middle
        elif above > K:
            low = middle
        else:
            high = middle - 1
    return low


# --- Products -------------------------------------------------------------------------------------


@triton.jit
def load_rows(bank_ptr, row, there, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load bank rows [TILE, BLOCK_D]; zeros where ``there`` is false."""
    d = tl.arange(0, BLOCK_D)
    where = bank_ptr + row.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(where, mask=there[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def product(left, right, FLOAT32_DOT: tl.constexpr):
    """Return left @ right.T, summed in float32. FLOAT32_DOT is for Triton's interpreter, which
    cannot multiply bfloat16."""
    if FLOAT32_DOT:
        return tl.dot(left.to(tl.float32), tl.trans(right.to(tl.float32)), input_precision="ieee")
    else:
        return tl.dot(left, tl.trans(right))


@triton.jit
def prepare_queries(
    embedding_ptr, low_ptr, slope_ptr, absolute_ptr, unit, slack, tiny,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Round a query to the products' dtype, and bound the errors of its products.

    For every bank row of norm n, |low product - float32 product| <= slope n + absolute, by
    v.m - v'.m' = (v - v').m + v'.(m - m'), with |m - m'| <= unit |m| + tiny, and ``slack`` for the
    sums of both products.
    """
    d = tl.arange(0, BLOCK_D)
    at = tl.program_id(0) * D + d
    v = tl.load(embedding_ptr + at, mask=d < D, other=0.0)
    low = v.to(low_ptr.dtype.element_ty)
    tl.store(low_ptr + at, low, mask=d < D)
    rest = v - low.to(tl.float32)
    norm = tl.sqrt(tl.sum(v * v, 0))
    residual = tl.sqrt(tl.sum(rest * rest, 0))
    slope = (residual + unit * (norm + residual)) * (1 + 2 * unit) + slack * norm
    tl.store(slope_ptr + tl.program_id(0), slope * 1.001)
    tl.store(absolute_ptr + tl.program_id(0), norm * tiny * 2)


@triton.jit
def squared_norm_bits(rows):
    """Return int32 [TILE] in the order of the rows' norms, NaN above infinity."""
    single = rows.to(tl.float32)
    return tl.sum(single * single, 1).to(tl.int32, bitcast=True) & 0x7FFFFFFF


# --- The steps of a search ------------------------------------------------------------------------


@triton.jit
def score_sample(
    low_ptr, bank_ptr, keys_ptr, norm_ptr, B, N, S, stride,
    D: tl.constexpr, TILE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
    FLOAT32_DOT: tl.constexpr,
):  # fmt: skip
    """Compute keys of low-precision products with S rows [B, S], and these rows' largest norm.

    One row is taken from each of S equal parts of the bank, at a place drawn by a fixed generator,
    so that neither the order of the bank nor a period in it biases the sample.
    """
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.arange(0, BLOCK_D)
    wide_i = i.to(tl.int64)
    start = wide_i * N // S
    span = tl.maximum((wide_i + 1) * N // S - start, 1)
    row = start + (((wide_i * 1103515245 + 12345) & 0x7FFFFFFF) >> 7) % span
    rows = load_rows(bank_ptr, row, i < S, stride, D, BLOCK_D)
    v = tl.load(
        low_ptr + b[:, None] * D + d[None, :], mask=(b < B)[:, None] & (d < D)[None, :], other=0.0
    )
    sim = product(v, rows.to(low_ptr.dtype.element_ty), FLOAT32_DOT)
    there = (b < B)[:, None] & (i < S)[None, :]
    tl.store(keys_ptr + b.to(tl.int64)[:, None] * S + i[None, :], key_of(sim), mask=there)
    tl.atomic_max(norm_ptr, tl.max(squared_norm_bits(rows), 0), sem="relaxed")


@triton.jit
def set_cuts(
    keys_ptr, cut_ptr, threshold_ptr, slope_ptr, absolute_ptr, norm_ptr, S, rank,
    GIVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set the low-precision similarity from which rows are collected.

    It is the sample's ``rank``-th largest, or the threshold if one is GIVEN, less three errors: two
    that ``check_lists`` needs, and one for the bits that ``collect`` displaces."""
    b = tl.program_id(0)
    norm = tl.sqrt(tl.load(norm_ptr).to(tl.float32, bitcast=True))
    error = tl.load(slope_ptr + b) * norm + tl.load(absolute_ptr + b)
    if GIVEN:
        cut = tl.load(threshold_ptr + b)
    else:
        at = tl.arange(0, BLOCK)
        list_ptr = keys_ptr + b.to(tl.int64) * S
        first = tl.load(list_ptr + at, mask=at < S, other=-(2**31))
        cut = value_of(floor_of_k_largest(first, list_ptr, S, rank, -(2**31), BLOCK))
    tl.store(cut_ptr + b, cut - 3 * error)


@triton.jit
def collect(
    low_ptr, bank_ptr, cut_ptr, list_ptr, count_ptr, norm_ptr, B, N, C, stride,
    D: tl.constexpr, TILE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
    FLOAT32_DOT: tl.constexpr,
):  # fmt: skip
    """Make the one pass over the bank: list the low-precision products from the cut on.

    Some 0.5 % of the products survive: none to three a query of each tile. They are taken out one a
    query at a time, as the largest of integers that hold a product's upper bits and its column plus
    one, so that everything else stays in registers. The error bound includes the bits that the
    column displaces. Each query's counter has its own cache line, because atomics on one line
    queue. It counts beyond a full list, so that ``count > C`` means overflow.
    """
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.arange(0, BLOCK_D)
    v = tl.load(
        low_ptr + b[:, None] * D + d[None, :], mask=(b < B)[:, None] & (d < D)[None, :], other=0.0
    )
    cut = tl.load(cut_ptr + b, mask=b < B, other=float("inf"))
    mine_ptr = list_ptr + b.to(tl.int64) * C
    column = tl.arange(0, TILE)
    longest = tl.zeros([TILE], dtype=tl.int32)
    first = tl.program_id(0) * TILE
    step = tl.num_programs(0) * TILE
    next_rows = load_rows(bank_ptr, first + column, first + column < N, stride, D, BLOCK_D)
    for start in range(first, N, step):
        # Read ahead by hand: Triton does not pipeline a loop that contains a loop.
        rows = next_rows
        ahead = start + step + column
        next_rows = load_rows(bank_ptr, ahead, ahead < N, stride, D, BLOCK_D)
        sim = product(v, rows.to(low_ptr.dtype.element_ty), FLOAT32_DOT)
        longest = tl.maximum(longest, squared_norm_bits(rows))
        packed = (sim.to(tl.int32, bitcast=True) & (-2 * TILE)) | (column + 1)[None, :]
        # NaN is kept: it belongs among the best, where the caller sees it.
        packed = tl.where(sim < cut[:, None], TAKEN, packed)
        best = tl.max(packed, 1)
        while tl.max(best, 0) > TAKEN:
            found = start + (best & (2 * TILE - 1)) - 1
            take = (best > TAKEN) & (b < B) & (found < N)
            place = tl.atomic_add(count_ptr + b * COUNT_STRIDE, 1, mask=take, sem="relaxed")
            value = (best & (-2 * TILE)).to(tl.float32, bitcast=True)
            tl.store(mine_ptr + place, candidate_of(value, found), mask=take & (place < C))
            packed = tl.where(packed == best[:, None], TAKEN, packed)
            best = tl.max(packed, 1)
    tl.atomic_max(norm_ptr, tl.max(longest, 0), sem="relaxed")


@triton.jit
def check_lists(
    list_ptr, count_ptr, norm_ptr, cut_ptr, threshold_ptr, slope_ptr, absolute_ptr, edge_ptr,
    max_norm, C, K, GIVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Check whether a query's list surely contains the K best, and set the edge below which its
    candidates cannot be among them.

    With e the largest error of a product and k the K-th largest low-precision similarity: the K-th
    largest similarity is at least k - e, unlisted rows are below cut + e, and candidates below
    k - 2 e are out. A query with an insufficient list gets the count -1. So do all queries if a row
    has the norm ``max_norm`` or more, because its numbers may exceed the low-precision dtype.
    """
    b = tl.program_id(0)
    count = tl.load(count_ptr + b * COUNT_STRIDE)
    norm = tl.sqrt(tl.load(norm_ptr).to(tl.float32, bitcast=True))
    error = tl.load(slope_ptr + b) * norm + tl.load(absolute_ptr + b)
    cut = tl.load(cut_ptr + b)
    edge = tl.full([], float("-inf"), dtype=tl.float32)
    # A NaN error or norm does not pass.
    sure = (count <= C) & (error < float("inf")) & (norm < max_norm)
    threshold = tl.load(threshold_ptr + b)
    if GIVEN:
        edge = threshold - error
        sure = sure & (cut + error <= threshold)
    else:
        sure = sure & (count >= K)
    if sure & (count >= K):
        at = tl.arange(0, BLOCK)
        mine_ptr = list_ptr + b.to(tl.int64) * C
        first = tl.load(mine_ptr + at, mask=at < count, other=EMPTY)
        kth = value_in(floor_of_k_largest(first, mine_ptr, count, K, EMPTY, BLOCK))
        edge = tl.maximum(edge, kth - 2 * error)
        if not GIVEN:
            sure = sure & (edge >= cut)
    if not sure:
        tl.store(count_ptr + b * COUNT_STRIDE, -1)
    tl.store(edge_ptr + b, edge)


@triton.jit
def rescore(
    embedding_ptr, bank_ptr, list_ptr, count_ptr, edge_ptr, threshold_ptr, C, stride,
    GIVEN: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Score candidates from the edge on in float32, and drop those below."""
    b = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    count = tl.load(count_ptr + b * COUNT_STRIDE)
    edge = tl.load(edge_ptr + b)
    v = tl.load(embedding_ptr + b * D + d, mask=d < D, other=0.0)
    mine_ptr = list_ptr + b.to(tl.int64) * C
    for start in range(tl.program_id(1) * TILE, count, tl.num_programs(1) * TILE):
        at = start + tl.arange(0, TILE)
        entry = tl.load(mine_ptr + at, mask=at < count, other=EMPTY)
        low = value_in(entry)
        out = low < edge
        look = (at < count) & (~out)
        rows = load_rows(bank_ptr, row_in(entry), look, stride, D, BLOCK_D)
        sim = tl.sum(rows.to(tl.float32) * v[None, :], 1)
        if GIVEN:
            out = out | (look & (sim < tl.load(threshold_ptr + b)))
        new = tl.where(look, candidate_of(sim, row_in(entry)), entry)
        tl.store(mine_ptr + at, tl.where(out, EMPTY, new), mask=at < count)


@triton.jit
def search_all_rows(
    embedding_ptr, bank_ptr, list_ptr, count_ptr, threshold_ptr, N, C, K, stride,
    GIVEN: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """List the best rows of a query with count -1, by float32 products with the whole bank.

    One program reads the bank and lists the rows that reach a floor. When the list is full, it
    keeps the K best and raises the floor. Needs C >= K + TILE.
    """
    b = tl.program_id(0)
    count = tl.load(count_ptr + b * COUNT_STRIDE)
    if count < 0:
        d = tl.arange(0, BLOCK_D)
        v = tl.load(embedding_ptr + b * D + d, mask=d < D, other=0.0)
        mine_ptr = list_ptr + b.to(tl.int64) * C
        floor = tl.full([], EMPTY, dtype=tl.int64)
        if GIVEN:
            floor = key_of(tl.load(threshold_ptr + b)).to(tl.int64) << 32
        count = 0
        for start in range(0, N, TILE):
            row = start + tl.arange(0, TILE)
            rows = load_rows(bank_ptr, row, row < N, stride, D, BLOCK_D)
            entry = candidate_of(tl.sum(rows.to(tl.float32) * v[None, :], 1), row)
            keep = ((row < N) & (entry >= floor)).to(tl.int32)
            place = count + tl.cumsum(keep, 0) - 1
            tl.store(mine_ptr + place, entry, mask=keep > 0)
            count += tl.sum(keep, 0)
            if count + TILE > C:
                floor = keep_best(mine_ptr, count, K, BLOCK)
                count = tl.minimum(count, K)
        tl.store(count_ptr + b * COUNT_STRIDE, count)


@triton.jit
def keep_best(mine_ptr, count, K, BLOCK: tl.constexpr):
    """Move the K best of a list to its front, and return their floor. The barriers separate
    threads that write a place from those that read it."""
    at = tl.arange(0, BLOCK)
    tl.debug_barrier()
    first = tl.load(mine_ptr + at, mask=at < count, other=EMPTY)
    floor = floor_of_k_largest(first, mine_ptr, count, K, EMPTY, BLOCK)
    tl.debug_barrier()
    kept = 0
    for start in range(0, count, BLOCK):
        entry = tl.load(mine_ptr + start + at, mask=start + at < count, other=EMPTY)
        keep = ((start + at < count) & (entry >= floor)).to(tl.int32)
        tl.debug_barrier()
        tl.store(mine_ptr + kept + tl.cumsum(keep, 0) - 1, entry, mask=keep > 0)
        kept += tl.sum(keep, 0)
        tl.debug_barrier()
    return floor


@triton.jit
def take_best(
    list_ptr, count_ptr, rows_ptr, similarity_ptr, C, K, BLOCK: tl.constexpr
):  # fmt: skip
    """Copy the K best of a list, or all if fewer: rows int64, similarity float32."""
    b = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    count = tl.load(count_ptr + b * COUNT_STRIDE)
    mine_ptr = list_ptr + b.to(tl.int64) * C
    floor = tl.full([], EMPTY, dtype=tl.int64)
    first = tl.load(mine_ptr + at, mask=at < count, other=EMPTY)
    full = tl.sum((first > EMPTY).to(tl.int32), 0)
    for start in range(BLOCK, count, BLOCK):
        more = tl.load(mine_ptr + start + at, mask=start + at < count, other=EMPTY)
        full += tl.sum((more > EMPTY).to(tl.int32), 0)
    if full > K:
        floor = floor_of_k_largest(first, mine_ptr, count, K, EMPTY, BLOCK)
    taken = 0
    for start in range(0, count, BLOCK):
        entry = tl.load(mine_ptr + start + at, mask=start + at < count, other=EMPTY)
        take = ((entry >= floor) & (entry > EMPTY)).to(tl.int32)
        place = b.to(tl.int64) * K + taken + tl.cumsum(take, 0) - 1
        tl.store(rows_ptr + place, row_in(entry), mask=take > 0)
        tl.store(similarity_ptr + place, value_in(entry), mask=take > 0)
        taken += tl.sum(take, 0)
