"""The neighbor engine on a GPU, in Triton: exact, and little more than one pass over the bank.

A search (:func:`top_rows`) is eight launches and never waits for the host:

1. each query is rounded to the products' dtype, and the error of its products bounded;
2. products with a sample of the bank give each query a threshold that somewhat more than K rows
   should reach;
3. one pass over the bank by fp16 or bf16 tensor-core products lists the rows that reach it;
4. each list is judged: with the error bound, does it surely hold the K best, and which entries
   cannot be among them? Those that can are scored again in float32;
5. a query whose list does not suffice (the sample misled, or so many rows are alike that the list
   ran over) is searched again by float32 products with the whole bank, each by one program: some
   10 ms for 1.28 million rows, at a chance below 1e-6 on rows in no contrived order;
6. the K best of each list are taken.

Memory beyond bank and result, whatever N is: B x 4 x (S + 2 C) bytes, with the sample S = 32,768
and C the power of two from 4 K on, at least 8,192. At B = 128, K = 4096: 16 + 16 MiB, of which the
first is freed before the second is asked for.

Row shards: a rank's rows may be a slice of a bank. ``offset`` is added to the rows found, and with
``threshold`` only rows that reach it are sought. Ranks gather :func:`sample_keys` of their slices
(or the largest few of them) and agree on a threshold by :func:`threshold_of_sample`; if the rows
found by all ranks are K or more, the K best of them are exact; if fewer, search without it.

Importing this module needs ``triton``. It also runs on the CPU under Triton's interpreter
(``TRITON_INTERPRET=1``), which is how it is tested where there is no GPU.
"""

# Launches take options that a kernel's signature lacks.
# pyright: reportCallIssue=false

import math

import torch
import triton
from torch import Tensor
from triton import knobs

from ..errors import UserError
from . import cuda_search_kernels as kernels
from .cuda_loss_kernels import close_rows, log_partition, processors

__all__ = [
    "MAX_DIM",
    "close_rows",
    "log_partition",
    "sample_keys",
    "threshold_of_sample",
    "top_rows",
]

MAX_DIM = 512  # a tile of longer rows does not fit beside its successors in shared memory
SAMPLE_ROWS = 32768  # sampled rows that set the thresholds: some 100 of them are among the K best
SPARE = 5.0  # standard deviations of the sample's count that the threshold allows for
LEAST_PLACES = 8192  # candidates a query can list, at least
QUERY_BLOCK = 128  # queries of a product; more than these read the bank again
TILE_ROWS = 64  # bank rows of a product
WHOLE_TILE_ROWS = 256  # bank rows at a time when one program searches the whole bank
LIST_BLOCK = 8192  # candidates that a program holds in registers
RESCORE_PROGRAMS = 16  # a query

