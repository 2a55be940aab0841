"""Accuracy by nearest neighbors in a bank that is split over ranks."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import UserError, ViewConfig
from .data.sources import Source
from .distributed import World
from .embed import embed
from .knn import vote
from .models import Encoder
from .sharded import Rows, nearest_rows

if TYPE_CHECKING:
    from .evaluate import Choice

_EMBEDDED = 256  # images at a time
_ASKED = 8192  # queries at a time


def shared_accuracy(
    world: World,
    choice: "Choice",
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
    """``knn.knn_accuracy`` of a :class:`~localagg.evaluate.Choice`, the same on every rank.

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
        raise UserError("No held-out image that has a label can be read; see localagg inspect.")
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


def _known(world: World, choice: "Choice", rows: Tensor, part: range) -> Rows:
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
        won = vote(bank_labels.to(device)[found], similarity, k, classes)
        for count in k:
            right[count] += int((won[count] == query_labels[asked].to(device)).sum())
    return {f"knn{count}": right[count] / len(queries) for count in k}
