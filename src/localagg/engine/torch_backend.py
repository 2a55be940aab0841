"""Nearest rows, and sums over them, in plain torch: any device, any type, tiles of the product."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .searchable_bank import SearchableBank
from .thread_pool import in_threads

# Similarities held at a time: the top-k has a cost a tile and wants long ones.
TILE_BYTES = 32 << 20


@torch.no_grad()
def nearest(queries: Tensor, rows_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As ``search.nearest``; similarities in the common type of both, at least float32.

    Equal rows may differ in the last bit of their products, where these come from other places of
    a tile; such a tie is settled by that bit.
    """
    sim_type = torch.promote_types(torch.promote_types(queries.dtype, rows_ND.dtype), torch.float32)
    queries = queries.to(sim_type)
    width = TILE_BYTES // (max(1, len(queries)) * queries.element_size())
    starts = range(0, len(rows_ND), max(1, width, 2 * k))

    def product(start: int) -> Tensor:
        return queries @ rows_ND[start : start + starts.step].to(sim_type).T

    if k >= len(rows_ND) or not len(queries):
        k = min(k, len(rows_ND))
        rows_Bk = torch.arange(k, device=rows_ND.device).expand(len(queries), -1)
        return rows_Bk, queries @ rows_ND[:k].to(sim_type).T

    # One more than asked for: equal k-th and (k+1)-th values betray a tie across the boundary.
    sim_Bk, rows_Bk = queries.new_empty(len(queries), 0), torch.empty(0)
    for start in starts:
        sim, rows = product(start), None
        if start:  # what is no better than all so far needs no place
            sim, rows = _better(sim, sim_Bk.amin(dim=1, keepdim=True), start, k + 1)
            sim, rows = torch.cat([sim_Bk, sim], dim=1), torch.cat([rows_Bk, rows], dim=1)
        best = sim.topk(min(k + 1, sim.shape[1]), dim=1, sorted=False)
        sim_Bk = best.values
        rows_Bk = best.indices if rows is None else rows.gather(1, best.indices)
    lowest = sim_Bk.topk(2, dim=1, largest=False)
    kept = torch.ones_like(sim_Bk, dtype=torch.bool).scatter_(1, lowest.indices[:, :1], False)
    sim_Bk, rows_Bk = sim_Bk[kept].view(-1, k), rows_Bk[kept].view(-1, k)
    tied = (lowest.values[:, 0] == lowest.values[:, 1]).nonzero().squeeze(1)
    if len(tied):
        _settle(product, starts, tied, lowest.values[tied, 1:], sim_Bk, rows_Bk)
    return rows_Bk, sim_Bk


def _better(sim: Tensor, least: Tensor, start: int, most: int) -> tuple[Tensor, Tensor]:
    """The similarities [B, m] of a tile that are not at most ``least`` [B, 1] (NaN is not), and
    their rows; -inf and -1 where a query has fewer, and the best of too many."""
    kept = ~(sim <= least)
    line, place, column, count_B = _listed(kept)
    if int(count_B.max()) > most:
        best = sim.topk(most, dim=1, sorted=False)
        return best.values, best.indices + start
    rows, sim = _placed((place + start, sim[line, place]), line, column, count_B)
    return sim, rows


