"""Compare heads and clusterings on the same frozen features: IR, LA, SimCLR, SCAN and others.

    localagg pretrain adapt --data IMAGES --model timm:tf_efficientnet_lite0 --weights FILE \\
        --cache CACHE --out RUN
    python benchmarks/adapt.py IMAGES=CACHE/KEY/features.npy ... --seeds 3

The first command leaves features of 1 + 6 views an image in CACHE. Every method learns on these;
200-NN (leave one out) and k-means (as many clusters as classes, best of 4 starts) measure the
central views. Each seed sets order, views, weights and k-means. Every value of every seed goes to
``--out`` (Parquet), where a later call adds what is missing (``--seeds 0``: nothing). The table has
means, 95 % intervals over seeds, and CPU seconds. ``--trials`` compares settings of the LA head
instead, for the rule in ``recipes/derived_settings.py``.
"""

import argparse
import itertools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from peer_heads import (
    Found,
    Method,
    measured,
    scan_head,
    simclr_head,
    spectral,
    spectral_rows,
    temi_head,
    umap_kmeans,
    umap_rows,
    whitened_head,
)
from scipy.stats import t as student
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor, nn

import report
from localagg.config import override
from localagg.data.images.augment import Augment
from localagg.data.sources.open import open_images
from localagg.distributed.collectives import World
from localagg.engine.counter_rng import ORDER, permutation
from localagg.evaluation.cluster_metrics import cluster_accuracy
from localagg.evaluation.knn import knn_accuracy
from localagg.recipes.builtin import recipe
from localagg.recipes.derived_settings import resolve_defaults
from localagg.recipes.schedule import Schedule
from localagg.training.frozen.frozen_features import FrozenFeatures
from localagg.training.frozen.trained_part import start_from_features
from localagg.training.learner import Learner
from localagg.training.step import take_step
from localagg.training.time_shares import TimeShares

