"""The H k-means clusterings of the bank that define close neighbors (LA section 3.1)."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .bank import MemoryBank
from .distributed.collectives import World
from .engine.kmeans import KMeans, Points, initial_centroids, lloyd, mean_centroids
from .errors import UserError

SEED = 1234  # the reference's: clustering h is seeded SEED + h
OVERSHOOT = 0.7  # of warm starts; see lloyd()

Engine = Literal["auto", "faiss", "lloyd"]


def kmeans(
    rows: Tensor | Points,
    clusters: int,
    *,
    seed: int = SEED,
    iterations: int = 20,
    start: Tensor | None = None,
    tolerance: float = 0.0,
    engine: Engine = "auto",
    world: World | None = None,
) -> KMeans:
    """Euclidean k-means with the reference's settings: 20 iterations, all points used.

    Cold, it starts from the rows that faiss draws for the seed, and faiss computes it where the
    rows are on a CPU and in one process. Elsewhere, and from a warm start,
    :func:`~localagg.engine.kmeans.lloyd` does, which on a CPU without fast bf16 gives faiss' labels but for
    rows between two equally near centroids.

    Args:
        rows: [N, D], any float dtype and device; or :class:`~localagg.engine.kmeans.Points` that several
            clusterings share. Computed in float32.
        clusters: k, at most N.
        seed: of the first centroids, which are rows drawn at random.
        iterations: Lloyd iterations, at most.
        start: a warm start: centroids [k, D], or the last labels [N] (int; of this rank's rows),
            whose means in these rows are the first centroids.
        tolerance: stop when an iteration lowers the inertia by no more than this share of it; faiss
            always does all iterations.
        engine: what computes a cold start; ``auto`` as said above.
        world: whose share the rows are, if they are split over ranks. None: they are all.

    Returns:
        A :class:`~localagg.engine.kmeans.KMeans`; of this rank's rows where they are split.

    Raises:
        UserError: more clusters than rows, rows that are not finite, or faiss asked for where it
            cannot be.
    """
    if isinstance(rows, Tensor) and not _by_faiss(rows, engine, start, world):
        rows = Points(rows, world)
    size = len(rows) if isinstance(rows, Tensor) else rows.count
    if not 1 <= clusters <= size:
        raise UserError(
            "TODO",
            f"{clusters:,} clusters of {size:,} images cannot be;"
            f" set --clusters to at most {size:,}.",
        )
    if isinstance(rows, Tensor):
        return _faiss(rows, clusters, seed, iterations)
    if start is None:
        return lloyd(
            rows,
            initial_centroids(rows, clusters, seed),
            iterations=iterations,
            tolerance=tolerance,
        )
    if not start.is_floating_point():
        start = mean_centroids(rows.cluster_totals(start.to(rows.device, torch.int64), clusters))
    return lloyd(rows, start, iterations=iterations, tolerance=tolerance, overshoot=OVERSHOOT)


def cluster(
    bank: Tensor | MemoryBank,
    clusters: Sequence[int],
    *,
    seed: int = SEED,
    iterations: int = 20,
    start: Tensor | Sequence[Tensor] | None = None,
    tolerance: float = 0.0,
    engine: Engine = "auto",
    on_progress: Callable[[int, KMeans], None] | None = None,
    centroids: list[Tensor] | None = None,
    world: World | None = None,
) -> Tensor:
    """H clusterings of the bank, one after the other: on CPUs one product with the centroids of all
    takes as long as H products (benchmarks/results/clustering.md).

    Args:
        bank: rows [N, D], or a MemoryBank.
        clusters: (k_1, ..., k_H).
        seed: clustering h is seeded ``seed + h``.
        iterations: Lloyd iterations of each, at most.
        start: the last labels [H, N], or H centroid tensors [k_h, D], for a warm start.
        tolerance: see :func:`kmeans`.
        engine: see :func:`kmeans`.
        on_progress: called as ``on_progress(h, result)`` after each clustering.
        centroids: a list that is emptied and filled with those of the H results.
        world: whose share the rows are, if the bank is split over ranks; see
            :class:`~localagg.engine.kmeans.Points` for the collectives.

    Returns:
        Labels, int32 [H, N], on the bank's device; of this rank's rows where the bank is split.

    Raises:
        UserError: as :func:`kmeans`.
    """
    rows = bank if isinstance(bank, Tensor) else bank.rows
    by_faiss = _by_faiss(rows, engine, start, world)  # of all rows, on one rank
    shared = rows if by_faiss else Points(rows, world)
    labels_HN = torch.empty(len(clusters), len(rows), dtype=torch.int32, device=rows.device)
    found = []
    for h, k in enumerate(clusters):
        result = kmeans(
            shared,
            k,
            seed=seed + h,
            iterations=iterations,
            start=start[h] if start is not None else None,
            tolerance=tolerance,
            engine=engine,
        )
        labels_HN[h] = result.labels
        found.append(result.centroids)
        if on_progress:
            on_progress(h, result)
    if centroids is not None:
        centroids[:] = found
    return labels_HN


def _by_faiss(rows: Tensor, engine: Engine, start: object | None, world: World | None) -> bool:
    """Whether faiss is to cluster.

    Raises:
        UserError: it is, of rows that are split.
    """
    if start is not None or engine == "lloyd":
        return False
    ranks = world.size if world else 1
    if engine == "faiss" and ranks > 1:
        raise UserError("TODO", f"--kmeans faiss cannot cluster over {ranks} processes; use lloyd.")
    return engine == "faiss" or (rows.device.type != "cuda" and ranks == 1)


def _faiss(rows: Tensor, clusters: int, seed: int, iterations: int) -> KMeans:
    import faiss

    x = np.ascontiguousarray(rows.detach().to("cpu", torch.float32).numpy())
    size, dim = x.shape
    if not np.isfinite(x).all():
        raise UserError(
            "TODO", "The bank holds values that are not finite and cannot be clustered."
        )
    engine = faiss.Kmeans(
        dim,
        clusters,
        niter=iterations,
        seed=seed,
        max_points_per_centroid=size,  # faiss would otherwise sample 256 points a centroid
        min_points_per_centroid=1,
    )
    engine.train(x)
    distances, labels = engine.index.search(x, 1)
    return KMeans(
        torch.from_numpy(labels[:, 0].astype(np.int32)),
        torch.from_numpy(np.asarray(engine.centroids, dtype=np.float32).copy()),
        float(distances.sum(dtype=np.float64)),
        iterations,
    )