def compact_lists(rows: Tensor, similarity: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """As ``search.compact_lists``."""
    line, place, column, count_B = _listed(kept)
    return _placed((rows[line, place], similarity[line, place]), line, column, count_B)


def _listed(kept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each true value of [B, K], in order: its line, its place there and how many of the line's
    come before it; and how many each line has [B]."""
    flat = flatnonzero(kept.flatten())
    line = flat.div(max(1, kept.shape[1]), rounding_mode="floor")
    count_B = torch.bincount(line, minlength=len(kept))
    column = torch.arange(len(flat), device=flat.device) - (count_B.cumsum(0) - count_B)[line]
    return line, flat - line * kept.shape[1], column, count_B


def _placed(
    listed: tuple[Tensor, Tensor], line: Tensor, column: Tensor, count_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Listed rows and similarities in lines as long as the longest; -1 and -inf in free places."""
    shape = len(count_B), int(count_B.max()) if len(count_B) else 0
    rows, sim = listed[0].new_full(shape, -1), listed[1].new_full(shape, -torch.inf)
    rows[line, column], sim[line, column] = listed
    return rows, sim


def flatnonzero(mask: Tensor) -> Tensor:
    """Where a flat mask is true: int64. On the CPU by numpy, which takes a tenth of the time."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().squeeze(1)


def _settle(
    product: Callable[[int], Tensor],
    starts: range,
    tied: Tensor,
    kth_T1: Tensor,
    sim_Bk: Tensor,
    rows_Bk: Tensor,
) -> None:
    """Put the lowest of the rows that tie at the k-th place there, by a second pass."""
    left_T1 = (sim_Bk[tied] == kth_T1).sum(dim=1, keepdim=True)  # places that the equal ones have
    found = []
    for start in starts:
        equal_TW = product(start)[tied] == kth_T1
        equal_TW &= equal_TW.cumsum(dim=1, dtype=torch.int32) <= left_T1
        left_T1 = left_T1 - equal_TW.sum(dim=1, keepdim=True)
        which, row = equal_TW.nonzero(as_tuple=True)
        found.append(torch.stack([which, row + start]))
    which, row = torch.cat(found, dim=1)
    row = row[which.sort(stable=True).indices]
    places = sim_Bk[tied] == kth_T1
    rows_T = rows_Bk[tied]
    rows_T[places] = row
    rows_Bk[tied] = rows_T


def sample_threshold(queries: Tensor, bank: SearchableBank, rank: int, sample: int) -> Tensor:
    """As ``search.sample_threshold``."""
    sim_BT = (queries.to(bank.product_dtype) @ bank.sample_rows(sample).T).to(queries.dtype)
    if sim_BT.device.type == "cpu":  # numpy's partition takes a fraction of the time of topk
        place = sample - rank
        return torch.from_numpy(np.partition(sim_BT.numpy(), place, axis=1)[:, place].copy())
    return sim_BT.topk(rank, dim=1, sorted=False).values.amin(dim=1)


def similarities(embedding: Tensor, bank: Tensor, rows: Tensor) -> Tensor:
    """v_i . M_j for listed rows j, in the embedding's type: [B, K]."""
    step = _queries_at_a_time(rows, bank)
    parts = [
        torch.bmm(bank[rows_bK].to(embedding.dtype), v_bD.unsqueeze(2)).squeeze(2)
        for rows_bK, v_bD in zip(rows.split(step), embedding.split(step), strict=True)
    ]
    return torch.cat(parts)


def weigh_rows(bank: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """sum_k weight_ik M_[rows_ik], in the weights' type: [B, D]."""
    if bank.dtype == weight.dtype:
        return F.embedding_bag(rows, bank, per_sample_weights=weight.contiguous(), mode="sum")
    step = _queries_at_a_time(rows, bank)
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
    sums = similarity.dtype if similarity.device.type == "mps" else torch.float64  # mps has none
    inside_B = (weight_BC * inside).sum(dim=1, dtype=sums)
    outside_B = (weight_BC * ~inside).sum(dim=1, dtype=sums)
    return weight_BC, torch.stack([inside_B, outside_B])


def _queries_at_a_time(rows: Tensor, bank: Tensor) -> int:
    return max(1, TILE_BYTES // (4 * max(1, rows.shape[1]) * bank.shape[1]))


def log_partition(
    embedding: Tensor, bank: Tensor, temperature: float, tile_bytes: int
) -> tuple[Tensor, Tensor]:
    """log sum_j exp(v . M_j / t) [B], and the mean row weighted by the softmax [B, D]."""
    query_BD = embedding / temperature
    tile = max(1, tile_bytes // (max(1, len(query_BD)) * query_BD.element_size()))
    if bank.device.type == "cpu":
        parts = in_threads(lambda part: _partition(query_BD, bank, part, tile), len(bank))
    else:
        parts = [_partition(query_BD, bank, range(len(bank)), tile)]
    max_PB1, sum_PB1, mean_PBD = (torch.stack(each) for each in zip(*parts, strict=True))
    max_B1 = max_PB1.amax(dim=0)
    share_PB1 = torch.exp(max_PB1 - max_B1)
    sum_B1 = (sum_PB1 * share_PB1).sum(dim=0)
    mean_BD = (mean_PBD * share_PB1).sum(dim=0) / sum_B1
    return (max_B1 + sum_B1.log()).squeeze(1), mean_BD


def _partition(
    query_BD: Tensor, bank: Tensor, part: range, tile: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a part of the bank: the largest exponent, and the sums of weights and weighted rows."""
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
