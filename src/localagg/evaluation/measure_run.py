"""Measure a finished run by nearest neighbors and clusters."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from ..data.loading.scan import typical_side
from ..data.sources.open import Source, open_images
from ..embeddings.embed import embed
from ..engine.device import make_fabric
from ..errors import UserError
from ..io.console import notify, show_progress
from ..models import Encoder
from ..recipes.defaults import resolve_defaults
from .cluster_metrics import cluster_scores
from .knn import VOTES, knn_accuracy, retrieval_scores
from .knn_queries import EmbeddedQueries, QuerySelection, embed_queries, prefixed, select_queries


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
    result: dict[str, Any] = {"accuracy": prefixed(choice, knn_accuracy(**found._asdict(), k=k))}
    if retrieval:
        result["retrieval"] = prefixed(choice, retrieval_scores(**found._asdict(), k=k))
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
) -> tuple[QuerySelection, EmbeddedQueries]:
    """Who asks whom, and their embeddings by a run."""
    fabric = make_fabric()
    encoder = encoder.to(fabric.device)
    source = open_images(data)
    select_queries(data, source, torch.arange(len(source)))  # refuses before hours of embedding
    config = PretrainConfig(views=load_views(run) or ViewConfig(), workers=workers)
    config = resolve_defaults(config, len(source), typical_side(source))
    if against == "bank":
        bank, valid = _own_bank(run, data, source, facts)
    else:
        bank, valid = _fresh_bank(encoder, source, config, fabric)
    choice = select_queries(data, source, valid)
    found = embed_queries(choice, encoder, bank.to(fabric.device), config, autocast=fabric.autocast)
    choice.left_out["known"]["unreadable"] = len(source) - len(valid)
    choice.left_out["asking"]["unreadable"] = len(choice.asking) - len(found.queries)
    return choice, found


def _more_notes(choice: QuerySelection, found: EmbeddedQueries, k: Sequence[int]) -> list[str]:
    """Sentences about unreadable images and a k above the number of images."""
    notes = []
    for side, what in (("known", "training"), ("asking", "held-out")):
        if count := choice.left_out[side]["unreadable"]:
            notes.append(f"{count:,} {what} images cannot be read and are left out.")
    there = _neighbors_of(choice, found)
    if max(k) > there:
        notes.append(f"k = {max(k):,} is more than the {there:,} images to find: all of them vote.")
    return notes


def _neighbors_of(choice: QuerySelection, found: EmbeddedQueries) -> int:
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
