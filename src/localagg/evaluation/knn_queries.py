"""Select labeled query images and the reference set that they search, and embed both."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.loading.scan import typical_side
from ..data.sources.labels import held_out_to_training_labels
from ..data.sources.open import Source, open_evaluation
from ..distributed.collectives import World
from ..embeddings.embed import embed
from ..errors import UserError
from ..models import Encoder

_MAX_LEAVE_ONE_OUT = 5000  # training images that are queries where none are held out

_WITHOUT_LABELS = " localagg clusters, embed and search need no labels."


class Unmeasurable(UserError):
    """Unusable labels: none, only one class, or no class with two images."""


class QuerySelection(NamedTuple):
    """Labeled queries and the labeled reference set. C classes, numbered as in training."""

    reference_index: Tensor
    """int64 [N], increasing: rows of the bank."""
    reference_labels: Tensor
    """int64 [N] in 0..C-1."""
    held_out: Source | None
    """Images that are the queries, or None if reference images are, leave one out."""
    query_index: Tensor
    """int64 [Q], increasing: which of the held-out images, or of the N reference images."""
    query_labels: Tensor
    """int64 [Q] in 0..C-1; each class has a reference image other than the query."""
    left_out: dict[str, dict[str, int]]
    """Images left out, {"known" (reference) or "asking" (queries): {reason: images}}."""
    notes: list[str]
    """Sentences about them for the user."""

    def prefixed(self, scores: dict[str, Any]) -> dict[str, Any]:
        """Return scores under names that begin with ``loo_`` for leave one out."""
        prefix = "loo_" if self.held_out is None else ""
        return {prefix + name: value for name, value in scores.items()}

    def reference_part(self, part: range) -> range:
        """Return which of the N reference rows lie in ``part`` of the bank's rows."""
        ends = torch.tensor([part.start, part.stop])
        start, stop = torch.searchsorted(self.reference_index, ends).tolist()
        return range(start, stop)


class EmbeddedQueries(NamedTuple):
    """Embeddings of a :class:`QuerySelection`: the arguments of the functions in ``knn``."""

    queries: Tensor
    """Unit rows [Q, D]."""
    query_labels: Tensor
    """int64 [Q]."""
    bank: Tensor
    """Unit rows [N, D]; on several ranks this rank's part of them."""
    bank_labels: Tensor
    """int64 [N]."""
    exclude: Tensor | None
    """int64 [Q]: the bank row of each query; None where queries are not in the bank."""


def select_queries(data: str, source: Source, valid: Tensor) -> QuerySelection:
    """Select held-out images as queries, or up to 5,000 evenly spread training images.

    Training images are queries where no labeled images are held out. Left out and counted: images
    whose label is below 0 ("unlabelled"), and queries of a class without another reference image
    ("alone"), as no neighbor of theirs could be right.

    Args:
        data: data URI, opened for its split "val".
        source: the training images.
        valid: int64, which of them have a row in the bank.

    Raises:
        Unmeasurable: no labels, fewer than two classes, or no query left.
        UserError: held-out classes that the training images lack by name.
    """
    if source.labels is None:
        raise Unmeasurable(
            "no-labels", f"'{data}' has no labels; put each class in a folder.{_WITHOUT_LABELS}"
        )
    labels = source.labels[valid]
    reference, reference_labels = valid[labels >= 0], labels[labels >= 0]
    if len(reference_labels.unique()) < 2:
        same = "the same" if len(reference) else "no"
        raise Unmeasurable(
            "no-labels",
            f"The {len(labels):,} training images of '{data}' have {same} label; a measurement"
            " needs two classes.",
        )
    notes = []
    if unlabeled := len(labels) - len(reference):
        notes.append(f"{unlabeled:,} of the {len(labels):,} training images have no label.")
    held_out, images, candidates, name = _candidates(data, source, reference_labels, notes)
    of_class = reference_labels.bincount(minlength=int(candidates.max()) + 1)
    alone = (candidates >= 0) & (of_class[candidates.clamp(min=0)] <= (held_out is None))
    kept = (candidates >= 0) & ~alone
    if not kept.any():
        raise Unmeasurable(
            "no-labels",
            f"None of the {len(candidates):,} {name} of '{data}' has a label of another training"
            " image, so no neighbor can be right; add images of the same classes.",
        )
    counts = {"unlabelled": int((candidates < 0).sum()), "alone": int(alone.sum())}
    for reason, words in (("unlabelled", "no label"), ("alone", "a label of no other image")):
        if counts[reason]:
            notes.append(f"{counts[reason]:,} of the {len(candidates):,} {name} have {words}.")
    left_out = {"known": {"unlabelled": unlabeled}, "asking": counts}
    return QuerySelection(
        reference, reference_labels, held_out, images[kept], candidates[kept], left_out, notes
    )


