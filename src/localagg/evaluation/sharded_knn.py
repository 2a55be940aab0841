"""Nearest neighbors, and accuracy by them, in a bank that is split over ranks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..bank import MemoryBank
from ..distributed.collectives import World
from . import knn
from .knn_queries import EmbeddedQueries

_BATCH = 8192  # queries at a time


class ShardedRows(NamedTuple):
    """Rows that are split over ranks, as a bank's are."""

    rows: Tensor
    """[n, D], those of this rank."""
    part: range
    """Indices of these rows among all."""
    size: int
    """N, rows of all ranks."""


@torch.no_grad()
def nearest_rows(
    world: World,
    queries: Tensor,
    bank: MemoryBank | ShardedRows,
    k: int,
    *,
    exclude: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the k most similar rows of the whole bank, as ``knn.nearest_rows``.

    Each rank finds its own k, and all ranks merge them. Collectives: two all-gathers of Q x k
    values, (e + 8) Q k bytes a rank.

    Args:
        world: the ranks.
        queries: unit rows [Q, D], the same on every rank.
        bank: this rank's rows.
        k: at most N (N - 1 with ``exclude``).
        exclude: int64 [Q], one row of the whole bank that each query must not find (itself).

    Returns:
        (rows, similarity): int64 and float [Q, k], the same on every rank.

    Raises:
        UserError: k exceeds the rows, or values are not finite.
    """
    most = k + (exclude is not None)
    knn.check_neighbors(k, bank.size - (exclude is not None))
    sim_Qk = queries.new_full((len(queries), most), -torch.inf)
    rows_Qk = torch.full_like(sim_Qk, bank.size, dtype=torch.int64)
    here = min(most, len(bank.rows))
    if here:
        rows, sim_Qk[:, :here] = knn.nearest_rows(queries, bank.rows, here)
        rows_Qk[:, :here] = rows + bank.part.start
    # Ranks stand in the order of their rows, so a stable sort leaves the lowest first among equals.
    sim_QC = world.stack(sim_Qk).transpose(0, 1).flatten(1)
    rows_QC = world.stack(rows_Qk).transpose(0, 1).flatten(1)
    if exclude is not None:
        sim_QC = sim_QC.masked_fill(rows_QC == exclude.unsqueeze(1), -torch.inf)
    sim_QC, place_QC = sim_QC.sort(dim=1, descending=True, stable=True)
    return rows_QC.gather(1, place_QC[:, :k]), sim_QC[:, :k]


def sharded_accuracy(
    world: World, embedded: EmbeddedQueries, part: range, k: Sequence[int]
) -> dict[str, float]:
    """Return ``knn.knn_accuracy`` over ranks, the same on every rank.

    Args:
        world: the ranks.
        embedded: its bank holds this rank's rows; the rest is the same on every rank.
        part: indices of these rows among the N reference rows.
        k: numbers of neighbors.

    Raises:
        UserError: values that are not finite.
    """
    queries, query_labels, rows, bank_labels, exclude = embedded
    bank = ShardedRows(rows, part, len(bank_labels))
    most = min(max(k), bank.size - (exclude is not None))
    classes = int(bank_labels.max()) + 1
    right = dict.fromkeys(k, 0)
    for start in range(0, len(queries), _BATCH):
        batch = slice(start, start + _BATCH)
        itself = None if exclude is None else exclude[batch]
        found, similarity = nearest_rows(world, queries[batch], bank, most, exclude=itself)
        winners = knn.vote(bank_labels[found], similarity, k, classes)
        for count in k:
            right[count] += int((winners[count] == query_labels[batch]).sum())
    return {f"knn{count}": right[count] / len(queries) for count in k}
