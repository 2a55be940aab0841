"""Nearest rows, and sums over rows, in plain torch: any device, any dtype, in tiles."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import SETTINGS
from .searchable_bank import SearchableBank
from .thread_pool import in_threads

_CUDA_BAG_ROWS = 128  # a block of embedding_bag walks the rows of a bag one after another


@torch.no_grad()
def nearest(queries: Tensor, rows_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See :func:`~localagg.engine.search.nearest`; similarities in the inputs' common dtype, at
    least float32.

    The products of equal rows may differ in the last bit if they stand at different places of a
    tile. That bit then decides between them.
    """
    sim_dtype = torch.promote_types(
        torch.promote_types(queries.dtype, rows_ND.dtype), torch.float32
    )
    queries = queries.to(sim_dtype)
    width = SETTINGS.torch_tile_bytes // (max(1, len(queries)) * queries.element_size())
    starts = range(0, len(rows_ND), max(1, width, 2 * k))

    def product(start: int) -> Tensor:
        return queries @ rows_ND[start : start + starts.step].to(sim_dtype).T

    if k >= len(rows_ND) or not len(queries):
        k = min(k, len(rows_ND))
        rows_Bk = torch.arange(k, device=rows_ND.device).expand(len(queries), -1)
        return rows_Bk, queries @ rows_ND[:k].to(sim_dtype).T

    # One more than k: equal k-th and (k+1)-th values reveal a tie at the boundary.
    sim_Bk, rows_Bk = queries.new_empty(len(queries), 0), torch.empty(0)
    for start in starts:
        sim, rows = product(start), None
        if start:
            sim, rows = _above(sim, sim_Bk.amin(dim=1, keepdim=True), start, k + 1)
            sim, rows = torch.cat([sim_Bk, sim], dim=1), torch.cat([rows_Bk, rows], dim=1)
        best = sim.topk(min(k + 1, sim.shape[1]), dim=1, sorted=False)
        sim_Bk = best.values
        rows_Bk = best.indices if rows is None else rows.gather(1, best.indices)
    lowest = sim_Bk.topk(2, dim=1, largest=False)
    kept = torch.ones_like(sim_Bk, dtype=torch.bool).scatter_(1, lowest.indices[:, :1], False)
    sim_Bk, rows_Bk = sim_Bk[kept].view(-1, k), rows_Bk[kept].view(-1, k)
    tied = (lowest.values[:, 0] == lowest.values[:, 1]).nonzero().squeeze(1)
    if len(tied):
        _resolve_ties(product, starts, tied, lowest.values[tied, 1:], sim_Bk, rows_Bk)
    return rows_Bk, sim_Bk


def _above(sim: Tensor, least: Tensor, start: int, most: int) -> tuple[Tensor, Tensor]:
    """Return a tile's similarities [B, m] above ``least`` [B, 1], NaN included, and their rows.
    Free places hold -inf and -1; of too many, the best ``most``."""
    query, place, column, count_B = _list_true(~(sim <= least))
    if int(count_B.max()) > most:
        best = sim.topk(most, dim=1, sorted=False)
        return best.values, best.indices + start
    rows, sim = _fill_lists((place + start, sim[query, place]), query, column, count_B)
    return sim, rows