def _candidates(
    data: str, source: Source, reference_labels: Tensor, notes: list[str]
) -> tuple[Source | None, Tensor, Tensor, str]:
    """Return (held-out images or None, indices of possible queries, labels or -1, their name)."""
    held_out = open_evaluation(data)
    if held_out is not None and held_out.labels is not None:
        names = held_out_to_training_labels(data, source, held_out)
        labels = torch.where(held_out.labels < 0, -1, names[held_out.labels.clamp(min=0)])
        return held_out, torch.arange(len(held_out)), labels, "held-out images"
    if held_out is not None:
        notes.append(
            f"The held-out images of '{data}' have no labels; training images are the queries."
        )
    size = len(reference_labels)
    images = torch.arange(0, size, math.ceil(size / _MAX_LEAVE_ONE_OUT))
    return None, images, reference_labels[images], "training images"


@torch.no_grad()
def embed_queries(
    selection: QuerySelection,
    encoder: Encoder,
    bank: Tensor,
    *,
    size: int,
    world: World | None = None,
    batch: int = 256,
    **options: Any,
) -> EmbeddedQueries:
    """Return the embeddings of a selection on the bank's device, without unreadable queries.

    Ranks each embed some batches of the held-out images; all return the same queries. Collectives
    on several ranks: one or two all-reduces of the queries.

    Args:
        selection: queries and reference set.
        encoder: embeds the held-out images.
        bank: rows of the training images: all [size, D], or this rank's share of them.
        size: number of training images.
        world: the ranks that share the bank. Default: this process has all of it.
        batch: images embedded at a time.
        options: ``views``, ``pixels``, ``workers`` and ``autocast`` of :func:`.embed.embed`.

    Raises:
        UserError: no query can be read.
    """
    world = world or World()
    part = world.part(size)
    own = selection.reference_part(part)
    rows = bank[(selection.reference_index[own.start : own.stop] - part.start).to(bank.device)]
    labels = selection.reference_labels.to(bank.device)
    index, query_labels = selection.query_index, selection.query_labels
    if selection.held_out is None:
        queries = rows.new_zeros(len(index), rows.shape[1])
        mine = (index >= own.start) & (index < own.stop)
        queries[mine.to(bank.device)] = rows[(index[mine] - own.start).to(bank.device)]
        itself = index.to(bank.device)
        return EmbeddedQueries(
            world.sum(queries), query_labels.to(bank.device), rows, labels, itself
        )
    embedded, readable = _embed_shared(
        world, encoder, selection.held_out, rows, {"batch": batch, **options}
    )
    kept = readable[index]
    if not kept.any():
        raise UserError(
            "unreadable-images",
            "No held-out image that has a label can be read; see localagg inspect.",
        )
    queries = embedded[index[kept].to(bank.device)]
    return EmbeddedQueries(queries, query_labels[kept].to(bank.device), rows, labels, None)


def _embed_shared(
    world: World, encoder: Encoder, source: Source, rows: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return (embeddings [n, D] of a source, readable bool [n]); each batch runs on one rank."""
    if world.size == 1:
        typical_side(source, options["views"])  # raises with the images' names if none can be read
    dtype = torch.promote_types(rows.dtype, torch.float32)
    embedded = rows.new_zeros(len(source), rows.shape[1], dtype=dtype)
    readable = torch.zeros(len(source))
    if batches := world.part(-(-len(source) // options["batch"])):
        part = slice(batches.start, batches.stop) if world.size > 1 else slice(None)
        found = embed(encoder, source, part=part, **options)
        embedded[found.index.to(rows.device)] = found.rows.to(embedded)
        readable[found.index] = 1
    return world.sum(embedded), world.sum(readable) > 0
