"""The neighbor search on a GPU, in Triton: exact, for little more than a pass over the bank.

A search (:func:`top_rows`) is eight launches and never synchronizes with the host:

1. each query is rounded to the products' dtype, and the error of its products bounded;
2. products with a sample of the bank give each query a threshold that somewhat more than K rows
   should reach;
3. one pass over the bank by fp16 or bf16 tensor-core products lists the rows that reach it;
4. by the error bound each list is checked: does it surely contain the K best, and which candidates
   may be among them? Those are scored again in float32;
5. a query with an insufficient list (a misleading sample, or too many similar rows) is searched
   again by float32 products with the whole bank, by one program: some 10 ms for 1.28 million rows,
   with a probability below 1e-6 unless the rows' order is adversarial;
6. the K best of each list are taken.

Memory beyond bank and result, for any N: B x 4 x (S + 2 C) bytes, with the sample S = 32,768 and C
the power of two from 4 K on, at least 8,192. At B = 128, K = 4096: 16 MiB, freed, then 16 MiB.

Importing this module needs ``triton``. It also runs on the CPU under Triton's interpreter
(``TRITON_INTERPRET=1``), which tests it without a GPU.
"""

# Launches take options that a kernel's signature lacks.
# pyright: reportCallIssue=false

import math

import torch
import triton
from torch import Tensor
from triton import knobs

from ..errors import UserError
from . import SETTINGS
from . import cuda_search_kernels as kernels
from .cuda_loss_kernels import close_rows, log_partition, processors

__all__ = ["close_rows", "log_partition", "top_rows"]

MAX_DIM = 512  # a tile of longer rows does not fit beside its successors in shared memory
SAMPLE_DEVIATIONS = 5.0  # deviations of the sample's count that the threshold is lowered by
RESCORE_PROGRAMS = 16  # programs that score one query's candidates again

