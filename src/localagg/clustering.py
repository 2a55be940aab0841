"""The H k-means clusterings of the bank that define close neighbors (LA section 3.1)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .bank import MemoryBank
from .config import UserError

SEED = 1234  # the reference's: clustering h is seeded SEED + h


class KMeans(NamedTuple):
    """One clustering of N rows into k clusters."""

    labels: Tensor
    """int32 [N], the nearest centroid of each row."""
    centroids: Tensor
    """float32 [k, D]."""
    inertia: float
    """Sum of squared distances of the rows to their centroids."""


def kmeans(
    rows: Tensor,
    clusters: int,
    *,
    seed: int = SEED,
    iterations: int = 20,
    start: Tensor | None = None,
) -> KMeans:
    """Euclidean k-means by faiss with the reference's settings: 20 iterations, all points used.

    Args:
        rows: [N, D], any float dtype and device (computed on the CPU in float32).
        clusters: k, at most N.
        seed: of the first centroids, which are rows drawn at random.
        iterations: Lloyd iterations.
        start: centroids [k, D] to begin from instead (a warm start).

    Returns:
        A :class:`KMeans` on the CPU.

    Raises:
        UserError: more clusters than rows, or rows that are not finite.
    """
    import faiss

    x = np.ascontiguousarray(rows.detach().to("cpu", torch.float32).numpy())
    size, dim = x.shape
    if not 1 <= clusters <= size:
        raise UserError(
            f"{clusters:,} clusters of {size:,} images cannot be;"
            f" set --clusters to at most {size:,}."
        )
    if not np.isfinite(x).all():
        raise UserError("The bank holds values that are not finite and cannot be clustered.")
    engine = faiss.Kmeans(
        dim,
        clusters,
        niter=iterations,
        seed=seed,
        max_points_per_centroid=size,  # faiss would otherwise sample 256 points a centroid
        min_points_per_centroid=1,
    )
    engine.train(x, init_centroids=None if start is None else start.cpu().float().numpy())
    distances, labels = engine.index.search(x, 1)
    return KMeans(
        torch.from_numpy(labels[:, 0].astype(np.int32)),
        torch.from_numpy(np.asarray(engine.centroids, dtype=np.float32).copy()),
        float(distances.sum(dtype=np.float64)),
    )


def cluster(
    bank: Tensor | MemoryBank,
    clusters: Sequence[int],
    *,
    seed: int = SEED,
    iterations: int = 20,
    start: Sequence[Tensor] | None = None,
    on_progress: Callable[[int, KMeans], None] | None = None,
    centroids: list[Tensor] | None = None,
) -> Tensor:
    """H clusterings of the bank.

    Args:
        bank: rows [N, D], or a MemoryBank.
        clusters: (k_1, ..., k_H).
        seed: clustering h is seeded ``seed + h``.
        iterations: Lloyd iterations of each.
        start: H centroid tensors [k_h, D] of an earlier call, for a warm start.
        on_progress: called as ``on_progress(h, result)`` after each clustering.
        centroids: a list that is emptied and filled with the H results, for the next warm start.

    Returns:
        Labels, int32 [H, N], on the bank's device.

    Raises:
        UserError: more clusters than rows.
    """
    rows = bank if isinstance(bank, Tensor) else bank.rows
    labels_HN = torch.empty(len(clusters), len(rows), dtype=torch.int32)
    found = []
    for h, k in enumerate(clusters):
        result = kmeans(
            rows, k, seed=seed + h, iterations=iterations, start=start[h] if start else None
        )
        labels_HN[h] = result.labels
        found.append(result.centroids)
        if on_progress:
            on_progress(h, result)
    if centroids is not None:
        centroids[:] = found
    return labels_HN.to(rows.device)
