"""Exact nearest rows for the price of a coarse pass: bfloat16 says who may be near, float32 who is.

For each query a similarity is guessed that its k-th neighbor should reach, from a sample of the
bank. One product in the coarse type then marks every row that may reach the guess: the errors of
rounding are bounded by the lengths of what rounding took away. Only the marked ones are computed in
float32. If k of them reach the guess, then no row outside can be among the k nearest; if not (the
sample misled, or too many rows are alike), the query is answered by the whole product.
"""

import math
import warnings

import numpy as np
import torch
from torch import Tensor

from .objectives import background_neighbors

_SPACING, _GROUP = 16, 8  # every 16th row is in the sample, the best of every 8 of which counts
_TILE_BYTES = 16 << 20  # coarse similarities held at a time
_MARKS = 64 << 20  # (query, row) pairs marked at a time
_LEAST = 128  # queries at a time: fewer would wait for the bank to be read
_WORTH = 4096  # below so many rows the whole product costs less
_CROWD = 8  # times k rows (and 1,024) marked for a query: then the whole product costs less
_ROW_BITS, _QUERY_BITS = 20, 11  # of a sorting key; the 32 bits of a float32 make it 63
_LARGEST = 0x7FFFFFFF  # int32


def nearest_in_order(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k rows with the largest dot product by the whole product, in tiles of the bank.

    Args:
        queries: [B, D].
        bank: [N, D].
        k: 1 to N.

    Returns:
        (rows, similarity): int64 and float [B, k], most similar first, ties by the lowest row.
    """
    rows_Bk, sim_Bk = background_neighbors(queries, bank, k)
    rows_Bk, by_row = rows_Bk.sort(dim=1)
    sim_Bk, by_sim = torch.sort(sim_Bk.gather(1, by_row), dim=1, descending=True, stable=True)
    return rows_Bk.gather(1, by_sim), sim_Bk


class Shortlist:
    """The k most similar rows of a bank for batches of queries: what :func:`nearest_in_order`
    gives, in less time, on a CPU.

    Beside the bank it holds a coarse copy of it, 64 MiB of marks and 16 MiB of similarities.

    Args:
        bank: float32 [N, D] on the CPU.
        coarse: type of the first pass. None: bfloat16 where the processor multiplies it, else
            float32.

    Attributes:
        batch: how many queries should come at a time.
    """

    def __init__(self, bank: Tensor, coarse: torch.dtype | None = None) -> None:
        self.bank, self.coarse_type = bank, coarse or _coarse_type()
        self.coarse, error_N = _rounded(bank, self.coarse_type)
        sampled = self.coarse[::_SPACING]
        self.sample = sampled[: max(1, len(sampled) // _GROUP) * _GROUP].contiguous()
        self.error, self.longest = error_N.max(), bank.norm(dim=1).max()
        self.batch = min(max(_LEAST, _MARKS // len(bank)), 1 << _QUERY_BITS)
        # Held from batch to batch: fresh memory of this size costs as much as the product.
        self._tile = torch.empty(_TILE_BYTES // self.coarse.element_size(), dtype=self.coarse_type)
        self._marks = torch.empty(_MARKS, dtype=torch.bool)

    @staticmethod
    def pays(bank: Tensor, k: int) -> bool:
        """Whether a shortlist of k rows is the quicker way with this bank."""
        fitting = bank.device.type == "cpu" and bank.dtype == torch.float32
        return fitting and len(bank) >= max(_WORTH, 16 * k)

    @torch.no_grad()
    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Rows and similarities in order.

        Args:
            queries: float32 [B, D], finite, at most 2,048 of them.
            k: 1 to N.

        Returns:
            (rows, similarity): int64 and float32 [B, k], most similar first, ties by the lowest
            row.
        """
        coarse, error_B = _rounded(queries, self.coarse_type)
        guess_B = self._guess(coarse, k)
        cut_B1 = (guess_B - self._margin(queries, error_B, guess_B)).unsqueeze(1)
        cut_B1 = cut_B1.to(self.coarse_type)
        width = min(len(self._marks) // max(1, len(queries)), 1 << _ROW_BITS)
        rows_Bk = torch.empty(len(queries), 0, dtype=torch.int64)
        sim_Bk = queries.new_empty(len(queries), 0)
        for start in range(0, len(self.bank), width):
            part = slice(start, start + width)
            marks_BT = self._mark(coarse, cut_B1, part).numpy()
            if np.count_nonzero(marks_BT) > len(queries) * max(1024, _CROWD * k):
                return nearest_in_order(queries, self.bank, k)
            new_Bk, new_sim_Bk = _best(queries, self.bank[part], marks_BT, k)
            rows_Bk = torch.cat([rows_Bk, new_Bk + start], dim=1)
            sim_Bk = torch.cat([sim_Bk, new_sim_Bk], dim=1)
            if start:  # the rows of earlier parts are lower: a stable sort puts the lowest first
                sim_Bk, order = torch.sort(sim_Bk, dim=1, descending=True, stable=True)
                rows_Bk, sim_Bk = rows_Bk.gather(1, order[:, :k]), sim_Bk[:, :k]
        misled = (~(sim_Bk[:, -1] >= guess_B)).nonzero().squeeze(1)
        if len(misled):
            rows_Bk[misled], sim_Bk[misled] = nearest_in_order(queries[misled], self.bank, k)
        return rows_Bk, sim_Bk

    def _guess(self, coarse: Tensor, k: int) -> Tensor:
        """A similarity [B] that some more than k rows should reach.

        The bests of groups stand for the sample: they miss the few that share a group with a
        better one, which only lowers the guess.
        """
        share = k * len(self.sample) / len(self.bank)
        count = math.ceil(share + 3 * math.sqrt(share) + 1)  # 3 deviations of the sample's luck
        best_BG = (coarse @ self.sample.T).unflatten(1, (_GROUP, -1)).amax(dim=1).float()
        return best_BG.topk(min(count, best_BG.shape[1]), dim=1).values[:, -1]

    def _margin(self, queries: Tensor, error_B: Tensor, guess_B: Tensor) -> Tensor:
        """How far [B] a coarse similarity can lie below the true one, near the guess.

        |q.b - q'.b'| <= |q - q'| |b| + |q'| |b - b'|; then half a step of rounding for the product
        and half a step for the cut, and the sums of D products in float32.
        """
        length_B = queries.norm(dim=1)
        margin_B = error_B * self.longest + (length_B + error_B) * self.error
        margin_B += torch.finfo(self.coarse_type).eps * (guess_B.abs() + margin_B)
        sums = queries.shape[1] * torch.finfo(torch.float32).eps
        return margin_B * (1 + 2**-6) + sums * length_B * self.longest

    def _mark(self, coarse: Tensor, cut_B1: Tensor, part: slice) -> Tensor:
        """Which rows of a part of the bank reach the cut: bool [B, T], in the held memory."""
        bank, batch = self.coarse[part], len(coarse)
        marks_BT = self._marks[: batch * len(bank)].view(batch, len(bank))
        # bfloat16 numbers above a positive one are so by their bits too, and these compare faster.
        bits = self.coarse_type == torch.bfloat16 and bool((cut_B1 > 0).all())
        width = max(1, len(self._tile) // batch)
        for start in range(0, len(bank), width):
            rows = bank[start : start + width]
            sim_BW = self._tile[: batch * len(rows)].view(batch, len(rows))
            torch.mm(coarse, rows.T, out=sim_BW)
            marks_BW = marks_BT[:, start : start + width]
            if bits:
                sim, cut = (x.view(torch.int16).numpy() for x in (sim_BW, cut_B1))
                np.greater_equal(sim, cut, out=marks_BW.numpy())
            else:
                torch.ge(sim_BW, cut_B1, out=marks_BW)
        return marks_BT


def _best(queries: Tensor, bank: Tensor, marks: np.ndarray, k: int) -> tuple[Tensor, Tensor]:
    """The k best of the marked rows in order, with their similarities, [B, k]; where fewer are
    marked the rest is some row with -inf."""
    batch, size = marks.shape
    marked = np.flatnonzero(marks)
    first_B = np.searchsorted(marked, np.arange(batch + 1) * size)  # where each query's begin
    query = np.repeat(np.arange(batch), np.diff(first_B))
    row = marked - query * size
    falling = _LARGEST - _ordered(_products(queries, bank, first_B, row))
    # One sort for all queries: by query, then most similar first, then lowest row.
    key = (query << (32 + _ROW_BITS)) | (falling << _ROW_BITS) | row
    key.sort()
    place = first_B[:-1, None] + np.arange(k)
    there = torch.from_numpy(place < first_B[1:, None])
    best_Bk = np.append(key, 0)[np.minimum(place, len(key))]
    sim_Bk = _unordered(_LARGEST - ((best_Bk >> _ROW_BITS) & 0xFFFFFFFF))
    rows_Bk = torch.from_numpy(best_Bk & ((1 << _ROW_BITS) - 1))
    return rows_Bk, torch.from_numpy(sim_Bk).masked_fill(~there, -torch.inf)


def _ordered(values: np.ndarray) -> np.ndarray:
    """float32 as int64 in the same order: the bits, of negative numbers turned around."""
    bits = values.view(np.int32)
    return (bits ^ ((bits >> 31) & np.int32(_LARGEST))).astype(np.int64)


def _unordered(ordered: np.ndarray) -> np.ndarray:
    """The float32 of :func:`_ordered`."""
    bits = ordered.astype(np.int32)
    return (bits ^ ((bits >> 31) & np.int32(_LARGEST))).view(np.float32)


def _products(queries: Tensor, bank: Tensor, first: np.ndarray, row: np.ndarray) -> np.ndarray:
    """q_i . b_j in float32 for the listed pairs: query i has ``row[first[i]:first[i + 1]]``."""
    places, rows = torch.from_numpy(first), torch.from_numpy(row)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        pairs = torch.sparse_csr_tensor(
            places, rows, torch.zeros(len(row)), (len(queries), len(bank)), check_invariants=False
        )
    return torch.sparse.sampled_addmm(pairs, queries, bank.T, beta=0.0).values().numpy()


def _rounded(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows in a coarser type, and the length [N] of what rounding took from each."""
    coarse = torch.empty_like(rows, dtype=dtype)
    error = rows.new_empty(len(rows))
    for start in range(0, len(rows), 1 << 14):
        span = slice(start, start + (1 << 14))
        coarse[span] = rows[span]
        error[span] = (rows[span] - coarse[span].to(rows.dtype)).norm(dim=1)
    return coarse, error


def _coarse_type() -> torch.dtype:
    """bfloat16 where the processor multiplies it, else float32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # no public query exists
    fast = any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return torch.bfloat16 if fast else torch.float32
