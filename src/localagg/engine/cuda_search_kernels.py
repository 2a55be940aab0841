"""Triton kernels of the exact neighbor search on a GPU; ``cuda_backend`` launches them.

Legend: B queries, N bank rows, D embedding size, K neighbors asked for, S sampled rows, C places in
a query's list of candidates. BLOCK_B and BLOCK_D are B's share and D rounded up to powers of two,
TILE the bank rows handled at a time.

A candidate is one int64: the similarity as an integer of the same order above 32 bits that fall
with the row. So candidates are distinct, larger is better, and among equal similarities the lowest
row is best. A NaN is larger than every number, as in ``torch.topk``.
"""

# The compiler of these functions has types of its own.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl

NOTHING = tl.constexpr(-(2**63))  # an empty place: below every candidate
GONE = tl.constexpr(-(2**31))  # the same among int32
LAST_ROW = tl.constexpr(2**31 - 1)
NAN_KEY = tl.constexpr(0x7FC00000)
NUMBER_STRIDE = tl.constexpr(32)  # counters stand in cache lines of their own: see collect


# --- Numbers in order -----------------------------------------------------------------------------


@triton.jit
def key_of(value):
    """float32 -> int32 of the same order; -0 equals 0, and every NaN is above infinity."""
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(value == value, key, NAN_KEY)