# |x - rounded x| <= unit |x|, and an absolute part below float16's smallest exponent.
_UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_TINY = {torch.float16: 2.0**-25, torch.bfloat16: 0.0}
# A sum of D products of two vectors errs by at most D times this times their norms. Float32 alone
# would need 2**-24; the rounding of tensor cores is documented less precisely.
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
) -> tuple[Tensor, Tensor]:
    """Return the K bank rows most similar to each query, exactly, in no particular order.

    A similarity is a float32 sum of products of the values as stored, in one order for all rows of
    a query. Ties at the K-th place go to the lowest row. NaN counts as the largest, as in
    ``torch.topk``, so that NaN in either input shows in the result. The order of a result, and so
    the last bits of sums over it, may differ from run to run, unless
    ``torch.use_deterministic_algorithms`` is on: then rows are sorted.

    Args:
        embedding: [B, D], any floating dtype; used in float32.
        bank: float32, bfloat16 or float16 [N, D] with contiguous rows, N below 2**31.
        count: K >= 1; more than N means all N.
        bank_low: ``bank`` rounded to float16 or bfloat16 [N, D], exactly as ``bank.to(dtype)``
            rounds: halves the bytes of the pass. float16 has the tighter bound on unit rows.
        threshold: float32 [B]: rows of lower similarity are not wanted. Free places hold row -1 and
            similarity -inf.

    Returns:
        (rows, similarity): int64 and float32 [B, min(K, N)].

    Raises:
        UserError: D above ``MAX_DIM``, or a dtype or layout that the kernels do not read.
    """
    _check(embedding, bank)
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
        queries = RoundedQueries(embedding, bank, bank_low)
        cut_B = _cuts(queries, K, threshold)
        list_BC, count_B = _candidates(queries, K, cut_B, threshold)
        block = min(SETTINGS.gpu_list_block, list_BC.shape[1])
        kernels.take_best[(B,)](
            list_BC, count_B, rows_BK, sim_BK, list_BC.shape[1], K,
            BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    if torch.are_deterministic_algorithms_enabled():
        rows_BK, order_BK = rows_BK.sort(dim=1)
        sim_BK = sim_BK.gather(1, order_BK)
    return rows_BK, sim_BK


class RoundedQueries:
    """A batch of queries rounded for products with one bank, with the bounds of their errors.

    Attributes:
        low: the rounded queries [B, D].
        slope, absolute: [B]; a product with a row of norm n errs by at most slope n + absolute.
        norm: int32 [1], bits of the largest squared norm of the bank rows read so far.
    """

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
        self.block_B = max(16, min(SETTINGS.gpu_query_block, triton.next_power_of_2(B)))
        self.shape = {"D": D, "BLOCK_D": self.block_D}
        self.tile = max(16, min(SETTINGS.gpu_tile_rows, 8192 // self.block_D))
        self.float32_dot = low == torch.bfloat16 and knobs.runtime.interpret
        kernels.prepare_queries[(B,)](
            self.exact, self.low, self.slope, self.absolute,
            _UNIT[low] if rounded else 0.0, D * _SUM_SLACK + self.tile * _PACKING_SLACK,
            math.sqrt(D) * _TINY[low], **self.shape, num_warps=1,
        )  # fmt: skip

    def sample_keys(self, size: int) -> Tensor:
        """Return keys of the products with sampled rows, int32 [B, size], and update ``norm``."""
        B = len(self.exact)
        keys_BS = torch.empty(B, size, dtype=torch.int32, device=self.bank.device)
        grid = (triton.cdiv(size, self.tile), triton.cdiv(B, self.block_B))
        kernels.score_sample[grid](
            self.low, self.source, keys_BS, self.norm, B, len(self.bank), size,
            self.source.stride(0), TILE=self.tile, BLOCK_B=self.block_B,
            FLOAT32_DOT=self.float32_dot, **self.shape, num_warps=8,
        )  # fmt: skip
        return keys_BS


def _cuts(queries: RoundedQueries, K: int, threshold: Tensor | None) -> Tensor:
    """Return the rounded similarity from which each query lists rows [B]."""
    N, given = len(queries.bank), threshold is not None
    # A given threshold still needs the rows' norm, for the expected error.
    size = min(N, queries.tile * 8 if given else SETTINGS.gpu_sample_rows)
    keys_BS = queries.sample_keys(size)
    cut_B = torch.empty_like(queries.slope)
    block = triton.next_power_of_2(size)
    kernels.set_cuts[(len(cut_B),)](
        keys_BS, cut_B, threshold if given else cut_B, queries.slope, queries.absolute,
        queries.norm, size, 0 if given else sample_rank(K, size, N),
        GIVEN=given, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return cut_B


def _candidates(
    queries: RoundedQueries, K: int, cut_B: Tensor, threshold: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return lists [B, C] that contain each query's K best, and their lengths [B, COUNT_STRIDE]."""
    (B, _), N, device = queries.exact.shape, len(queries.bank), queries.bank.device
    least = max(4 * K, SETTINGS.gpu_min_candidates)
    C = triton.next_power_of_2(min(least, N + SETTINGS.gpu_scan_rows))
    list_BC = torch.empty(B, C, dtype=torch.int64, device=device)
    count_B = torch.zeros(B, kernels.COUNT_STRIDE.value, dtype=torch.int32, device=device)
    edge_B = torch.empty(B, device=device)
    given = threshold is not None
    limit_B = threshold if threshold is not None else cut_B
    source, shape, block = queries.source, queries.shape, min(SETTINGS.gpu_list_block, C)
    programs = min(triton.cdiv(N, queries.tile), 2 * processors(device))
    kernels.collect[(programs, triton.cdiv(B, queries.block_B))](
        queries.low, source, cut_B, list_BC, count_B, queries.norm, B, N, C, source.stride(0),
        TILE=queries.tile, BLOCK_B=queries.block_B, FLOAT32_DOT=queries.float32_dot, **shape,
        num_warps=8,
    )  # fmt: skip
    kernels.check_lists[(B,)](
        list_BC, count_B, queries.norm, cut_B, limit_B, queries.slope, queries.absolute,
        edge_B, torch.finfo(queries.low.dtype).max, C, K, GIVEN=given,
        BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    kernels.rescore[(B, min(RESCORE_PROGRAMS, triton.cdiv(C, 64)))](
        queries.exact, queries.bank, list_BC, count_B, edge_B, limit_B, C,
        queries.bank.stride(0), GIVEN=given, TILE=max(8, 8192 // queries.block_D), **shape,
        num_warps=4,
    )  # fmt: skip
    kernels.search_all_rows[(B,)](
        queries.exact, queries.bank, list_BC, count_B, limit_B, N, C, K, queries.bank.stride(0),
        GIVEN=given, TILE=min(SETTINGS.gpu_scan_rows, 32768 // queries.block_D), BLOCK=block,
        **shape, num_warps=16,
    )  # fmt: skip
    return list_BC, count_B


def sample_rank(count: int, size: int, rows: int) -> int:
    """Return the rank, among S sampled similarities, that lies at or below the K-th of N rows.

    K S / N of the sample are expected among the K best; ``SAMPLE_DEVIATIONS`` of that count are
    added, none if the sample is everything. The probability that it lies above is below 1e-6.
    """
    expected = count * size / rows
    spare = SAMPLE_DEVIATIONS * math.sqrt(expected * max(0.0, 1 - size / rows))
    return min(size, math.ceil(expected + spare + (size < rows)))


def _warps(block: int) -> int:
    """Return the warps of a program that holds ``block`` numbers: some sixteen a thread."""
    return max(1, min(32, block // 512))


def _check(embedding: Tensor, bank: Tensor) -> None:
    D = bank.shape[1]
    if embedding.shape[1] != D:
        message = f"The queries have {embedding.shape[1]} dimensions and the bank's rows {D}."
        raise UserError("mismatch", message)
    if D > MAX_DIM:
        message = f"The GPU search supports at most {MAX_DIM} dimensions, not {D}; search on a CPU."
        raise UserError("too-large", message)
    if bank.dtype not in _DTYPES:
        message = f"The GPU search reads float32, bfloat16 and float16 banks, not {bank.dtype}."
        raise UserError("unsupported", message)
    if bank.stride(1) != 1:
        raise UserError("unsupported", "The bank's rows must be contiguous; call .contiguous().")
