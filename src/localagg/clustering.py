"""The H k-means clusterings of the bank that define close neighbors (LA section 3.1)."""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .bank import MemoryBank
from .config import check_arguments, check_numbers
from .config.tensor_checks import check_integers, check_rows
from .distributed.collectives import World
from .engine.kmeans import KMeans, Points, initial_centroids, lloyd, mean_centroids
from .engine.searchable_bank import not_finite_error
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
    """Cluster rows by Euclidean k-means as the reference does: 20 iterations, all points used.

    A cold start begins at the rows that faiss draws for the seed. faiss computes cold starts of one
    process on a CPU; :func:`~localagg.engine.kmeans.lloyd` computes all others. On a CPU without
    fast bfloat16 both give the same labels, except for rows between two equally near centroids.

    Args:
        rows: [N, D], any float dtype and device, or :class:`~localagg.engine.kmeans.Points` that
            several clusterings share. Computed in float32.
        clusters: k, at most N.
        seed: seed of the initial centroids.
        iterations: most Lloyd iterations.
        start: warm start: centroids [k, D], or the previous labels [N] (int; of this rank's rows),
            whose means in these rows are the initial centroids.
        tolerance: stop when an iteration lowers the inertia by at most this share; not in faiss.
        engine: faiss or lloyd for cold starts; ``auto`` chooses as described above.
        world: the ranks that the rows are split over. Default: not split.

    Returns:
        A :class:`~localagg.engine.kmeans.KMeans`; of this rank's rows if they are split.

    Raises:
        UserError: more clusters than rows, rows that are not finite, or an invalid argument.
    """
    if not isinstance(rows, Points):
        check_rows(rows=rows)
    check_arguments(clusters=(clusters, 1), seed=(seed, 0), iterations=(iterations, 0))
    check_numbers(0, 2**31 - 1, seed=seed, iterations=iterations)  # integers of faiss
    check_numbers(0, tolerance=tolerance)
    if engine not in get_args(Engine):
        raise UserError(
            "option-invalid", f"engine is {engine!r}; choose from {', '.join(get_args(Engine))}."
        )
    if isinstance(rows, Tensor) and not _uses_faiss(rows, engine, start, world):
        rows = Points(rows, world)
    size = len(rows) if isinstance(rows, Tensor) else rows.count
    if not 1 <= clusters <= size:
        raise UserError(
            "option-invalid",
            f"--clusters {clusters:,} is not between 1 and the number of images, {size:,};"
            f" set it to at most {size:,}.",
        )
    if isinstance(rows, Tensor):
        return _faiss(rows, clusters, int(seed), int(iterations))
    if start is None:
        first = initial_centroids(rows, clusters, seed)
        return lloyd(rows, first, iterations=iterations, tolerance=tolerance)
    first = _starting_centroids(rows, start, clusters)
    return lloyd(rows, first, iterations=iterations, tolerance=tolerance, overshoot=OVERSHOOT)


def _starting_centroids(rows: Points, start: Tensor, clusters: int) -> Tensor:
    """Return the centroids [k, D] of a warm start: those given, or the means of labels [N]."""
    if not (isinstance(start, Tensor) and start.is_floating_point()):
        check_integers("start", start, (len(rows.rows),), clusters)
        return mean_centroids(rows.cluster_totals(start.to(rows.device, torch.int64), clusters))
    check_rows(start=start)
    if not start.isfinite().all():
        raise not_finite_error()
    if start.shape != (clusters, rows.dim):
        raise UserError(
            "option-invalid",
            f"start is of shape {list(start.shape)}; pass centroids [{clusters}, {rows.dim}].",
        )
    return start


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
    """Compute H clusterings of the bank, one after the other; :func:`kmeans` explains the options.

    On CPUs one product with the centroids of all takes as long as H products
    (benchmarks/results/clustering.md).

    Args:
        bank: rows [N, D], or a MemoryBank.
        clusters: (k_1, ..., k_H).
        seed: clustering h is seeded ``seed + h``.
        start: warm start: the previous labels [H, N], or H centroid tensors [k_h, D].
        on_progress: called as ``on_progress(h, result)`` after each clustering.
        centroids: a list to fill with the centroids of the H results.

    Returns:
        Labels, int32 [H, N], on the bank's device; of this rank's rows if the bank is split.
    """
    rows = bank.rows if isinstance(bank, MemoryBank) else bank
    check_rows(bank=rows)
    check_arguments(seed=(seed, 0))
    if not isinstance(clusters, Sequence) or isinstance(clusters, str):
        raise UserError("option-invalid", f"clusters is {clusters!r}; pass a list of integers.")
    if start is not None and not (
        isinstance(start, Sequence | Tensor) and len(start) == len(clusters)
    ):
        raise UserError(
            "option-invalid",
            f"start is of type {type(start).__name__}; pass labels or centroids for each of the"
            f" {len(clusters)} clusterings.",
        )
    shared = rows if _uses_faiss(rows, engine, start, world) else Points(rows, world)
    options = {"iterations": iterations, "tolerance": tolerance, "engine": engine}
    labels_HN = torch.empty(len(clusters), len(rows), dtype=torch.int32, device=rows.device)
    found = []
    for h, k in enumerate(clusters):
        begin = start[h] if start is not None else None
        result = kmeans(shared, k, seed=seed + h, start=begin, **options)
        labels_HN[h] = result.labels
        found.append(result.centroids)
        if on_progress:
            on_progress(h, result)
    if centroids is not None:
        centroids[:] = found
    return labels_HN


def _uses_faiss(rows: Tensor, engine: Engine, start: object | None, world: World | None) -> bool:
    if start is not None or engine == "lloyd":
        return False
    ranks = world.size if world else 1
    if engine == "faiss" and ranks > 1:
        raise UserError(
            "option-conflict",
            f"--kmeans faiss clusters in one process, not over {ranks}; use --kmeans lloyd.",
        )
    return engine == "faiss" or (rows.device.type != "cuda" and ranks == 1)


def _faiss(rows: Tensor, clusters: int, seed: int, iterations: int) -> KMeans:
    import faiss

    x = np.ascontiguousarray(rows.detach().to("cpu", torch.float32).numpy())
    size, dim = x.shape
    if not np.isfinite(x).all():
        raise not_finite_error()
    found = faiss.Kmeans(
        dim,
        clusters,
        niter=iterations,
        seed=seed,
        max_points_per_centroid=size,  # faiss would otherwise sample 256 points a centroid
        min_points_per_centroid=1,
    )
    found.train(x)
    distances, labels = found.index.search(x, 1)
    return KMeans(
        torch.from_numpy(labels[:, 0].astype(np.int32)),
        torch.from_numpy(np.asarray(found.centroids, dtype=np.float32).copy()),
        float(distances.sum(dtype=np.float64)),
        iterations,
    )
