"""Choose the number of clusters of an embedding, without labels."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clustering import kmeans
from ..engine.counter_rng import SAMPLE, permutation

_COMPONENTS = 8
_MOST = 100  # clusters
_LEAST_SIZE = 8  # mean images of a cluster
_SAMPLE = 2_000  # images
_STARTS = 10  # of a clustering, of which the tightest counts
_GRID = 1.2  # ratio of candidates


class ClusterCount(NamedTuple):
    """A number of clusters and the scores that it was chosen by."""

    k: int
    silhouettes: dict[int, float]
    """Mean silhouette of each candidate, -1 to 1."""
    images: int
    """Images of the sample."""


def choose_clusters(rows: Tensor, *, seed: int = 0) -> ClusterCount:
    """Choose the k whose k-means clusters have the largest mean silhouette (Rousseeuw 1987).

    Rows are centered, reduced to 8 principal components and scaled to unit length. On five
    embeddings this was within a factor of 1.5 of the classes in 70-76 % of 50 draws (100 % with a
    trained head, 40 % with a weak network), with 64 components in 66 %, by stability of halves in
    56 %, and by the eigengap in 70 % (benchmarks/results/cluster_count.md).

    Args:
        rows: float [N, D], any scale.
        seed: random seed of the sample of 2,000 images and of the clusterings.

    Returns:
        k from 2 to 100, and at most a few for few images; see :func:`candidates`. 1 for fewer than
        6 images, or if no number of clusters has a positive silhouette.
    """
    from sklearn.metrics import silhouette_score

    sample = permutation(len(rows), seed, SAMPLE)[:_SAMPLE].sort().values
    x = F.normalize(rows[sample].detach().cpu().float(), dim=1)
    reduced = principal_components(x, _COMPONENTS)
    away = (1 - reduced @ reduced.T).clamp(min=0).fill_diagonal_(0).numpy()
    silhouettes = {}
    for k in candidates(len(x)) if reduced.shape[1] else []:  # no component: all rows are equal
        starts = (kmeans(reduced, k, seed=seed + start) for start in range(_STARTS))
        labels = min(starts, key=lambda found: found.inertia).labels.numpy()
        if len(set(labels)) > 1:  # equal rows leave clusters empty
            silhouettes[k] = float(silhouette_score(away, labels, metric="precomputed"))
    best = max(silhouettes, key=lambda k: silhouettes[k], default=1)
    return ClusterCount(best if silhouettes.get(best, 0) > 0 else 1, silhouettes, len(x))


def principal_components(rows: Tensor, count: int) -> Tensor:
    """Return the first principal components of rows [N, D] as unit rows [N, count or fewer]."""
    centered = (rows - rows.mean(dim=0)).double()
    values, vectors = torch.linalg.eigh(centered.T @ centered)
    kept = vectors[:, values > 1e-9 * values[-1].clamp(min=1e-9)][:, -count:]
    return F.normalize(centered @ kept, dim=1).float()


def candidates(images: int) -> list[int]:
    """Return numbers of clusters to try, each at most a fifth above the one before.

    A cluster has 8 images in the mean, or 3 where there are no more than 5 clusters.
    """
    found, most = [], min(_MOST, max(images // _LEAST_SIZE, min(5, images // 3)))
    k = 2
    while k <= most:
        found.append(k)
        k = max(k + 1, int(k * _GRID))
    return found
