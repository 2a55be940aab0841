"""Measure a finished run by nearest neighbors, retrieval and clusters.

To add a measurement, write a function of (embedded queries, numbers of neighbors), list it in
:data:`MEASUREMENTS`, and name what results.json stores of it in ``record_results.record_knn``.
"""

import os
from collections.abc import Callable, Sequence
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
from ..config import PretrainConfig, ViewConfig, check_argument_types, check_options
from ..data.loading.scan import typical_side
from ..data.sources.open import Source, open_images
from ..embeddings.embed import embed
from ..engine.device import describe_arithmetic, make_fabric
from ..errors import UserError, counted
from ..io.console import notify, show_progress
from ..models import Encoder
from ..recipes.derived_settings import resolve_defaults
from .cluster_metrics import cluster_scores
from .knn import VOTES, knn_accuracy, retrieval_scores
from .knn_queries import EmbeddedQueries, QuerySelection, embed_queries, select_queries
from .results.protocols import BANK, TRAINING_IMAGES

MEASUREMENTS: dict[str, Callable[[EmbeddedQueries, Sequence[int]], dict[str, Any]]] = {
    "accuracy": lambda embedded, k: knn_accuracy(**embedded._asdict(), k=k),
    "retrieval": lambda embedded, k: retrieval_scores(**embedded._asdict(), k=k),
    "clusters": lambda embedded, _: cluster_scores(embedded.bank, embedded.bank_labels),
}
"""Measurements by their key in the result."""


@check_argument_types
def measure_run(
    run: str | Path,
    *,
    data: str | Path | None = None,
    against: str = "bank",
    k: Sequence[int] = VOTES,
    workers: int = 0,
    retrieval: bool = False,
    clusters: bool = False,
    batch: int = 256,
    device: str = "auto",
    precision: str = "32-true",
) -> dict[str, Any]:
    """Measure a run's embedding by its neighbors and clusters.

    Args:
        run: run folder, or weights file (then only against embeddings).
        data: data URI. Default: that of the run.
        against: "bank": the run's memory bank; "embeddings": new ones of the training split.
        k: numbers of neighbors.
        workers, batch: processes that decode; images embedded at a time.
        retrieval, clusters: also measure these; see :data:`MEASUREMENTS`.
        device, precision: where and how the network computes; see :func:`.make_fabric`.

    Returns:
        {"accuracy": {name: 0-1}, "asked": queries, "known": reference images, "held_out": whether
        queries are held-out images, "capped": {k: number that votes}, "against", "data", "run",
        "weights_digest", "device", "precision", "left_out": {"known", "asking": {reason: images}},
        "notes": sentences}, and "retrieval", "clusters" where requested.

    Raises:
        UserError: no usable labels, no bank of these images, or no such run.
    """
    run, data = Path(run), None if data is None else os.fspath(data)
    check_options(batch_size=(batch, 1), workers=(workers, 0))
    _check_choices(against, k)
    encoder = load_encoder(run)
    facts = read_run(run)[1] if run.is_dir() else {}
    data = _place_of_images(run, data, facts)
    fabric = make_fabric(device, precision)
    options = EmbeddingOptions(fabric, workers, batch)
    selection, embedded = _select_and_embed(run, encoder, data, facts, against, options)
    available = len(embedded.bank) - (selection.held_out is None)
    notes = [*selection.notes, *_count_notes(selection, k, available)]
    for note in notes:
        notify(note)
    requested = ["accuracy"] + ["retrieval"] * retrieval + ["clusters"] * clusters
    scores = {name: MEASUREMENTS[name](embedded, k) for name in requested}
    clustered = {"clusters": scores.pop("clusters")} if clusters else {}
    return {
        **{name: selection.prefixed(found) for name, found in scores.items()},
        **clustered,
        **_counts(selection, embedded, k, available),
        "against": BANK if against == "bank" else TRAINING_IMAGES,
        "notes": notes,
        "data": data,
        "run": str(run),
        "weights_digest": weights_digest(encoder),
        **describe_arithmetic(fabric),
    }


