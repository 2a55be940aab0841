"""Cluster the images of a table by k-means, and measure how well each image fits."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clustering import kmeans
from ..config import check_argument_types
from ..engine.kmeans import KMeans
from ..errors import UserError
from ..io.console import notify, show_progress
from ..io.result_file import check_result_file, write_result
from .cluster_count import choose_clusters
from .open_table import open_table
from .table import EmbeddingTable

_STARTS = 5  # clusterings, of which the tightest counts
_CHUNK = 8_192
EXEMPLARS = 12


class Fit(NamedTuple):
    """How well each of N images fits its cluster."""

    distance: Tensor
    """float32 [N]: cosine distance to the mean of the cluster, 0-2."""
    silhouette: Tensor
    """float32 [N], -1 to 1: below 0 another cluster is nearer; 0 for a cluster of one image."""
    tightness: Tensor
    """float32 [k]: mean cosine similarity of two images of the cluster; NaN for one image."""


@check_argument_types
def cluster_images(
    table: str | Path | EmbeddingTable,
    k: int | Literal["auto"] = "auto",
    *,
    seed: int = 0,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Cluster the images of a table.

    The tightest of five k-means clusterings counts. Clusters are numbered from the tightest on.

    Args:
        table: run folder, or table written by ``localagg embed``.
        k: number of clusters. ``auto`` chooses it; see :mod:`~localagg.embeddings.cluster_count`.
        seed: random seed of the first of five starts.
        out: file to write: path, index, label, cluster, distance, silhouette of each image; see
            :class:`Fit`.

    Returns:
        {"table", "images": N, "k": clusters with images, "chosen": {"silhouettes": {k: mean},
        "images": of the sample} or None,
        "silhouette": mean over images, "clusters": [{"cluster", "size", "tightness", "silhouette",
        with labels "label": the most common and "purity": its share of the labeled images,
        "exemplars": the 12 images nearest to the mean}]}.

    Raises:
        UserError: an invalid k or ``out``, or a table that cannot be read.
    """
    check_result_file(out)
    if k != "auto" and k < 1:
        raise UserError("option-invalid", f"--k is {k}; it must be at least 1, or auto.")
    opened = open_table(table)
    rows_ND, chosen = opened.unit_embeddings(), None
    if k == "auto":
        found = choose_clusters(rows_ND, seed=seed)
        k, chosen = found.k, {"silhouettes": found.silhouettes, "images": found.images}
    if k > len(rows_ND):
        raise UserError("option-invalid", f"--k {k:,} exceeds the {len(rows_ND):,} images.")
    labels_N, fit = cluster_rows(rows_ND, k, seed=seed)
    if out is not None:
        columns = {name: opened.images[name] for name in opened.images.column_names}
        values = {"cluster": labels_N, "distance": fit.distance, "silhouette": fit.silhouette}
        write_result(out, columns | {name: value.numpy() for name, value in values.items()})
    return {
        "table": str(opened.path),
        "images": len(rows_ND),
        "k": len(fit.tightness),
        "chosen": chosen,
        "silhouette": fit.silhouette.mean().item(),
        "clusters": [
            _describe(opened, labels_N, fit, cluster) for cluster in range(len(fit.tightness))
        ],
    }


def cluster_rows(rows: Tensor, k: int, *, seed: int = 0) -> tuple[Tensor, Fit]:
    """Cluster unit rows; clusters are numbered from the tightest on, and none is empty.

    Args:
        rows: float32 unit rows [N, D].
        k: 1..N, number of clusters. Identical rows may leave fewer.
        seed: random seed of the first of five starts.

    Returns:
        (cluster of each row, int64 [N]; how well it fits).
    """
    labels_N = _best_clustering(rows, k, seed).labels
    kept, labels_N = labels_N.unique(return_inverse=True)
    if len(kept) < k:
        notify(f"Only {len(kept):,} of {k:,} clusters have images: the others are identical.")
    return _number_by_tightness(labels_N, measure_fit(rows, labels_N, len(kept)))


