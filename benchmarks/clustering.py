"""Does a warm start cluster as well as twenty cold iterations of faiss, in a fifth of the time?

On the banks of successive epochs of a real run (``epoch_banks.py`` makes them): the first is
clustered cold, each further one cold by faiss, written out below, and warm from the labels of the
warm clustering before, as a run does it. Inertia is compared clustering by clustering; agreement is
the adjusted Rand index, beside that of two cold clusterings of unlike seeds.
"""

import argparse
import os
from pathlib import Path

import faiss
import numpy as np
import torch
from safetensors.torch import load_file
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

import report
from localagg import checkpoint
from localagg.clustering import SEED, cluster
from localagg.config import ObjectiveConfig
from localagg.engine.kmeans import Points, argmax_columns

THREADS = len(os.sched_getaffinity(0))
RULE = ObjectiveConfig()


# --- The usual way: faiss, cold, 20 iterations ---


def cold(x: np.ndarray, clusters: list[int], seed: int = SEED) -> tuple[list[np.ndarray], list]:
    """Labels and inertia of each clustering."""
    labels, inertia = [], []
    for h, k in enumerate(clusters):
        engine = faiss.Kmeans(
            x.shape[1], k, niter=20, seed=seed + h, max_points_per_centroid=len(x)
        )
        engine.train(x)
        distances, found = engine.index.search(x, 1)
        labels.append(found[:, 0])
        inertia.append(float(distances.sum(dtype=np.float64)))
    return labels, inertia


# --- Ours ---


def warm(bank: Tensor, clusters: list[int], start: Tensor) -> tuple[Tensor, list, list]:
    """Labels, and inertia and iterations of each clustering."""
    found = []
    labels = cluster(
        bank,
        clusters,
        start=start,
        iterations=RULE.warm_iterations,
        tolerance=RULE.warm_tolerance,
        on_progress=lambda h, result: found.append(result),
    )
    return labels, [r.inertia for r in found], [r.iterations for r in found]


def measure(bank: Tensor, clusters: list[int], before: Tensor, runs: int) -> tuple[Tensor, list]:
    """The warm labels, and a row of the table."""
    x = bank.numpy()
    seconds = report.interleaved(
        {"cold": lambda: cold(x, clusters), "warm": lambda: warm(bank, clusters, before)}, runs
    )
    cold_labels, cold_inertia = cold(x, clusters)
    other, _ = cold(x, clusters, seed=SEED + 1000)
    labels, inertia, iterations = warm(bank, clusters, before)
    ratios = [a / b for a, b in zip(inertia, cold_inertia, strict=True)]
    return labels, [
        f"{seconds['cold']:.3f}",
        f"{seconds['warm']:.3f}",
        f"{seconds['cold'] / seconds['warm']:.1f}",
        " ".join(map(str, iterations)),
        f"{np.mean(ratios):.4f}",
        f"{max(ratios):.4f}",
        agreement(labels, cold_labels),
        agreement(other, cold_labels),
        agreement(labels, before),
    ]


def agreement(one, other) -> str:
    """Mean adjusted Rand index over the H clusterings."""
    scores = [adjusted_rand_score(a, b) for a, b in zip(one, other, strict=True)]
    return f"{np.mean(scores):.2f}"


def one_pass(bank: Tensor, clusters: list[int], runs: int) -> dict[str, float]:
    """Seconds to assign rows to the centroids of all clusterings, by H products and by one."""
    rows = Points(bank)
    centroids = [bank[torch.randperm(len(bank))[:k]] for k in clusters]
    coarse = bank.bfloat16() if rows.bfloat16 else bank
    joined = torch.cat(centroids).to(coarse.dtype).T.contiguous()
    half = torch.cat(centroids).square().sum(dim=1) / 2

    def together() -> None:
        for part in coarse.split(512):
            scores = (part @ joined - half).split(clusters, dim=1)
            [argmax_columns(score) for score in scores]

    def apart() -> None:
        for one in centroids:
            rows.assign(one, exact=False)

    return report.interleaved({"apart": apart, "together": together}, runs)


def load(path: Path) -> Tensor:
    """The bank of a file with ``rows``, or of a run folder."""
    return checkpoint.load_bank(path) if path.is_dir() else load_file(path)["rows"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("banks", type=Path, nargs="+", help="files or runs, in their order")
    parser.add_argument("--clusters", type=int, nargs="+", default=[781, 781, 781])
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    faiss.omp_set_num_threads(THREADS)
    banks, clusters = [load(path) for path in options.banks], options.clusters
    labels = torch.from_numpy(np.stack(cold(banks[0].numpy(), clusters)[0])).int()
    rows = []
    for number in range(1, len(banks)):
        drift = (banks[number] * banks[number - 1]).sum(dim=1).mean()
        labels, row = measure(banks[number], clusters, labels, options.runs)
        rows.append([f"{number}", f"{drift:.3f}", *row])
    passes = one_pass(banks[-1], clusters, options.runs)
    size, dim = banks[0].shape
    bf16 = "bf16" if Points(banks[0]).bfloat16 else "float32"
    columns = ["bank", "cos to last", "cold s", "warm s", "x", "iterations", "inertia", "at worst"]
    report.write(
        "clustering",
        f"k-means: {len(clusters)} clusterings of {size:,} x {dim} rows into {clusters[0]:,}",
        [*columns, "ARI to cold", "of cold seeds", "to last"],
        rows,
        f"{THREADS} threads each. Inertia: warm over cold, mean and largest of the clusterings."
        f" Warm ends at a fall of {RULE.warm_tolerance} or less; its leading passes are {bf16}."
        f" One pass over the bank for all clusterings: {passes['apart'] * 1e3:.0f} ms by a product"
        f" each, {passes['together'] * 1e3:.0f} ms by one product for all.",
    )


if __name__ == "__main__":
    main()