@triton.jit
def value_of(key):
    """int32 of key_of -> float32."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def candidate_of(value, row):
    """(float32, row below 2**31) -> int64."""
    return (key_of(value).to(tl.int64) << 32) | (row.to(tl.int64) ^ LAST_ROW)


@triton.jit
def value_in(candidate):
    """The float32 of a :func:`candidate_of`."""
    return value_of((candidate >> 32).to(tl.int32))


@triton.jit
def row_in(candidate):
    """The row of a :func:`candidate_of`."""
    return (candidate & 0xFFFFFFFF) ^ LAST_ROW


@triton.jit
def best_floor(first, list_ptr, number, K, NOWHERE: tl.constexpr, BLOCK: tl.constexpr):
    """A floor that exactly the K largest of a list of distinct integers reach.

    Bisection on the integers. The list has ``number`` entries, of which K or more are above NOWHERE
    and those at NOWHERE are empty. ``first`` is its first BLOCK entries, held in registers (NOWHERE
    past its end); what is beyond is read again in every round. With repeated integers the floor is
    the K-th largest, which more than K may reach.
    """
    at = tl.arange(0, BLOCK)
    high = tl.max(first, 0)
    low = tl.min(tl.where(first > NOWHERE, first, high), 0)
    for start in range(BLOCK, number, BLOCK):
        more = tl.load(list_ptr + start + at, mask=start + at < number, other=NOWHERE)
        high = tl.maximum(high, tl.max(more, 0))
        low = tl.minimum(low, tl.min(tl.where(more > NOWHERE, more, high), 0))
    while low < high:
        # The upper middle, written so that it cannot overflow.
        middle = (low & high) + ((low ^ high) >> 1) + ((low ^ high) & 1)
        count = tl.sum((first >= middle).to(tl.int32), 0)
        for start in range(BLOCK, number, BLOCK):
            more = tl.load(list_ptr + start + at, mask=start + at < number, other=NOWHERE)
            count += tl.sum((more >= middle).to(tl.int32), 0)
        if count == K:
            low = middle
            high = middle
        elif count > K:
            low = middle
        else:
            high = middle - 1
    return low


# --- Products -------------------------------------------------------------------------------------


@triton.jit
def load_rows(bank_ptr, row, there, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Bank rows [TILE, BLOCK_D], zero where there are none."""
    d = tl.arange(0, BLOCK_D)
    where = bank_ptr + row.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(where, mask=there[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def product(left, right, WIDE: tl.constexpr):
    """left @ right.T, summed in float32. WIDE: Triton's interpreter cannot multiply bfloat16."""
    if WIDE:
        return tl.dot(left.to(tl.float32), tl.trans(right.to(tl.float32)), input_precision="ieee")
    else:
        return tl.dot(left, tl.trans(right))


@triton.jit
def prepare_queries(
    embedding_ptr, low_ptr, slope_ptr, absolute_ptr, unit, slack, tiny,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A query in the products' dtype, and the bound of its products' errors.

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
    """int32 [TILE] in the order of the rows' norms, NaN above infinity."""
    wide = rows.to(tl.float32)
    return tl.sum(wide * wide, 1).to(tl.int32, bitcast=True) & 0x7FFFFFFF


# --- The steps of a search ------------------------------------------------------------------------


@triton.jit
def score_sample(
    low_ptr, bank_ptr, keys_ptr, norm_ptr, B, N, S, stride,
    D: tl.constexpr, TILE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Keys of the low products with S rows [B, S], and the largest squared norm of those rows.

    One row is taken from each of S equal stretches of the bank, at a place drawn by a fixed
    generator: spread whatever the order of the bank, and hard to hit by a period in it.
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
    sim = product(v, rows.to(low_ptr.dtype.element_ty), WIDE)
    there = (b < B)[:, None] & (i < S)[None, :]
    tl.store(keys_ptr + b.to(tl.int64)[:, None] * S + i[None, :], key_of(sim), mask=there)
    tl.atomic_max(norm_ptr, tl.max(squared_norm_bits(rows), 0), sem="relaxed")


@triton.jit
def set_cuts(
    keys_ptr, cut_ptr, threshold_ptr, slope_ptr, absolute_ptr, norm_ptr, S, rank,
    GIVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The low similarity from which rows are collected: the sample's ``rank``-th largest, or the
    threshold that is GIVEN, less three errors: two that ``judge`` asks for, and one for the bits
    that ``collect`` displaces."""
    b = tl.program_id(0)
    norm = tl.sqrt(tl.load(norm_ptr).to(tl.float32, bitcast=True))
    error = tl.load(slope_ptr + b) * norm + tl.load(absolute_ptr + b)
    if GIVEN:
        cut = tl.load(threshold_ptr + b)
    else:
        at = tl.arange(0, BLOCK)
        list_ptr = keys_ptr + b.to(tl.int64) * S
        first = tl.load(list_ptr + at, mask=at < S, other=-(2**31))
        cut = value_of(best_floor(first, list_ptr, S, rank, -(2**31), BLOCK))
    tl.store(cut_ptr + b, cut - 3 * error)


@triton.jit
def collect(
    low_ptr, bank_ptr, cut_ptr, list_ptr, number_ptr, norm_ptr, B, N, C, stride,
    D: tl.constexpr, TILE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The one pass over the bank: low products, of which those from the cut on are listed.

    Some 0.5 % of the products survive: of a tile, none to three a query. They are taken out one a
    query at a time, as the largest of integers that hold a product's upper bits and its column
    (plus one): all else is on numbers in registers. The bits that the column displaces are in the
    error's bound. A query's counter has a cache line of its own, for atomics on one line queue; it
    counts on where the list is full, so ``number > C`` tells of the overflow.
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
        # Read ahead by hand: Triton's pipeliner leaves a loop alone that has a loop within.
        rows = next_rows
        ahead = start + step + column
        next_rows = load_rows(bank_ptr, ahead, ahead < N, stride, D, BLOCK_D)
        sim = product(v, rows.to(low_ptr.dtype.element_ty), WIDE)
        longest = tl.maximum(longest, squared_norm_bits(rows))
        packed = (sim.to(tl.int32, bitcast=True) & (-2 * TILE)) | (column + 1)[None, :]
        # A NaN is kept: it belongs among the best, where the caller meets it.
        packed = tl.where(sim < cut[:, None], GONE, packed)
        best = tl.max(packed, 1)
        while tl.max(best, 0) > GONE:
            found = start + (best & (2 * TILE - 1)) - 1
            take = (best > GONE) & (b < B) & (found < N)
            place = tl.atomic_add(number_ptr + b * NUMBER_STRIDE, 1, mask=take, sem="relaxed")
            value = (best & (-2 * TILE)).to(tl.float32, bitcast=True)
            tl.store(mine_ptr + place, candidate_of(value, found), mask=take & (place < C))
            packed = tl.where(packed == best[:, None], GONE, packed)
            best = tl.max(packed, 1)
    tl.atomic_max(norm_ptr, tl.max(longest, 0), sem="relaxed")


@triton.jit
def judge(
    list_ptr, number_ptr, norm_ptr, cut_ptr, threshold_ptr, slope_ptr, absolute_ptr, low_edge_ptr,
    high_edge_ptr, longest, C, K, GIVEN: tl.constexpr, RESCORE_ALL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Whether a query's list surely holds what is sought, and which candidates need a float32 look.

    With e the largest error of a product and k the K-th largest low similarity: the K-th largest
    similarity is at least k - e, unlisted rows are below cut + e, and candidates below k - 2 e are
    out. Those above k + 2 e are in; they are looked at only to know their similarity. A query
    whose list does not suffice gets the number -1; all do if a row is ``longest`` or longer, for
    its numbers may be beyond the low dtype.
    """
    b = tl.program_id(0)
    number = tl.load(number_ptr + b * NUMBER_STRIDE)
    norm = tl.sqrt(tl.load(norm_ptr).to(tl.float32, bitcast=True))
    error = tl.load(slope_ptr + b) * norm + tl.load(absolute_ptr + b)
    cut = tl.load(cut_ptr + b)
    low_edge = tl.full([], float("-inf"), dtype=tl.float32)
    high_edge = tl.full([], float("inf"), dtype=tl.float32)
    # An error or a norm that is no number does not pass.
    sure = (number <= C) & (error < float("inf")) & (norm < longest)
    threshold = tl.load(threshold_ptr + b)
    if GIVEN:
        low_edge = threshold - error
        sure = sure & (cut + error <= threshold)
    else:
        sure = sure & (number >= K)
    if sure & (number >= K):
        at = tl.arange(0, BLOCK)
        mine_ptr = list_ptr + b.to(tl.int64) * C
        first = tl.load(mine_ptr + at, mask=at < number, other=NOTHING)
        kth = value_in(best_floor(first, mine_ptr, number, K, NOTHING, BLOCK))
        low_edge = tl.maximum(low_edge, kth - 2 * error)
        if not RESCORE_ALL:
            high_edge = kth + 2 * error
            if GIVEN:
                high_edge = tl.maximum(high_edge, threshold + error)
        if not GIVEN:
            sure = sure & (low_edge >= cut)
    if not sure:
        tl.store(number_ptr + b * NUMBER_STRIDE, -1)
    tl.store(low_edge_ptr + b, low_edge)
    tl.store(high_edge_ptr + b, high_edge)


@triton.jit
def rescore(
    embedding_ptr, bank_ptr, list_ptr, number_ptr, low_edge_ptr, high_edge_ptr, threshold_ptr, C,
    stride, GIVEN: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Candidates between the edges get their float32 similarity; those below are dropped."""
    b = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    number = tl.load(number_ptr + b * NUMBER_STRIDE)
    low_edge = tl.load(low_edge_ptr + b)
    high_edge = tl.load(high_edge_ptr + b)
    v = tl.load(embedding_ptr + b * D + d, mask=d < D, other=0.0)
    mine_ptr = list_ptr + b.to(tl.int64) * C
    for start in range(tl.program_id(1) * TILE, number, tl.num_programs(1) * TILE):
        at = start + tl.arange(0, TILE)
        entry = tl.load(mine_ptr + at, mask=at < number, other=NOTHING)
        low = value_in(entry)
        out = low < low_edge
        look = (at < number) & (~out) & (~(low > high_edge))
        rows = load_rows(bank_ptr, row_in(entry), look, stride, D, BLOCK_D)
        sim = tl.sum(rows.to(tl.float32) * v[None, :], 1)
        if GIVEN:
            out = out | (look & (sim < tl.load(threshold_ptr + b)))
        new = tl.where(look, candidate_of(sim, row_in(entry)), entry)
        tl.store(mine_ptr + at, tl.where(out, NOTHING, new), mask=at < number)


@triton.jit
def search_whole(
    embedding_ptr, bank_ptr, list_ptr, number_ptr, threshold_ptr, N, C, K, stride,
    GIVEN: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """For a query of number -1 only: its best, by float32 products with every row of the bank.

    One program reads the whole bank, lists what exceeds a floor, and when the list is full keeps
    its K best and lifts the floor. Needs C >= K + TILE.
    """
    b = tl.program_id(0)
    number = tl.load(number_ptr + b * NUMBER_STRIDE)
    if number < 0:
        d = tl.arange(0, BLOCK_D)
        v = tl.load(embedding_ptr + b * D + d, mask=d < D, other=0.0)
        mine_ptr = list_ptr + b.to(tl.int64) * C
        floor = tl.full([], NOTHING, dtype=tl.int64)
        if GIVEN:
            floor = key_of(tl.load(threshold_ptr + b)).to(tl.int64) << 32
        number = 0
        for start in range(0, N, TILE):
            row = start + tl.arange(0, TILE)
            rows = load_rows(bank_ptr, row, row < N, stride, D, BLOCK_D)
            entry = candidate_of(tl.sum(rows.to(tl.float32) * v[None, :], 1), row)
            keep = ((row < N) & (entry >= floor)).to(tl.int32)
            place = number + tl.cumsum(keep, 0) - 1
            tl.store(mine_ptr + place, entry, mask=keep > 0)
            number += tl.sum(keep, 0)
            if number + TILE > C:
                floor = keep_best(mine_ptr, number, K, BLOCK)
                number = tl.minimum(number, K)
        tl.store(number_ptr + b * NUMBER_STRIDE, number)


@triton.jit
def keep_best(mine_ptr, number, K, BLOCK: tl.constexpr):
    """Moves the K best of a list to its front; returns their floor. The barriers stand between the
    program's threads that write a place and those that read it."""
    at = tl.arange(0, BLOCK)
    tl.debug_barrier()
    first = tl.load(mine_ptr + at, mask=at < number, other=NOTHING)
    floor = best_floor(first, mine_ptr, number, K, NOTHING, BLOCK)
    tl.debug_barrier()
    kept = 0
    for start in range(0, number, BLOCK):
        entry = tl.load(mine_ptr + start + at, mask=start + at < number, other=NOTHING)
        keep = ((start + at < number) & (entry >= floor)).to(tl.int32)
        tl.debug_barrier()
        tl.store(mine_ptr + kept + tl.cumsum(keep, 0) - 1, entry, mask=keep > 0)
        kept += tl.sum(keep, 0)
        tl.debug_barrier()
    return floor


@triton.jit
def take_best(
    list_ptr, number_ptr, rows_ptr, similarity_ptr, C, K, offset, BLOCK: tl.constexpr
):  # fmt: skip
    """The K best of a list (all, if fewer): rows plus ``offset`` int64, similarity float32."""
    b = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    number = tl.load(number_ptr + b * NUMBER_STRIDE)
    mine_ptr = list_ptr + b.to(tl.int64) * C
    floor = tl.full([], NOTHING, dtype=tl.int64)
    first = tl.load(mine_ptr + at, mask=at < number, other=NOTHING)
    full = tl.sum((first > NOTHING).to(tl.int32), 0)
    for start in range(BLOCK, number, BLOCK):
        more = tl.load(mine_ptr + start + at, mask=start + at < number, other=NOTHING)
        full += tl.sum((more > NOTHING).to(tl.int32), 0)
    if full > K:
        floor = best_floor(first, mine_ptr, number, K, NOTHING, BLOCK)
    taken = 0
    for start in range(0, number, BLOCK):
        entry = tl.load(mine_ptr + start + at, mask=start + at < number, other=NOTHING)
        take = ((entry >= floor) & (entry > NOTHING)).to(tl.int32)
        place = b.to(tl.int64) * K + taken + tl.cumsum(take, 0) - 1
        tl.store(rows_ptr + place, row_in(entry) + offset, mask=take > 0)
        tl.store(similarity_ptr + place, value_in(entry), mask=take > 0)
        taken += tl.sum(take, 0)