def measure_fit(rows: Tensor, labels: Tensor, clusters: int) -> Fit:
    """Measure how well rows fit their clusters, by cosine distance and exactly.

    The mean distance of a unit row x to the rows of a cluster is 1 - x . m, with m their mean, so
    all silhouettes cost one product with the k means.

    Args:
        rows: float32 unit rows [N, D].
        labels: int64 [N]; none of the k clusters is empty.
        clusters: k.
    """
    sums_KD = torch.zeros(clusters, rows.shape[1]).index_add_(0, labels, rows)
    sizes_K = torch.bincount(labels, minlength=clusters).float()
    means_KD = sums_KD / sizes_K.unsqueeze(1)
    parts = []
    for part_ND, part_N in zip(rows.split(_CHUNK), labels.split(_CHUNK), strict=True):
        away_NK, own_N1, size_N = 1 - part_ND @ means_KD.T, part_N.unsqueeze(1), sizes_K[part_N]
        others_N = (size_N - 1).clamp(min=1)
        inside_N = away_NK.gather(1, own_N1).squeeze(1) * size_N / others_N  # 0 to itself
        outside_N = away_NK.scatter(1, own_N1, torch.inf).amin(dim=1)
        scale_N = torch.maximum(inside_N, outside_N).clamp(min=1e-12)
        silhouette_N = ((outside_N - inside_N) / scale_N).clamp(-1, 1)
        silhouette_N[(size_N == 1) | outside_N.isinf()] = 0
        center_ND = F.normalize(means_KD, dim=1)[part_N]
        parts.append((1 - (part_ND * center_ND).sum(dim=1), silhouette_N))
    distance_N, silhouette_N = (torch.cat(each) for each in zip(*parts, strict=True))
    pairs_K = sizes_K * (sizes_K - 1)
    tightness_K = (sums_KD.square().sum(dim=1) - sizes_K) / pairs_K  # 0 / 0: NaN
    tightness_K[pairs_K == 0] = torch.nan
    return Fit(distance_N.clamp(min=0), silhouette_N, tightness_K)


def _best_clustering(rows: Tensor, k: int, seed: int) -> KMeans:
    best = None
    with show_progress("clustering") as show:
        for start in range(_STARTS if k > 1 else 1):
            found = kmeans(rows, k, seed=seed + start)
            if best is None or found.inertia < best.inertia:
                best = found
            show(start + 1, _STARTS)
    assert best is not None
    return best


def _number_by_tightness(labels: Tensor, fit: Fit) -> tuple[Tensor, Fit]:
    order = fit.tightness.nan_to_num(-2).argsort(descending=True, stable=True)
    return order.argsort()[labels], fit._replace(tightness=fit.tightness[order])


def _describe(table: EmbeddingTable, labels: Tensor, fit: Fit, cluster: int) -> dict[str, Any]:
    members = (labels == cluster).nonzero().flatten()
    nearest = members[fit.distance[members].argsort(stable=True)[:EXEMPLARS]].tolist()
    tightness = fit.tightness[cluster].item()
    described: dict[str, Any] = {
        "cluster": cluster,
        "size": len(members),
        "tightness": None if tightness != tightness else tightness,
        "silhouette": fit.silhouette[members].mean().item(),
    }
    if "label" in table.images.column_names:
        counts = table.images["label"].take(members.tolist()).drop_null().value_counts().to_pylist()
        most = max(counts, key=lambda each: each["counts"], default={"values": None, "counts": 0})
        labeled = sum(each["counts"] for each in counts)
        described["label"] = most["values"]
        described["purity"] = most["counts"] / labeled if labeled else None
    distances = fit.distance[nearest].tolist()
    described["exemplars"] = [
        {**row, "distance": distance}
        for row, distance in zip(table.rows(nearest), distances, strict=True)
    ]
    return described
