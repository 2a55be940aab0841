"""How often is a number of clusters chosen without labels within a factor of 1.5 of the classes?

    python benchmarks/cluster_count.py digits.parquet eurosat.parquet ...

Tables are those of ``localagg embed`` with labels, or .npz files of ``rows`` [N, D] and
``labels``; ``digits`` stands for scikit-learn's pixels. Random subsets of 2, 3, 5, 7 and 10 classes
of each table are drawn, two each, of at most 500 images.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score, silhouette_score
from torch import Tensor

import report
from localagg.clustering import kmeans
from localagg.embeddings.cluster_count import candidates, choose_clusters, principal_components
from localagg.embeddings.open_table import open_table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="+")
    parser.add_argument("--draws", type=int, default=2)
    arguments = parser.parse_args()
    right: dict[str, dict[str, list[bool]]] = {name: defaultdict(list) for name in METHODS}
    draw = np.random.default_rng(0)
    names = [Path(table).stem for table in arguments.tables]
    for name, table in zip(names, arguments.tables, strict=True):
        rows, labels = _load(table)
        for classes in (2, 3, 5, 7, 10) * arguments.draws:
            chosen = draw.permutation(np.unique(labels))[:classes]
            index = draw.permutation(np.flatnonzero(np.isin(labels, chosen)))[:500]
            x = F.normalize(rows[index], dim=1)
            for method, choose in METHODS.items():
                k = choose(x)
                right[method][name].append(1 / 1.5 <= k / classes <= 1.5)
    lines = []
    for method, found in right.items():
        shares = [f"{sum(found[name])} of {len(found[name])}" for name in names]
        every = [each for name in names for each in found[name]]
        lines.append([method, *shares, f"{np.mean(every):.0%}"])
    report.write(
        "cluster_count",
        "Number of clusters within a factor of 1.5 of the classes",
        ["method", *names, "all"],
        lines,
    )


def _load(table: str) -> tuple[Tensor, np.ndarray]:
    if table == "digits":
        digits = load_digits()
        return torch.from_numpy(digits.data).float(), digits.target
    if table.endswith(".npz"):
        found = np.load(table)
        return torch.from_numpy(found["rows"]).float(), found["labels"]
    opened = open_table(table)
    return opened.unit_embeddings(), np.array(opened.images["label"].to_pylist())


def silhouette(components: int) -> Callable[[Tensor], int]:
    """The largest mean silhouette by cosine."""

    def choose(x: Tensor) -> int:
        reduced = principal_components(x, components)
        scores = {}
        for k in candidates(len(x)):
            labels = _tightest(reduced, k).numpy()
            scores[k] = silhouette_score(reduced.numpy(), labels, metric="cosine")
        return max(scores, key=lambda k: scores[k])

    return choose


def stability(x: Tensor) -> int:
    """The largest adjusted Rand index of k-means on the two halves."""
    reduced = principal_components(x, 64)
    halves = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).chunk(2)
    scores = {}
    for k in candidates(len(x) // 2):
        one, two = (kmeans(reduced[half], k).centroids for half in halves)
        labels = [torch.cdist(reduced, centroids).argmin(dim=1).numpy() for centroids in (one, two)]
        scores[k] = adjusted_rand_score(*labels)
    return max(scores, key=lambda k: scores[k])


def eigengap(x: Tensor) -> int:
    """The largest gap of the normalized Laplacian of the graph of 20 neighbors."""
    reduced = principal_components(x, 64)
    similar = reduced @ reduced.T
    near = similar.fill_diagonal_(-1).topk(20).indices
    graph = torch.zeros_like(similar).scatter_(1, near, 1.0)
    graph = torch.maximum(graph, graph.T)
    scale = graph.sum(dim=1).rsqrt()
    values = torch.linalg.eigvalsh(torch.eye(len(x)) - scale[:, None] * graph * scale)
    gaps = values.diff()[1 : max(candidates(len(x)))]
    return int(gaps.argmax()) + 2


def _tightest(rows: Tensor, k: int) -> Tensor:
    return min((kmeans(rows, k, seed=seed) for seed in range(3)), key=lambda f: f.inertia).labels


METHODS: dict[str, Callable[[Tensor], int]] = {
    "localagg clusters --k auto": lambda x: choose_clusters(x).k,
    "silhouette, 4 components": silhouette(4),
    "silhouette, 8 components": silhouette(8),
    "silhouette, 16 components": silhouette(16),
    "silhouette, 64 components": silhouette(64),
    "eigengap, 64 components": eigengap,
    "stability of halves, 64 components": stability,
}

if __name__ == "__main__":
    main()
