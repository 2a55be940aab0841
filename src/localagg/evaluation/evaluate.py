"""Measurements by neighbors and clusters: of a run while it learns, and of a finished one."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric
from torch import Tensor

from ..checkpoint import (
    latest,
    load_bank,
    load_encoder,
    load_views,
    read_progress,
    read_run,
    weights_digest,
)
from ..config import PretrainConfig, ViewConfig
from ..data.loading.loader import decoded, typical_side
from ..data.sources.labels import held_out_to_training_labels
from ..data.sources.open import Source, open_evaluation, open_images
from ..distributed.collectives import World
from ..embeddings.embed import embed
from ..engine.device import make_fabric
from ..errors import UserError
from ..io.console import notify, show_progress
from ..models import Encoder
from ..recipes.defaults import resolve_defaults
from .cluster_metrics import cluster_scores
from .knn import VOTES, knn_accuracy, retrieval_scores
from .shared_neighbors import shared_accuracy

_LEAVE_ONE_OUT = 5000  # bank rows asked about where nothing is held out


class Unmeasurable(UserError):
    """Labels that nothing can be measured with: none, all the same, or none shared by two."""


class Choice(NamedTuple):
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


class Space(NamedTuple):
    """Embeddings as a :class:`Choice` names them: the arguments of the functions in ``knn``."""

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


def choose(data: str, source: Source, valid: Tensor) -> Choice:
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
    return Choice(known, known_labels, held_out, images[asking], asked[asking], left_out, notes)


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


def space(
    choice: Choice,
    encoder: Encoder,
    bank: Tensor,
    config: PretrainConfig,
    *,
    pixels: Tensor | None = None,
    autocast: Callable[[], AbstractContextManager],
) -> Space:
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
        return Space(rows[asking], labels[asking], rows, labels, asking)
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
    return Space(found.rows[asking].to(bank.device), query_labels, rows, labels, None)


class OnlineNeighbors:
    """1-NN (the reference's online validation) and weighted 200-NN accuracy on the bank.

    Held-out images ask the bank; where there are none with labels, its own rows ask each other
    (named ``loo_knn1``, ``loo_knn200``); see :func:`choose`. Where there are no labels, or none
    that tell anything, nothing is measured.

    Args:
        config: resolved; its views decide what is embedded.
        data: data URI, asked for its split "val".
        source: what is learned from.
        valid: int64, the rows of the bank that are learned.
        k: numbers of neighbors.
        world: the ranks that the bank is split over. None: this process has it.

    Raises:
        UserError: held-out images of classes that the training images do not have by name.
    """

    def __init__(
        self,
        config: PretrainConfig,
        data: str,
        source: Source,
        valid: Tensor,
        k: Sequence[int] = (1, 200),
        world: World | None = None,
    ) -> None:
        self.config, self.k, self.world = config, tuple(k), world or World()
        self.part = self.world.part(len(source))
        self.choice: Choice | None = None
        self.pixels: Tensor | None = None
        if source.labels is None or not config.eval_every:
            return
        try:
            self.choice = self.world.rank_zero_first(lambda: choose(data, source, valid))
        except Unmeasurable as error:
            notify(f"Nothing is measured while learning: {error}")
            return
        for note in self.choice.notes:
            notify(note)
        if self.choice.held_out is not None:
            self.pixels = decoded(self.choice.held_out, config)

    def __call__(self, encoder: Encoder, bank: Tensor, fabric: Fabric) -> dict[str, float]:
        """Accuracies in 0-1 by name, with the network in ``fabric``'s precision; empty where
        nothing is measured. Of several ranks each brings its rows of the bank."""
        if self.choice is None:
            return {}
        if self.world.size > 1:
            accuracy = shared_accuracy(
                self.world,
                self.choice,
                encoder,
                bank,
                self.part,
                self.config.views,
                k=self.k,
                pixels=self.pixels,
                workers=self.config.workers,
                autocast=fabric.autocast,
            )
            return _named(self.choice, accuracy)
        found = space(
            self.choice,
            encoder,
            bank,
            self.config,
            pixels=self.pixels,
            autocast=fabric.autocast,
        )
        return _named(self.choice, knn_accuracy(**found._asdict(), k=self.k))


def measure_run(
    run: Path,
    *,
    data: str | None,
    against: str,
    k: Sequence[int] = VOTES,
    workers: int,
    retrieval: bool = False,
    clusters: bool = False,
) -> dict[str, Any]:
    """How good a run's embedding is by its neighbors and clusters.

    Args:
        run: run folder, or weights file (then only against embeddings).
        data: data URI; None: the run's own.
        against: "bank", the run's memory bank; or "embeddings", fresh ones of the training split.
        k: numbers of neighbors.
        workers: processes that decode.
        retrieval: also precision@k and mAP; see :func:`localagg.evaluation.knn.retrieval_scores`.
        clusters: also k-means of the known rows against their classes; see
            :func:`localagg.evaluation.cluster_metrics.cluster_scores`.

    Returns:
        {"accuracy": {name: 0-1}, "asked", "known": images, "held_out": whether held-out images
        asked, "capped": {k: the lower number that votes}, "against", "data", "run",
        "weights_digest", "left_out": {"known", "asking": {"unreadable", "unlabelled", "alone":
        images}}, "notes": sentences}, and "retrieval", "clusters" where asked for.

    Raises:
        UserError: no labels, or none that tell anything; no bank of these images; no such run.
    """
    if min(k) < 1:
        raise UserError("TODO", f"--k is {' '.join(map(str, k))}; it must be at least 1.")
    encoder = load_encoder(run)
    digest = weights_digest(encoder)
    facts = read_run(run)[1] if run.is_dir() else {}
    data = data or facts.get("data")
    if data is None:
        raise UserError("TODO", f"'{run}' is a weights file; name the images with --data.")
    choice, found = _space_of(run, encoder, data, facts, against, workers)
    choice.notes.extend(_more_notes(choice, found, k))
    for note in choice.notes:
        notify(note)
    result: dict[str, Any] = {"accuracy": _named(choice, knn_accuracy(**found._asdict(), k=k))}
    if retrieval:
        result["retrieval"] = _named(choice, retrieval_scores(**found._asdict(), k=k))
    if clusters:
        result["clusters"] = cluster_scores(found.bank, found.bank_labels)
    there = _neighbors_of(choice, found)
    return {
        **result,
        "asked": len(found.queries),
        "known": len(found.bank),
        "held_out": choice.held_out is not None,
        "capped": {str(count): there for count in k if count > there},
        "against": "the memory bank" if against == "bank" else "the training images",
        "left_out": choice.left_out,
        "notes": choice.notes,
        "data": data,
        "run": str(run),
        "weights_digest": digest,
    }


def _space_of(
    run: Path, encoder: Encoder, data: str, facts: dict[str, Any], against: str, workers: int
) -> tuple[Choice, Space]:
    """Who asks whom, and their embeddings by a run."""
    fabric = make_fabric()
    encoder = encoder.to(fabric.device)
    source = open_images(data)
    choose(data, source, torch.arange(len(source)))  # refuses before hours of embedding
    config = PretrainConfig(views=load_views(run) or ViewConfig(), workers=workers)
    config = resolve_defaults(config, len(source), typical_side(source))
    if against == "bank":
        bank, valid = _own_bank(run, data, source, facts)
    else:
        bank, valid = _fresh_bank(encoder, source, config, fabric)
    choice = choose(data, source, valid)
    found = space(choice, encoder, bank.to(fabric.device), config, autocast=fabric.autocast)
    choice.left_out["known"]["unreadable"] = len(source) - len(valid)
    choice.left_out["asking"]["unreadable"] = len(choice.asking) - len(found.queries)
    return choice, found


def _named(choice: Choice, found: dict[str, Any]) -> dict[str, Any]:
    """What is measured by leaving one out says so in its name."""
    return {choice.prefix + name: value for name, value in found.items()}


def _more_notes(choice: Choice, found: Space, k: Sequence[int]) -> list[str]:
    """Sentences about unreadable images and a k above the number of images."""
    notes = []
    for side, what in (("known", "training"), ("asking", "held-out")):
        if count := choice.left_out[side]["unreadable"]:
            notes.append(f"{count:,} {what} images cannot be read and are left out.")
    there = _neighbors_of(choice, found)
    if max(k) > there:
        notes.append(f"k = {max(k):,} is more than the {there:,} images to find: all of them vote.")
    return notes


def _neighbors_of(choice: Choice, found: Space) -> int:
    """How many images there are for each to find."""
    return len(found.bank) - (choice.held_out is None)


def _own_bank(run: Path, data: str, source: Source, facts: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The run's memory bank, and which of its rows were learned."""
    if source.fingerprint() != facts.get("fingerprint"):
        raise UserError(
            "TODO",
            f"'{run}' has no memory bank of '{data}' ({len(source):,} images);"
            " use --against embeddings.",
        )
    valid = torch.ones(len(source), dtype=torch.bool)
    valid[read_progress(latest(run))["unreadable"]] = False
    return load_bank(run).float(), valid.nonzero().squeeze(1)


def _fresh_bank(
    encoder: Encoder, source: Source, config: PretrainConfig, fabric: Fabric
) -> tuple[Tensor, Tensor]:
    """Embeddings of the training images now, and which of them could be read."""
    with show_progress("embedding") as show:
        found = embed(
            encoder,
            source,
            config.views,
            workers=config.workers,
            autocast=fabric.autocast,
            on_progress=show,
        )
    bank = torch.zeros(len(source), found.rows.shape[1])
    bank[found.index] = found.rows.cpu()
    return bank, found.index
