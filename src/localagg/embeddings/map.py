"""Place an embedding on a plane, by t-SNE from the exact neighbors of every row.

t-SNE (van der Maaten & Hinton, 2008) by openTSNE, which takes 70 s for 50,000 rows on two cores.
For more rows, place an evenly drawn sample so, and each other row among its nearest sampled ones.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..engine.counter_rng import MAP, permutation, uniform
from ..engine.search import nearest, sort_by_similarity
from ..io.console import notify, show_progress
from ..io.files import atomic_write, reason_of
from ..io.machine import cores
from ..io.tensor_files import save_tensors
from .neighbors import nearest_others

MOST = 50_000
"""Rows that t-SNE places itself."""
_PERPLEXITY = 30  # three times as many neighbors are searched
_EARLY, _LATE = 250, 500  # iterations with and without exaggeration
_THREADS_FROM = 10_000  # rows; with fewer, threads wait for one another on a busy machine
_EVERY = 10  # iterations between updates of the progress
_AMONG = 5  # sampled rows that a further row is placed among
_BATCH = 4096


def map_rows(rows: Tensor, *, seed: int = 0) -> Tensor:
    """Place rows on a plane so that neighbors stay neighbors.

    The start is the first two principal components; ``seed`` moves equal rows apart by a
    thousandth. The result is reproducible on one machine.

    Args:
        rows: float32 unit rows [N, D].
        seed: random seed.

    Returns:
        float32 [N, 2], centered.
    """
    if len(rows) <= MOST:
        return _tsne(rows, seed)
    notify(f"t-SNE places {MOST:,} of {len(rows):,} rows; the others are placed among these.")
    sample = permutation(len(rows), seed, MAP)[:MOST].sort().values
    placed = _tsne(rows[sample], seed)
    xy = torch.empty(len(rows), 2)
    with show_progress("placing further rows") as show:
        for start in range(0, len(rows), _BATCH):
            part = slice(start, start + _BATCH)
            found, similarity = sort_by_similarity(*nearest(rows[part], rows[sample], _AMONG))
            weight = (similarity / 0.05).softmax(dim=1).unsqueeze(2)
            xy[part] = (placed[found] * weight).sum(dim=1)
            show(min(start + _BATCH, len(rows)), len(rows))
    xy[sample] = placed
    return xy


def kept_map(file: Path, rows: Tensor, *, seed: int = 0) -> Tensor:
    """Return :func:`map_rows`, read from a file that an earlier call wrote for the same rows."""
    digest = hashlib.sha256(f"{seed}".encode() + rows.numpy().tobytes()).hexdigest()
    try:
        with safe_open(file, framework="pt") as kept:
            if (kept.metadata() or {}).get("rows") == digest:
                return kept.get_tensor("xy")
    except (OSError, SafetensorError):
        pass
    xy = map_rows(rows, seed=seed)
    try:
        with atomic_write(file) as beside:
            save_tensors(beside, {"xy": xy}, {"rows": digest})
    except OSError as error:  # a page or viewer needs the map, not its file
        notify(f"The map is not kept for the next time: '{file}': {reason_of(error)}.")
    return xy


def _tsne(rows: Tensor, seed: int) -> Tensor:
    start = _principal_plane(rows, seed)
    if len(rows) < 5:  # too few for any perplexity
        return start
    from openTSNE import TSNEEmbedding
    from openTSNE.affinity import PerplexityBasedNN
    from openTSNE.nearest_neighbors import PrecomputedNeighbors

    found, cosine = nearest_others(rows, 3 * _PERPLEXITY)
    distance = (2 - 2 * cosine).clamp(min=0).sqrt()
    known = PrecomputedNeighbors(found.numpy(), distance.double().numpy())
    perplexity = max(1, min(_PERPLEXITY, found.shape[1] // 3))
    jobs = cores() if len(rows) >= _THREADS_FROM else 1
    with show_progress("drawing the map") as show:
        done = 0

        def update(*_: object) -> None:
            nonlocal done
            done += _EVERY
            show(min(done, _EARLY + _LATE), _EARLY + _LATE)

        affinities = PerplexityBasedNN(knn_index=known, perplexity=perplexity, n_jobs=jobs)
        options = {"n_jobs": jobs, "callbacks": [update], "callbacks_every_iters": _EVERY}
        placed = TSNEEmbedding(start.double().numpy(), affinities, random_state=seed, **options)
        placed.optimize(_EARLY, exaggeration=12, momentum=0.8, inplace=True)
        placed.optimize(_LATE, momentum=0.8, inplace=True)
    xy = torch.from_numpy(np.asarray(placed, np.float32).copy())
    return xy - xy.mean(dim=0)


def _principal_plane(rows: Tensor, seed: int) -> Tensor:
    """Return the first two principal components, of deviation 1e-4, as t-SNE needs to start."""
    if len(rows) < 2:
        return torch.zeros(len(rows), 2)
    centered = (rows - rows.mean(dim=0)).double()
    axes = torch.linalg.eigh(centered.T @ centered).eigenvectors[:, -2:].flip(1)
    axes *= axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()  # else arbitrary
    plane = torch.zeros(len(rows), 2, dtype=torch.float64)
    plane[:, : axes.shape[1]] = centered @ axes
    plane /= plane[:, 0].std(correction=0).clamp(min=1e-12)
    jitter = uniform(seed, MAP, torch.arange(len(rows)), count=2) - 0.5
    return ((plane + 1e-2 * jitter) * 1e-4).float()