# |x - rounded x| <= unit |x|, and an absolute part where float16 runs out of exponents.
_UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_TINY = {torch.float16: 2.0**-25, torch.bfloat16: 0.0}
# A sum of D products of two vectors errs by at most D times this times their norms. Float32 alone
# would need 2**-24; tensor cores are not documented so well.
_SUM_SLACK = 2.0**-21
# A listed product loses the bits that hold its column of the tile: this times its size, for each.
_PACKING_SLACK = 2.0**-22

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@torch.no_grad()
def top_rows(
    embedding: Tensor,
    bank: Tensor,
    count: int,
    *,
    bank_low: Tensor | None = None,
    threshold: Tensor | None = None,
    offset: int = 0,
    values: bool = True,
) -> tuple[Tensor, Tensor]:
    """The K bank rows most similar to each query, exactly: largest float32 v . M_j, in no order.

    "Float32 similarity" is a sum of float32 products of the values as stored, in an order that is
    the same for all rows of a query. Ties at the K-th go to the lowest row. A NaN similarity counts
    as the largest, as in ``torch.topk``, so that NaN in either input shows in the result. No
    synchronization with the host. The order of a result, and so the last bits of sums over it, may
    differ from run to run, unless ``torch.use_deterministic_algorithms`` is on: then by row.

    Args:
        embedding: [B, D], any floating dtype; used in float32.
        bank: float32, bfloat16 or float16 [N, D] with contiguous rows, N below 2**31.
        count: K >= 1; more than N means all N.
        bank_low: ``bank`` rounded to float16 or bfloat16 [N, D], exactly as ``bank.to(dtype)``
            gives it: halves what the pass reads. float16 has the tighter bound on unit rows.
        threshold: float32 [B]: rows of lower similarity are not sought. Places that stay free
            hold row -1 and similarity -inf.
        offset: added to the rows found.
        values: if False, only the rows are exact, and the similarities of those that are surely
            in are the rounded products': this saves most of the gather.

    Returns:
        (rows, similarity): int64 and float32 [B, min(K, N)].

    Raises:
        UserError: D above ``MAX_DIM``, or a dtype that the kernels do not take.
    """
    _check(embedding, bank, bank_low)
    B, N = len(embedding), len(bank)
    K = min(count, N)
    rows_BK = torch.empty(B, K, dtype=torch.int64, device=bank.device)
    sim_BK = torch.empty(B, K, dtype=torch.float32, device=bank.device)
    if threshold is not None:
        rows_BK.fill_(-1)
        sim_BK.fill_(-torch.inf)
        threshold = threshold.float().contiguous()
    if not B or not K:
        return rows_BK, sim_BK
    with torch.cuda.device_of(bank):
        queries = _Queries(embedding, bank, bank_low)
        cut_B = _cuts(queries, K, threshold)
        list_BC, number_B = _candidates(queries, K, cut_B, threshold, values)
        block = min(LIST_BLOCK, list_BC.shape[1])
        kernels.take_best[(B,)](
            list_BC, number_B, rows_BK, sim_BK, list_BC.shape[1], K, offset,
            BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    if torch.are_deterministic_algorithms_enabled():
        rows_BK, order_BK = rows_BK.sort(dim=1)
        sim_BK = sim_BK.gather(1, order_BK)
    return rows_BK, sim_BK


@torch.no_grad()
def sample_keys(
    embedding: Tensor, bank: Tensor, *, bank_low: Tensor | None = None, size: int | None = None
) -> Tensor:
    """The rounded similarities of each query with a fixed sample of the bank's rows.

    One row from each of S equal stretches of the bank, the same rows in every call.

    Args:
        embedding: [B, D].
        bank: [N, D], or a slice of it.
        bank_low: as in :func:`top_rows`.
        size: S; default and limit ``SAMPLE_ROWS`` and N.

    Returns:
        float32 [B, S].
    """
    _check(embedding, bank, bank_low)
    with torch.cuda.device_of(bank):
        queries = _Queries(embedding, bank, bank_low)
        keys_BS = queries.sample(min(size or SAMPLE_ROWS, len(bank)))
    return torch.where(keys_BS < 0, keys_BS ^ 0x7FFFFFFF, keys_BS).view(torch.float32)


def threshold_of_sample(similarity: Tensor, count: int, rows: int) -> Tensor:
    """A similarity that somewhat more than K of N rows should reach, from a sample of S of them.

    Args:
        similarity: float [B, S], from :func:`sample_keys`, of one slice or of all side by side.
        count: K.
        rows: N, in all slices together.

    Returns:
        float32 [B]. A guess: that fewer than K rows reach it has a chance below 1e-6.
    """
    rank = _sample_rank(count, similarity.shape[1], rows)
    return similarity.topk(rank, dim=1).values[:, -1].float().contiguous()


# --- The steps ------------------------------------------------------------------------------------


class _Queries:
    """A batch of queries made ready for products with one bank, and what every launch needs."""

    def __init__(self, embedding: Tensor, bank: Tensor, bank_low: Tensor | None) -> None:
        B, D = embedding.shape
        self.exact = embedding.float().contiguous()
        self.bank = bank
        self.source = bank if bank_low is None else bank_low
        rounded = self.source is not bank or bank.dtype == torch.float32
        low = torch.float16 if self.source.dtype == torch.float32 else self.source.dtype
        self.low = torch.empty(B, D, dtype=low, device=bank.device)
        self.slope, self.absolute = torch.empty(2, B, device=bank.device)
        self.norm = torch.zeros(1, dtype=torch.int32, device=bank.device)
        self.block_D = max(16, triton.next_power_of_2(D))
        self.block_B = max(16, min(QUERY_BLOCK, triton.next_power_of_2(B)))
        self.shape = {"D": D, "BLOCK_D": self.block_D}
        self.tile = max(16, min(TILE_ROWS, 8192 // self.block_D))
        self.wide = low == torch.bfloat16 and knobs.runtime.interpret
        kernels.prepare_queries[(B,)](
            self.exact, self.low, self.slope, self.absolute,
            _UNIT[low] if rounded else 0.0, D * _SUM_SLACK + self.tile * _PACKING_SLACK,
            math.sqrt(D) * _TINY[low], **self.shape, num_warps=1,
        )  # fmt: skip

    def sample(self, size: int) -> Tensor:
        """Keys of the products with sampled rows, int32 [B, S]; notes the rows' largest norm."""
        B = len(self.exact)
        keys_BS = torch.empty(B, size, dtype=torch.int32, device=self.bank.device)
        grid = (triton.cdiv(size, self.tile), triton.cdiv(B, self.block_B))
        kernels.score_sample[grid](
            self.low, self.source, keys_BS, self.norm, B, len(self.bank), size,
            self.source.stride(0), TILE=self.tile, BLOCK_B=self.block_B, WIDE=self.wide,
            **self.shape, num_warps=8,
        )  # fmt: skip
        return keys_BS


def _cuts(queries: _Queries, K: int, threshold: Tensor | None) -> Tensor:
    """The rounded similarity from which each query lists rows [B]."""
    N, given = len(queries.bank), threshold is not None
    # A threshold that is given still needs the rows' norm, for the error to be expected.
    size = min(N, queries.tile * 8 if given else SAMPLE_ROWS)
    keys_BS = queries.sample(size)
    cut_B = torch.empty_like(queries.slope)
    block = triton.next_power_of_2(size)
    kernels.set_cuts[(len(cut_B),)](
        keys_BS, cut_B, threshold if given else cut_B, queries.slope, queries.absolute,
        queries.norm, size, 0 if given else _sample_rank(K, size, N),
        GIVEN=given, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return cut_B


def _candidates(
    queries: _Queries, K: int, cut_B: Tensor, threshold: Tensor | None, values: bool
) -> tuple[Tensor, Tensor]:
    """Lists [B, C] that hold each query's K best, with their lengths [B, NUMBER_STRIDE]."""
    (B, _), N, device = queries.exact.shape, len(queries.bank), queries.bank.device
    C = triton.next_power_of_2(min(max(4 * K, LEAST_PLACES), N + WHOLE_TILE_ROWS))
    list_BC = torch.empty(B, C, dtype=torch.int64, device=device)
    number_B = torch.zeros(B, kernels.NUMBER_STRIDE.value, dtype=torch.int32, device=device)
    edge_2B = torch.empty(2, B, device=device)
    given = threshold is not None
    limit_B = threshold if threshold is not None else cut_B
    source, shape, block = queries.source, queries.shape, min(LIST_BLOCK, C)
    programs = min(triton.cdiv(N, queries.tile), 2 * processors(device))
    kernels.collect[(programs, triton.cdiv(B, queries.block_B))](
        queries.low, source, cut_B, list_BC, number_B, queries.norm, B, N, C, source.stride(0),
        TILE=queries.tile, BLOCK_B=queries.block_B, WIDE=queries.wide, **shape, num_warps=8,
    )  # fmt: skip
    kernels.judge[(B,)](
        list_BC, number_B, queries.norm, cut_B, limit_B, queries.slope, queries.absolute,
        edge_2B[0], edge_2B[1], torch.finfo(queries.low.dtype).max, C, K, GIVEN=given,
        RESCORE_ALL=values, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    kernels.rescore[(B, min(RESCORE_PROGRAMS, triton.cdiv(C, 64)))](
        queries.exact, queries.bank, list_BC, number_B, edge_2B[0], edge_2B[1], limit_B, C,
        queries.bank.stride(0), GIVEN=given, TILE=max(8, 8192 // queries.block_D), **shape,
        num_warps=4,
    )  # fmt: skip
    kernels.search_whole[(B,)](
        queries.exact, queries.bank, list_BC, number_B, limit_B, N, C, K, queries.bank.stride(0),
        GIVEN=given, TILE=min(WHOLE_TILE_ROWS, 32768 // queries.block_D), BLOCK=block, **shape,
        num_warps=16,
    )  # fmt: skip
    return list_BC, number_B


def _sample_rank(count: int, size: int, rows: int) -> int:
    """Which of S sampled similarities, counted from the largest, surely is not above the K-th of N.

    K S / N of the sample are expected among the K best; SPARE deviations of that count are added,
    none where the sample is everything.
    """
    expected = count * size / rows
    spare = SPARE * math.sqrt(expected * max(0.0, 1 - size / rows))
    return min(size, math.ceil(expected + spare + (size < rows)))


def _warps(block: int) -> int:
    """Warps of a program that holds ``block`` numbers: some sixteen a thread."""
    return max(1, min(32, block // 512))


def _check(embedding: Tensor, bank: Tensor, bank_low: Tensor | None) -> None:
    D = bank.shape[1]
    if embedding.shape[1] != D:
        raise UserError(
            "TODO", f"the embeddings have {embedding.shape[1]} numbers and the bank's rows {D}"
        )
    if D > MAX_DIM:
        raise UserError(
            "TODO",
            f"the GPU's neighbor search takes embeddings of at most {MAX_DIM} numbers, not {D}:"
            " choose the torch engine",
        )
    if bank.dtype not in _DTYPES:
        raise UserError(
            "TODO", f"a bank is float32, bfloat16 or float16 on a GPU, not {bank.dtype}"
        )
    if bank_low is not None and (bank_low.shape != bank.shape or bank_low.dtype not in _UNIT):
        raise UserError(
            "TODO",
            f"the bank's low copy is float16 or bfloat16 {list(bank.shape)}, not {bank_low.dtype}"
            f" {list(bank_low.shape)}",
        )
    for rows in (bank, bank_low):
        if rows is not None and rows.stride(1) != 1:
            raise UserError("TODO", "a bank's rows must be contiguous: call .contiguous() on it")
