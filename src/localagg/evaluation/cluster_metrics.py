"""Do the clusters of an embedding fall together with classes? k-means of it against labels."""

from typing import Any, cast

import numpy as np
from torch import Tensor

from ..errors import UserError

_STARTS = 10
_FEW, _FEW_EACH = 10_000, 100  # rows, or rows a cluster if that is more, that choose the start


def cluster_scores(rows: Tensor, labels: Tensor, *, seeds: int = 5) -> dict[str, Any]:
    """NMI, ARI and Hungarian accuracy of k-means with as many clusters as there are classes.

    The spread over seeds, each of which clusters by :func:`best_of_ten`, tells what luck is left.

    Args:
        rows: the embedding, float [N, D].
        labels: int64 [N].
        seeds: clusterings, seeded 0, 1, ...

    Returns:
        {"nmi": spread, "ari": spread, "accuracy": spread, "clusters": k, "images": N, "seeds":
        seeds} with spread {"mean", "std" (of the sample, 0 for one seed), "min", "max"}. NMI is
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
            "TODO", f"All {len(x):,} images have the same label; clusters need two classes."
        )
    if not np.isfinite(x).all():
        raise UserError(
            "TODO", "The embeddings hold values that are not finite and cannot be clustered."
        )
    measures = {
        "nmi": normalized_mutual_info_score,
        "ari": adjusted_rand_score,
        "accuracy": cluster_accuracy,
    }
    found: dict[str, list[float]] = {name: [] for name in measures}
    for seed in range(seeds):
        assigned = best_of_ten(x, clusters, seed=seed)
        for name, measure in measures.items():
            found[name].append(float(measure(classes, assigned)))
    spreads = {name: _spread(values) for name, values in found.items()}
    return {**spreads, "clusters": clusters, "images": len(x), "seeds": seeds}


def best_of_ten(x: np.ndarray, clusters: int, *, seed: int) -> np.ndarray:
    """k-means as the best of ten starts (k-means++, Lloyd's iterations to their end): a single one
    may end anywhere, and what is measured is the space.

    Of 20,000 rows or more (and 200 a cluster) some evenly spread ones choose the start, and all go
    on from there.

    Args:
        x: float32 [N, D].
        clusters: k, at most N.
        seed: of the starts.

    Returns:
        int32 [N], the cluster of each row.
    """
    from sklearn.cluster import KMeans

    few = x[:: max(1, len(x) // max(_FEW, _FEW_EACH * clusters))]
    ten, one = cast(Any, _STARTS), cast(Any, 1)  # the annotation knows only the word "auto"
    found = KMeans(clusters, n_init=ten, random_state=seed).fit(few)
    if len(few) < len(x):
        found = KMeans(clusters, init=found.cluster_centers_, n_init=one).fit(x)
    return np.asarray(found.labels_)


def cluster_accuracy(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Share of samples in their cluster's class, under the best one-to-one match of the two.

    Args:
        labels: int [N], classes.
        clusters: int [N], clusters.

    Returns:
        0-1 (the Hungarian accuracy).
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics.cluster import contingency_matrix

    counts = contingency_matrix(labels, clusters)
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / counts.sum())


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
        "min": min(values),
        "max": max(values),
    }
