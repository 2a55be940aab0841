"""Agreement of an embedding's clusters with classes: k-means scored against labels."""

from typing import Any, cast

import numpy as np
from torch import Tensor

from ..errors import UserError

_STARTS = 10


def cluster_scores(rows: Tensor, labels: Tensor, *, seeds: int = 5) -> dict[str, Any]:
    """Return NMI, ARI and Hungarian accuracy of k-means with as many clusters as classes.

    The spread over seeds, each the best of ten starts, shows the remaining randomness.

    Args:
        rows: the embedding, float [N, D].
        labels: int64 [N].
        seeds: number of clusterings, seeded 0, 1, ...

    Returns:
        {"nmi": spread, "ari": spread, "accuracy": spread, "clusters": k, "images": N, "seeds",
        "starts"} with spread {"mean", "std" (of the sample, 0 for one seed), "min", "max"}. NMI is
        normalized by the arithmetic mean of the entropies; ARI is 0 in the mean of random
        clusterings and may be negative.

    Raises:
        UserError: fewer than two classes, or values that are not finite.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    x, classes = rows.detach().cpu().float().numpy(), labels.cpu().numpy()
    clusters = len(np.unique(classes))
    if clusters < 2:
        raise UserError(
            "no-labels", f"All {len(x):,} images have the same label; clusters need two classes."
        )
    if not np.isfinite(x).all():
        raise UserError("not-finite", "The embeddings contain values that are not finite.")
    measures = {
        "nmi": normalized_mutual_info_score,
        "ari": adjusted_rand_score,
        "accuracy": cluster_accuracy,
    }
    found: dict[str, list[float]] = {name: [] for name in measures}
    for seed in range(seeds):
        assigned = best_kmeans(x, clusters, seed=seed)
        for name, measure in measures.items():
            found[name].append(float(measure(classes, assigned)))
    spreads = {
        name: {
            "mean": float(np.mean(values)),
            "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
            "min": min(values),
            "max": max(values),
        }
        for name, values in found.items()
    }
    counts = {"clusters": clusters, "images": len(x), "seeds": seeds, "starts": _STARTS}
    return {**spreads, **counts}


def best_kmeans(
    x: np.ndarray, clusters: int, *, seed: int, sample: int = 10_000, sample_each: int = 100
) -> np.ndarray:
    """Cluster by the best of ten starts (k-means++, Lloyd's iterations), as one start may be poor.

    With at least twice as many rows as the sample, the starts run on evenly spread rows, and the
    best one continues on all rows.

    Args:
        x: float32 [N, D].
        clusters: k, at most N.
        seed: random seed of the starts.
        sample: rows of the sample, at least.
        sample_each: rows of the sample for each cluster, at least.

    Returns:
        int32 [N], the cluster of each row.
    """
    from sklearn.cluster import KMeans

    few = x[:: max(1, len(x) // max(sample, sample_each * clusters))]
    ten, one = cast(Any, _STARTS), cast(Any, 1)  # the annotation allows only "auto"
    found = KMeans(clusters, n_init=ten, random_state=seed).fit(few)
    if len(few) < len(x):
        found = KMeans(clusters, init=found.cluster_centers_, n_init=one).fit(x)
    return np.asarray(found.labels_)


def cluster_accuracy(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Return the Hungarian accuracy in 0-1: the best one-to-one match of clusters and classes.

    Args:
        labels: int [N], classes.
        clusters: int [N], clusters.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics.cluster import contingency_matrix

    counts = contingency_matrix(labels, clusters)
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / counts.sum())