def compact_lists(rows: Tensor, similarity: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`~localagg.engine.search.compact_lists`."""
    query, place, column, count_B = _list_true(kept)
    return _fill_lists((rows[query, place], similarity[query, place]), query, column, count_B)


def _list_true(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the query, the place and the rank within its query of each true value of a [B, K]
    mask, in order, and the number of true values of each query [B]."""
    flat = flatnonzero(mask.flatten())
    query = flat.div(max(1, mask.shape[1]), rounding_mode="floor")
    count_B = torch.bincount(query, minlength=len(mask))
    column = torch.arange(len(flat), device=flat.device) - (count_B.cumsum(0) - count_B)[query]
    return query, flat - query * mask.shape[1], column, count_B


def _fill_lists(
    values: tuple[Tensor, Tensor], query: Tensor, column: Tensor, count_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Return rows and similarities as lists [B, longest]; free places hold -1 and -inf."""
    shape = len(count_B), int(count_B.max()) if len(count_B) else 0
    rows, sim = values[0].new_full(shape, -1), values[1].new_full(shape, -torch.inf)
    rows[query, column], sim[query, column] = values
    return rows, sim


def flatnonzero(mask: Tensor) -> Tensor:
    """Return the indices of a flat mask's true values, int64."""
    if mask.device.type == "cpu":  # numpy takes a tenth of torch's time
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().squeeze(1)


def _resolve_ties(
    product: Callable[[int], Tensor],
    starts: range,
    tied: Tensor,
    kth_T1: Tensor,
    sim_Bk: Tensor,
    rows_Bk: Tensor,
) -> None:
    """Replace the rows that tie at the k-th place by the lowest such rows, in a second pass."""
    left_T1 = (sim_Bk[tied] == kth_T1).sum(dim=1, keepdim=True)  # places of the tied rows
    found = []
    for start in starts:
        equal_TW = product(start)[tied] == kth_T1
        equal_TW &= equal_TW.cumsum(dim=1, dtype=torch.int32) <= left_T1
        left_T1 = left_T1 - equal_TW.sum(dim=1, keepdim=True)
        query, row = equal_TW.nonzero(as_tuple=True)
        found.append(torch.stack([query, row + start]))
    query, row = torch.cat(found, dim=1)
    row = row[query.sort(stable=True).indices]
    places = sim_Bk[tied] == kth_T1
    rows_T = rows_Bk[tied]
    rows_T[places] = row
    rows_Bk[tied] = rows_T


def sample_threshold(queries: Tensor, bank: SearchableBank, rank: int, sample: int) -> Tensor:
    """See :func:`~localagg.engine.search.sample_threshold`."""
    sim_BT = (queries.to(bank.product_dtype) @ bank.sample_rows(sample).T).to(queries.dtype)
    if sim_BT.device.type == "cpu":  # numpy's partition takes a fraction of topk's time
        place = sample - rank
        return torch.from_numpy(np.partition(sim_BT.numpy(), place, axis=1)[:, place].copy())
    return sim_BT.topk(rank, dim=1, sorted=False).values.amin(dim=1)


def similarities(embedding: Tensor, bank: Tensor, rows: Tensor) -> Tensor:
    """Return v_i . M_j [B, K] of listed rows j, in the embedding's dtype."""
    step = _query_step(rows, bank)
    parts = [
        torch.bmm(bank[rows_bK].to(embedding.dtype), v_bD.unsqueeze(2)).squeeze(2)
        for rows_bK, v_bD in zip(rows.split(step), embedding.split(step), strict=True)
    ]
    return torch.cat(parts)


def weigh_rows(bank: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Return sum_k weight_ik M_[rows_ik] [B, D], in the weights' dtype."""
    if bank.dtype == weight.dtype:
        B, K = rows.shape
        each = _CUDA_BAG_ROWS if rows.device.type == "cuda" else K
        starts = torch.arange(0, K, each, device=rows.device)
        lines = torch.arange(B, device=rows.device).unsqueeze(1) * K
        offsets = (lines + starts).flatten()
        options = {"per_sample_weights": weight.flatten(), "mode": "sum"}
        sums = F.embedding_bag(rows.flatten(), bank, offsets, **options)
        return sums.view(B, len(starts), -1).sum(dim=1)
    step = _query_step(rows, bank)
    parts = [
        torch.bmm(w_bK.unsqueeze(1), bank[rows_bK].to(weight.dtype)).squeeze(1)
        for rows_bK, w_bK in zip(rows.split(step), weight.split(step), strict=True)
    ]
    return torch.cat(parts)


def exponential_sums(
    similarity: Tensor, inside: Tensor, largest: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """See ``search.exponential_sums``."""
    top_B = similarity.amax(dim=1) if largest is None else largest
    weight_BC = ((similarity - top_B.unsqueeze(1)) / temperature).exp_()
    dtype = similarity.dtype if similarity.device.type == "mps" else torch.float64  # mps has none
    inside_B = (weight_BC * inside).sum(dim=1, dtype=dtype)
    outside_B = (weight_BC * ~inside).sum(dim=1, dtype=dtype)
    return weight_BC, torch.stack([inside_B, outside_B])


def _query_step(rows: Tensor, bank: Tensor) -> int:
    """Return the number of queries whose gathered rows fit a tile."""
    return max(1, SETTINGS.torch_tile_bytes // (4 * max(1, rows.shape[1]) * bank.shape[1]))


def log_partition(
    embedding: Tensor, bank: Tensor, temperature: float, tile_bytes: int
) -> tuple[Tensor, Tensor]:
    """Return log sum_j exp(v . M_j / t) [B] and the softmax-weighted mean row [B, D]."""
    query_BD = embedding / temperature
    tile = max(1, tile_bytes // (max(1, len(query_BD)) * query_BD.element_size()))
    if bank.device.type == "cpu":
        parts = in_threads(lambda part: _partial_softmax(query_BD, bank, part, tile), len(bank))
    else:
        parts = [_partial_softmax(query_BD, bank, range(len(bank)), tile)]
    max_PB1, sum_PB1, mean_PBD = (torch.stack(each) for each in zip(*parts, strict=True))
    max_B1 = max_PB1.amax(dim=0)
    share_PB1 = torch.exp(max_PB1 - max_B1)
    sum_B1 = (sum_PB1 * share_PB1).sum(dim=0)
    mean_BD = (mean_PBD * share_PB1).sum(dim=0) / sum_B1
    return (max_B1 + sum_B1.log()).squeeze(1), mean_BD


def _partial_softmax(
    query_BD: Tensor, bank: Tensor, part: range, tile: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest exponent of a part of the bank, and its sums of weights and rows."""
    max_B1 = query_BD.new_full((len(query_BD), 1), -torch.inf)
    sum_B1, mean_BD = torch.zeros_like(max_B1), torch.zeros_like(query_BD)
    for start in range(part.start, part.stop, tile):
        rows_TD = bank[start : min(part.stop, start + tile)].to(query_BD.dtype)
        sim_BT = query_BD @ rows_TD.T
        new_max_B1 = torch.maximum(max_B1, sim_BT.amax(dim=1, keepdim=True))
        shrink_B1 = torch.exp(max_B1 - new_max_B1)
        weight_BT = sim_BT.sub_(new_max_B1).exp_()
        sum_B1 = sum_B1 * shrink_B1 + weight_BT.sum(dim=1, keepdim=True)
        mean_BD = torch.addmm(mean_BD * shrink_B1, weight_BT, rows_TD)
        max_B1 = new_max_B1
    return max_B1, sum_B1, mean_BD
