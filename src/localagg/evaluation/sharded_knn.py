"""Nearest neighbors in a bank that is split over ranks, and accuracy by them."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..bank import MemoryBank
from ..config import ViewConfig
from ..data.sources.open import Source
from ..distributed.collectives import World
from ..embeddings.embed import embed
from ..errors import UserError
from ..models import Encoder
from . import knn
from .knn_queries import QuerySelection

_EMBEDDED = 256  # images at a time
_ASKED = 8192  # queries at a time


class Rows(NamedTuple):
    """Rows that are split over ranks, as a bank's are."""

    rows: Tensor
    """[n, D], those of this rank."""
    part: range
    """Which of all they are."""
    size: int
    """N, of all ranks."""


@torch.no_grad()
def nearest_rows(
    world: World, queries: Tensor, bank: MemoryBank | Rows, k: int, *, exclude: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k most similar rows of the whole bank; as ``knn.nearest_rows``, ties by the lowest row.

    Each rank finds its own k, and all merge them: two all-gathers of Q k places, (e + 8) Q k bytes.

    Args:
        world: the ranks.
        queries: unit rows [Q, D], the same on every rank.
        bank: this rank's rows.
        k: at most N (N - 1 with ``exclude``).
        exclude: int64 [Q], one row of the whole bank that each query may not find (itself).

    Returns:
        (rows, similarity): int64 and float [Q, k], the same on every rank.

    Raises:
        UserError: more neighbors than rows, or values that are not finite.
    """
    most = k + (exclude is not None)
    knn.check_count(k, bank.size - (exclude is not None))
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


def shared_accuracy(
    world: World,
    choice: QuerySelection,
    encoder: Encoder,
    rows: Tensor,
    part: range,
    views: ViewConfig,
    *,
    k: Sequence[int],
    pixels: Tensor | None,
    workers: int,
    autocast: Callable[[], AbstractContextManager],
) -> dict[str, float]:
    """``knn.knn_accuracy`` of a :class:`~localagg.evaluation.knn_queries.QuerySelection`, the same on every rank.

    Ranks share the work: each embeds some of the held-out images and searches its own rows. All
    hold the queries and the labels, which are numbers.

    Args:
        world: the ranks.
        choice: who asks whom, on the CPU.
        encoder: embeds the held-out images.
        rows: of the bank, those of this rank [n, D].
        part: which of the N rows they are.
        views: image_size and eval_crop.
        k: numbers of neighbors.
        pixels: the held-out images, decoded, if they are in memory already.
        workers: processes that decode.
        autocast: precision context of the forward pass.

    Raises:
        UserError: no image that asks can be read, or values that are not finite.
    """
    bank = _known(world, choice, rows, part)
    labels, known_labels = choice.asking_labels, choice.known_labels
    if choice.held_out is None:
        queries = _own(world, bank, choice.asking)
        return _accuracy(world, queries, labels, bank, known_labels, choice.asking, k)
    options: Any = {"pixels": pixels, "workers": workers, "autocast": autocast}
    embedded, readable = _embedded(world, encoder, choice.held_out, rows, views, options)
    readable = readable[choice.asking]
    if not readable.any():
        raise UserError(
            "TODO", "No held-out image that has a label can be read; see localagg inspect."
        )
    queries = embedded[choice.asking[readable].to(embedded.device)]
    return _accuracy(world, queries, labels[readable], bank, known_labels, None, k)


def _embedded(
    world: World,
    encoder: Encoder,
    source: Source,
    like: Tensor,
    views: ViewConfig,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """The embeddings of a source [n, D], on every rank, and which images could be read [n]. Ranks
    embed some batches each."""
    part = world.part(-(-len(source) // _EMBEDDED))
    rows, there = like.new_zeros(len(source), like.shape[1]), torch.zeros(len(source))
    if part:
        batches = slice(part.start, part.stop)
        found = embed(encoder, source, views, batch=_EMBEDDED, part=batches, **options)
        rows[found.index.to(rows.device)] = found.rows.to(rows)
        there[found.index] = 1
    return world.sum(rows), world.sum(there) > 0


def _known(world: World, choice: QuerySelection, rows: Tensor, part: range) -> Rows:
    """The rows that are asked, numbered anew: known ones increase, so each rank has a range."""
    known = choice.known
    start, stop = torch.searchsorted(known, torch.tensor([part.start, part.stop])).tolist()
    own = known[start:stop] - part.start
    return Rows(rows[own.to(rows.device)], range(start, stop), len(known))


def _own(world: World, bank: Rows, index: Tensor) -> Tensor:
    """Rows of the whole bank [len(index), D], on every rank."""
    found = bank.rows.new_zeros(len(index), bank.rows.shape[1])
    mine = (index >= bank.part.start) & (index < bank.part.stop)
    own = (index[mine] - bank.part.start).to(found.device)
    found[mine.to(found.device)] = bank.rows[own]
    return world.sum(found)


def _accuracy(
    world: World,
    queries: Tensor,
    query_labels: Tensor,
    bank: Rows,
    bank_labels: Tensor,
    exclude: Tensor | None,
    k: Sequence[int],
) -> dict[str, float]:
    device = queries.device
    most = min(max(k), bank.size - (exclude is not None))
    classes = int(bank_labels.max()) + 1
    right = dict.fromkeys(k, 0)
    for start in range(0, len(queries), _ASKED):
        asked = slice(start, start + _ASKED)
        itself = None if exclude is None else exclude[asked].to(device)
        found, similarity = nearest_rows(world, queries[asked], bank, most, exclude=itself)
        won = knn.vote(bank_labels.to(device)[found], similarity, k, classes)
        for count in k:
            right[count] += int((won[count] == query_labels[asked].to(device)).sum())
    return {f"knn{count}": right[count] / len(queries) for count in k}