def _counts(
    selection: QuerySelection, embedded: EmbeddedQueries, k: Sequence[int], available: int
) -> dict[str, Any]:
    return {
        "asked": len(embedded.queries),
        "known": len(embedded.bank),
        "held_out": selection.held_out is not None,
        "capped": {str(count): available for count in k if count > available},
        "left_out": selection.left_out,
    }


def _place_of_images(run: Path, data: str | None, facts: dict[str, Any]) -> str:
    place = data or facts.get("data")
    if place is None:
        raise UserError("option-missing", f"'{run}' is a file of weights; set --data too.")
    return str(place)


def _check_choices(against: str, k: Sequence[int]) -> None:
    if against not in ("bank", "embeddings"):
        raise UserError("option-invalid", f"--against is {against}; use bank or embeddings.")
    if not k:
        raise UserError("option-missing", "Name at least one number of neighbors with --k.")
    if min(k) < 1:
        raise UserError("option-invalid", f"--k is {' '.join(map(str, k))}; use at least 1.")


class EmbeddingOptions(NamedTuple):
    """How images are embedded: device and precision, decoding processes, images at a time."""

    fabric: Fabric
    workers: int
    batch: int


def _select_and_embed(
    run: Path,
    encoder: Encoder,
    data: str,
    facts: dict[str, Any],
    against: str,
    options: EmbeddingOptions,
) -> tuple[QuerySelection, EmbeddedQueries]:
    fabric, workers, batch = options
    encoder = encoder.to(fabric.device)
    source = open_images(data)
    select_queries(data, source, torch.arange(len(source)))  # fails before hours of embedding
    config = PretrainConfig(views=load_views(run) or ViewConfig(), workers=workers)
    config = resolve_defaults(config, len(source), typical_side(source, config.views))
    if against == "bank":
        bank, valid = _load_own_bank(run, data, source, facts)
    else:
        bank, valid = _embed_training_images(encoder, source, config, options)
    selection = select_queries(data, source, valid)
    embedded = embed_queries(
        selection,
        encoder,
        bank.to(fabric.device),
        size=len(source),
        views=config.views,
        workers=workers,
        batch=batch,
        autocast=fabric.autocast,
    )
    selection.left_out["known"]["unreadable"] = len(source) - len(valid)
    unreadable = len(selection.query_index) - len(embedded.queries)
    selection.left_out["asking"]["unreadable"] = unreadable
    return selection, embedded


def _count_notes(selection: QuerySelection, k: Sequence[int], available: int) -> list[str]:
    """Return sentences about unreadable images and a k above the number of images."""
    notes = [
        f"Left out: {counted(count, f'unreadable {name} image')}."
        for side, name in (("known", "training"), ("asking", "held-out"))
        if (count := selection.left_out[side]["unreadable"])
    ]
    if max(k) > available:
        notes.append(
            f"k = {max(k):,} exceeds the {available:,} available images; all of them vote."
        )
    return notes


def _load_own_bank(
    run: Path, data: str, source: Source, facts: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return the run's memory bank, and which of its rows were learned."""
    if source.fingerprint() != facts.get("fingerprint"):
        raise UserError(
            "mismatch",
            f"'{run}' has no memory bank of '{data}' ({len(source):,} images);"
            " use --against embeddings.",
        )
    valid = torch.ones(len(source), dtype=torch.bool)
    valid[read_progress(latest(run))["unreadable"]] = False
    return load_bank(run).float(), valid.nonzero().squeeze(1)


def _embed_training_images(
    encoder: Encoder, source: Source, config: PretrainConfig, options: EmbeddingOptions
) -> tuple[Tensor, Tensor]:
    """Return new embeddings of the training images, and the indices of the readable ones."""
    with show_progress("embedding") as show:
        found = embed(
            encoder,
            source,
            config.views,
            workers=options.workers,
            batch=options.batch,
            autocast=options.fabric.autocast,
            on_progress=show,
        )
    bank = torch.zeros(len(source), found.rows.shape[1])
    bank[found.index] = found.rows.cpu()
    return bank, found.index