METRICS = ("200-NN", "NMI", "accuracy", "CPU seconds")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", nargs="+", metavar="IMAGES=FEATURES.npy")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", action="store_true")
    parser.add_argument("--only", nargs="*", default=[], help="names of methods")
    parser.add_argument("--name", default="adapt", help="of the table")
    parser.add_argument("--out", type=Path, default=Path("adapt.parquet"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    methods = TRIALS if arguments.trials else METHODS
    methods = {name: methods[name] for name in arguments.only or methods}
    out = arguments.out
    rows: list[dict[str, Any]] = pq.read_table(out).to_pylist() if out.exists() else []
    known = {(row["images"], row["method"], row["seed"]) for row in rows}
    for images, file in (each.rsplit("=", 1) for each in arguments.sets):
        labels = open_images(images).labels
        assert labels is not None
        values = np.load(file)
        name = "/".join(Path(images).parts[-2:])
        for method, seed in itertools.product(methods, range(arguments.seeds)):
            if (name, method, seed) in known:
                continue
            start = time.process_time()
            found = methods[method](FrozenFeatures(values, {}, seed), len(labels.unique()), seed)
            spent = time.process_time() - start
            row = {"images": name, "size": len(labels), "method": method, "seed": seed}
            rows.append({**row, **score(found, labels, seed), "CPU seconds": spent})
            print(rows[-1], flush=True)
            pq.write_table(pa.Table.from_pylist(rows), out)
    load = " ".join(f"{each:.1f}" for each in os.getloadavg())
    report.write(
        "adapt_trials" if arguments.trials else arguments.name,
        "Settings of the LA head" if arguments.trials else "Heads on the same frozen features",
        ["images", "N", "method", "seeds", *METRICS],
        table(rows),
        f"Means and half widths of 95 % intervals over the seeds. Load: {load}.{paired(rows)}",
    )


def paired(rows: list[dict[str, Any]]) -> str:
    """Return a sentence on the NMI of LA less that of IR with the same seed, for each set."""
    found = []
    for images in dict.fromkeys(row["images"] for row in rows):
        ir, la = (
            {r["seed"]: r["NMI"] for r in rows if (r["images"], r["method"]) == (images, name)}
            for name in ("IR head", "LA head")
        )
        gains = [la[seed] - ir[seed] for seed in ir.keys() & la.keys()]
        if len(gains) > 1:
            half = student.ppf(0.975, len(gains) - 1) * np.std(gains) / math.sqrt(len(gains) - 1)
            found.append(f"{images} {np.mean(gains):+.3f} ± {half:.3f} ({len(gains)} seeds)")
    return f" NMI of LA less IR with the same seed: {'; '.join(found)}." if found else ""


def score(found: Found, labels: Tensor, seed: int) -> dict[str, float | None]:
    """Return 200-NN of rows, and NMI and accuracy of their k-means or of clusters."""
    neighbors = None
    if isinstance(found, Tensor):
        everything = torch.arange(len(labels))
        rows = F.normalize(found, dim=1)
        votes = knn_accuracy(rows, labels, rows, labels, k=(200,), exclude=everything)
        neighbors, found = votes["knn200"], kmeans(rows, len(labels.unique()), seed)
    return {
        "200-NN": neighbors,
        "NMI": float(normalized_mutual_info_score(labels.numpy(), found)),
        "accuracy": cluster_accuracy(labels.numpy(), found),
    }


def table(rows: list[dict[str, Any]]) -> list[list[object]]:
    """Return a line for each set and method."""
    lines: list[list[object]] = []
    for images, size, method in dict.fromkeys((r["images"], r["size"], r["method"]) for r in rows):
        own = [r for r in rows if (r["images"], r["method"]) == (images, method)]
        cells = []
        for metric in METRICS:
            x = [r[metric] for r in own if r[metric] is not None]
            if not x:
                cells.append("")
                continue
            half = student.ppf(0.975, len(x) - 1) * np.std(x) / math.sqrt(max(1, len(x) - 1))
            spread = f" ± {half:.3f}" if len(x) > 1 else ""
            cells.append(
                f"{np.mean(x):.0f}" if metric == "CPU seconds" else f"{np.mean(x):.3f}{spread}"
            )
        lines.append([images, f"{size:,}", method, len(own), *cells])
    return lines


def kmeans(rows: Tensor, k: int, seed: int) -> np.ndarray:
    return KMeans(k, n_init=4, random_state=seed).fit_predict(rows.numpy())


class _Features(nn.Module):
    """Stand for the backbone, whose features are at hand."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, images: Tensor) -> Tensor:
        return images.new_zeros(len(images), self.channels)


def localagg_head(*, aggregate: bool = True, **options: Any) -> Method:
    """Return the head of ``localagg pretrain adapt``: its own steps on the features."""

    def learn(features: FrozenFeatures, classes: int, seed: int) -> Tensor:
        size = len(features.values)
        config = override(recipe("adapt").config, seed=seed, device="cpu", **options)
        config = resolve_defaults(config, size, 112)
        if not aggregate:
            config = override(config, ir_epochs=config.epochs)
        learner = Learner(config, size, backbone=_Features(features.values.shape[2]))
        everything = torch.arange(size)
        start_from_features(learner.encoder, learner.bank, features, everything, World())
        order = lambda epoch: permutation(size, seed, ORDER, epoch)  # noqa: E731
        feed: Any = SimpleNamespace(world=World(), order=order)
        schedule, augment = Schedule(config, size), Augment(config.views, seed)
        while learner.step < schedule.total_steps:
            epoch, first, aggregating = schedule.position(learner.step)
            if schedule.should_cluster(learner.step, has_labels=learner.labels is not None):
                learner.recluster()
            batch_size = schedule.batch_size(aggregating=aggregating)
            for batch in features.batches(feed, epoch, first, batch_size):
                take_step(
                    learner,
                    augment,
                    batch,
                    epoch,
                    aggregating=aggregating,
                    size=batch_size,
                    learning_rate=schedule.learning_rate(learner.step),
                    timer=TimeShares(learner.device),
                )
        with torch.no_grad():
            return learner.encoder(features.measured(everything))

    return learn


def frozen(features: FrozenFeatures, classes: int, seed: int) -> Tensor:
    return measured(features)


def whitened(features: FrozenFeatures, classes: int, seed: int) -> Tensor:
    return whitened_head(features)(features.measured(torch.arange(len(features.values)))).detach()


def scaled_head(neighbors: int | None = None, clusters: int | None = None) -> Method:
    """Return LA's head with K or the clusters of each clustering a part of the images."""

    def learn(features: FrozenFeatures, classes: int, seed: int) -> Found:
        size, options = len(features.values), {}
        if neighbors:
            options["neighbors"] = size // neighbors
        if clusters:
            options["clusters"] = (size // clusters,) * 5
        return localagg_head(**options)(features, classes, seed)

    return learn


def clustered_head(cluster: Callable[[Tensor, int, int], np.ndarray]) -> Method:
    """Return clusters of the embeddings that LA's head learns."""

    def learn(features: FrozenFeatures, classes: int, seed: int) -> Found:
        rows = localagg_head()(features, classes, seed)
        assert isinstance(rows, Tensor)
        return cluster(F.normalize(rows, dim=1), classes, seed)

    return learn


METHODS: dict[str, Method] = {
    "frozen features": frozen,
    "whitened components": whitened,
    "IR head": localagg_head(aggregate=False),
    "LA head": localagg_head(),
    "spectral clustering": spectral,
    "UMAP + k-means": umap_kmeans,
    "SimCLR head, temperature 0.1": simclr_head(0.1),
    "SimCLR head, temperature 0.5": simclr_head(0.5),
    "SCAN head, entropy 5, rate 1e-4": scan_head(5.0, 1e-4),
    "SCAN head, entropy 2, rate 1e-4": scan_head(2.0, 1e-4),
    "TEMI, 4 heads": temi_head(4),
}
TRIALS: dict[str, Method] = {
    "defaults": localagg_head(),
    **{f"batch {size}": localagg_head(batch_size=size) for size in (32, 64, 128, 256)},
    **{f"K = N / {part}": scaled_head(neighbors=part) for part in (16, 2)},
    **{f"N / {part} clusters": scaled_head(clusters=part) for part in (100, 33)},
    "half of the loss IR's": localagg_head(instance_share=0.5),
    **{f"rate {rate}": localagg_head(learning_rate=rate) for rate in (0.01, 0.003)},
    "40 epochs": localagg_head(epochs=40),
    "defaults, then spectral clustering": clustered_head(spectral_rows),
    "defaults, then UMAP + k-means": clustered_head(umap_rows),
}

if __name__ == "__main__":
    main()
