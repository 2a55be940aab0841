"""Select query images and the reference set that they are compared with."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import PretrainConfig
from ..data.loading.scan import typical_side
from ..data.sources.labels import held_out_to_training_labels
from ..data.sources.open import Source, open_evaluation
from ..embeddings.embed import embed
from ..errors import UserError
from ..models import Encoder

_LEAVE_ONE_OUT = 5000  # bank rows asked about where nothing is held out


class Unmeasurable(UserError):
    """Labels that nothing can be measured with: none, all the same, or none shared by two."""


class QuerySelection(NamedTuple):
    """Which labelled images ask which. C classes, numbered as in training."""

    known: Tensor
    """int64 [N]: the rows of the bank that are asked."""
    known_labels: Tensor
    """int64 [N] in 0..C-1."""
    held_out: Source | None
    """The images that ask; None: known ones ask the others (leave one out)."""
    asking: Tensor
    """int64 [Q], increasing: which of the held-out images, or of the N known ones."""
    asking_labels: Tensor
    """int64 [Q] in 0..C-1; each class has a known image that is not the asking one."""
    left_out: dict[str, dict[str, int]]
    """Images left out, {"known" or "asking": {reason: images}}."""
    notes: list[str]
    """Sentences about them for the user."""

    @property
    def prefix(self) -> str:
        """What the names of measurements begin with."""
        return "loo_" if self.held_out is None else ""


class EmbeddedQueries(NamedTuple):
    """Embeddings as a :class:`QuerySelection` names them: the arguments of the functions in ``knn``."""

    queries: Tensor
    """Unit rows [Q, D]."""
    query_labels: Tensor
    """int64 [Q]."""
    bank: Tensor
    """Unit rows [N, D]."""
    bank_labels: Tensor
    """int64 [N]."""
    exclude: Tensor | None
    """int64 [Q]: where each query itself stands in the bank; None where it does not."""


def select_queries(data: str, source: Source, valid: Tensor) -> QuerySelection:
    """Who asks whom: held-out images the training images; where no labelled images are held out,
    up to 5,000 training images, evenly spread, the others.

    Left out and counted: images whose label is below 0 ("unlabelled"), and asking images of a class
    that no other known image has ("alone"), as no neighbor of theirs could be right.

    Args:
        data: data URI, asked for its split "val".
        source: the training images.
        valid: int64, which of them have a row in the bank.

    Raises:
        Unmeasurable: no labels, fewer than two classes, or nobody left to ask.
        UserError: held-out images of classes that the training images do not have by name.
    """
    if source.labels is None:
        raise Unmeasurable(
            "TODO", f"'{data}' has no labels to measure against; put each class in a folder."
        )
    labels = source.labels[valid]
    known, known_labels = valid[labels >= 0], labels[labels >= 0]
    if len(known_labels.unique()) < 2:
        what = "the same" if len(known) else "no"
        raise Unmeasurable(
            "TODO",
            f"The {len(labels):,} training images of '{data}' have {what} label; a measurement"
            " needs two classes.",
        )
    notes = []
    if unlabelled := len(labels) - len(known):
        notes.append(f"{unlabelled:,} of the {len(labels):,} training images have no label.")
    held_out, images, asked, what = _candidates(data, source, known_labels, notes)
    of_class = known_labels.bincount(minlength=int(asked.max()) + 1)
    alone = (asked >= 0) & (of_class[asked.clamp(min=0)] <= (held_out is None))
    asking = (asked >= 0) & ~alone
    if not asking.any():
        raise Unmeasurable(
            "TODO",
            f"None of the {len(asked):,} {what} of '{data}' has a label that another training image"
            " has, so no neighbor can be right; add images of the same classes.",
        )
    counts = {"unlabelled": int((asked < 0).sum()), "alone": int(alone.sum())}
    for reason, words in (("unlabelled", "no label"), ("alone", "a label that no other image has")):
        if counts[reason]:
            notes.append(f"{counts[reason]:,} of the {len(asked):,} {what} have {words}.")
    left_out = {"known": {"unlabelled": unlabelled}, "asking": counts}
    return QuerySelection(
        known, known_labels, held_out, images[asking], asked[asking], left_out, notes
    )


def _candidates(
    data: str, source: Source, known_labels: Tensor, notes: list[str]
) -> tuple[Source | None, Tensor, Tensor, str]:
    """(held-out images or None, which of them may ask, their labels or -1, what they are)."""
    held_out = open_evaluation(data)
    if held_out is not None and held_out.labels is not None:
        names = held_out_to_training_labels(data, source, held_out)
        labels = torch.where(held_out.labels < 0, -1, names[held_out.labels.clamp(min=0)])
        return held_out, torch.arange(len(held_out)), labels, "held-out images"
    if held_out is not None:
        notes.append(f"The held-out images of '{data}' have no labels: training images ask.")
    size = len(known_labels)
    images = torch.arange(0, size, math.ceil(size / _LEAVE_ONE_OUT))
    return None, images, known_labels[images], "training images that ask"


def embed_queries(
    choice: QuerySelection,
    encoder: Encoder,
    bank: Tensor,
    config: PretrainConfig,
    *,
    pixels: Tensor | None = None,
    autocast: Callable[[], AbstractContextManager],
) -> EmbeddedQueries:
    """The embeddings of a choice, on the bank's device; images that cannot be read do not ask.

    Args:
        choice: who asks whom.
        encoder: embeds the held-out images.
        bank: rows of the training images [*, D].
        config: views and workers.
        pixels: the held-out images, decoded, if they are in memory already.
        autocast: precision context of the forward pass.

    Raises:
        UserError: no image that asks can be read.
    """
    rows, labels = bank[choice.known.to(bank.device)], choice.known_labels.to(bank.device)
    if choice.held_out is None:
        asking = choice.asking.to(bank.device)
        return EmbeddedQueries(rows[asking], labels[asking], rows, labels, asking)
    typical_side(choice.held_out)  # refuses them with their names if none can be read
    found = embed(
        encoder,
        choice.held_out,
        config.views,
        pixels=pixels,
        workers=config.workers,
        autocast=autocast,
    )
    readable = torch.isin(choice.asking, found.index)
    if not readable.any():
        raise UserError(
            "TODO", "No held-out image that has a label can be read; see localagg inspect."
        )
    asking = torch.isin(found.index, choice.asking).to(found.rows.device)
    query_labels = choice.asking_labels[readable].to(bank.device)
    return EmbeddedQueries(found.rows[asking].to(bank.device), query_labels, rows, labels, None)


def prefixed(choice: QuerySelection, found: dict[str, Any]) -> dict[str, Any]:
    """What is measured by leaving one out says so in its name."""
    return {choice.prefix + name: value for name, value in found.items()}
