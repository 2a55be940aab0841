"""The rows of a memory bank that one rank holds, and the search in the rows of all ranks.

With R ranks each holds a contiguous range of the N rows. Queries are the same on every rank; each
rank scores them on its own rows. Nothing that grows with N or K goes over the wire. Payload bytes
that a rank hands to a collective (e = 4 in float32, 8 in float64; B queries, H clusterings)::

    nearest    2 all-reduces     (e + 8) B   a similarity threshold, and how many rows reach it
               1 all-reduce      3 e B       bounds of each query's K-th similarity
               1-6 all-reduces   256 B each  histograms (float64: 1-11), usually 5
               (1 all-gather     8 T         T queries with ties at their last place)
    labels_of  1 all-reduce      4 H B       labels of the batch's own rows

With K >= N all rows are neighbors: one all-reduce of e B replaces threshold, bounds and histograms.
Ranks with fewer than ``sampled_from`` rows search without a threshold. A query has about K / R
candidates on a rank, of some 30 bytes each.

Legend of shape suffixes: B queries, C candidates of this rank, D embedding size, H clusterings.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed.collectives import World
from ..distributed.differentiable import sum_over_ranks
from . import search, topk
from .searchable_bank import SearchableBank


class Neighbors(NamedTuple):
    """The nearest rows of each query, those that this rank holds, in no promised order."""

    rows: Tensor
    """int64 [B, C]: rows, counted from this rank's first. -1 in places that are not used."""
    similarity: Tensor
    """float [B, C]: their dot products with the query. -inf in places that are not used."""
    largest: Tensor | None
    """float [B]: the largest similarity on any rank; None if this rank holds all rows."""


class BankShard(NamedTuple):
    """The rows of a bank that this rank holds."""

    bank: SearchableBank
    """Rows [n, D]."""
    part: range
    """Their numbers among the N rows of all ranks."""
    size: int
    """N."""
    world: World
    sampled_from: int = 4096
    """Fewest rows a rank samples for a threshold."""
    deviations: float = 3
    """Sampling error that the threshold allows for, in standard deviations. With 2, one step in 20
    had to search twice."""

    @classmethod
    def whole(cls, bank: "Tensor | SearchableBank | BankShard") -> "BankShard":
        """Return a bank [N, D] as the only shard; a shard is returned as it is."""
        if isinstance(bank, BankShard):
            return bank
        if isinstance(bank, Tensor):
            bank = SearchableBank(bank, copy=False)
        return cls(bank, range(len(bank)), len(bank), World())

    @property
    def rows(self) -> Tensor:
        """The rows [n, D] of this rank."""
        return self.bank.rows

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks; each rank's gradient is that of its own term."""
        return sum_over_ranks(self.world, tensor)

    def local(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return (bool, int64), shaped as ``index``: whether this rank holds these rows of the
        whole bank, and their numbers counted from its first row (0 for those it lacks)."""
        here = (index >= self.part.start) & (index < self.part.stop)
        return here, (index - self.part.start).masked_fill(~here, 0)

    def similarity_to_own(self, query: Tensor, index: Tensor) -> Tensor:
        """Return v_i . M_i [B], differentiable in the query; 0 where another rank holds the row.

        Args:
            query: [B, D], at least float32.
            index: int64 [B], the row of each query in the whole bank.
        """
        if self.world.size == 1:
            return (query * self.rows[index].to(query.dtype)).sum(dim=1)
        if not len(self.rows):
            return (query * 0).sum(dim=1)
        here_B, row_B = self.local(index)
        return (query * self.rows[row_B].to(query.dtype)).sum(dim=1) * here_B

    def labels_of(self, labels: Tensor, index: Tensor) -> Tensor:
        """Return the labels [H, B] of rows of the whole bank.

        Args:
            labels: int [H, n], of this rank's rows.
            index: int64 [B].
        """
        if self.world.size == 1:
            return labels[:, index]
        own_HB = labels.new_zeros(len(labels), len(index))
        here_B, row_B = self.local(index)
        own_HB[:, here_B] = labels[:, row_B[here_B]]
        return self.world.sum(own_HB)

    def listed(self, index: Tensor) -> Tensor:
        """Return the rows among ``index`` [B, K] that this rank holds, counted from its first:
        [B, C], -1 in places that are not used."""
        if self.world.size == 1:
            return index
        here_BK, row_BK = self.local(index)
        return search.compact_lists(row_BK, torch.zeros_like(row_BK, dtype=torch.float32), here_BK)[
            0
        ]

    @torch.no_grad()
    def nearest(self, query: Tensor, k: int) -> Neighbors:
        """Return those of each query's K nearest rows of the whole bank that this rank holds.

        Equal similarities at the K-th place go to the lowest rows.

        Args:
            query: [B, D], the same on every rank.
            k: K >= 1; more than N gives all N rows.

        Raises:
            UserError: on a CPU, values that are not finite.
        """
        if self.world.size == 1:
            return Neighbors(*search.nearest(query, self.bank, k), None)
        if k >= self.size:
            rows_BC, sim_BC = self._candidates(query, k, None)
            top_B = query.new_full((len(query),), -torch.inf, dtype=sim_BC.dtype)
            top_B = sim_BC.amax(dim=1) if sim_BC.shape[1] else top_B
            return Neighbors(rows_BC, sim_BC, self.world.maximum(top_B))
        threshold_B = self._threshold(query, k)
        rows_BC, sim_BC = self._candidates(query, k, threshold_B)
        if threshold_B is not None:
            found_B = self.world.sum((rows_BC >= 0).sum(dim=1))
            if (short_B := found_B < k).any():  # the samples misled
                threshold_B[short_B] = -torch.inf
                rows_BC, sim_BC = self._candidates(query, k, threshold_B)
        low_B, top_B = topk.bounds(self.world, sim_BC, k)
        if threshold_B is not None:
            low_B = torch.maximum(low_B, threshold_B)
        chosen_BC = topk.largest(self.world, sim_BC, rows_BC, k, (low_B, top_B))
        return Neighbors(*search.compact_lists(rows_BC, sim_BC, chosen_BC), top_B)

    def _candidates(self, query: Tensor, k: int, at_least: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return this rank's K nearest rows, or those of them that reach ``at_least`` [B]."""
        if not len(self.rows):
            none = query.new_empty(len(query), 0)
            return none.long(), none
        return search.nearest(query, self.bank, k, at_least=at_least)

    def _threshold(self, query: Tensor, k: int) -> Tensor | None:
        """Return a similarity [B] that K rows of all ranks most likely reach; None for small banks.

        If K / R rows on every rank reach some similarity, K of all do. Each rank estimates its own
        from a sample of its rows, and the lowest estimate counts.
        """
        if self.size // self.world.size < self.sampled_from:
            return None
        n, wanted = len(self.rows), -(-k // self.world.size)
        count = min(n, max(self.sampled_from // 2, min(n // 16, 4 * self.sampled_from)))
        share = wanted * count / n
        rank = math.ceil(share + self.deviations * (math.sqrt(share) + 1))
        if rank > count:
            threshold_B = torch.full_like(query[:, 0], -torch.inf)
        else:
            threshold_B = search.sample_threshold(query, self.bank, rank, count).to(query.dtype)
        return -self.world.maximum(-threshold_B)
