"""Floors of a run: raw pixels and the starting network, measured like the trained network."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clustering import kmeans
from .cluster_metrics import cluster_accuracy
from .knn import knn_accuracy, nearest_rows

RAW_PIXELS, STARTING, TRAINED = "raw pixels", "starting network", "trained network"
_VOTES = 200  # neighbors
_CLUSTERINGS = 4
_STARTS = 2  # of a clustering, of which the tightest counts
_ENOUGH = 20  # images; fewer give no verdict
_LEAST_CLUSTERED = 4  # images
_NMI_MARGIN = 0.02
Values = dict[str, float]


class ViewPairs(NamedTuple):
    """Unit rows of two views of the same n images."""

    index: Tensor
    """int64 [n], increasing: the images' indices in the source."""
    center: Tensor
    """float32 [n, D]: the central view."""
    other: Tensor
    """float32 [n, D]: a random view."""


class Protocol(NamedTuple):
    """Numbers that the measurements depend on."""

    images: int
    """n, the images measured."""
    neighbors: int
    """k that votes under the name ``knn200``: 200, at most the mean size of a class."""
    clusters: int
    """The classes, or without labels sqrt(n) / 2."""


def floor_protocol(images: int, labels: Tensor | None) -> Protocol:
    """Return the protocol for so many images.

    A vote of more neighbors than a class has images would measure the sizes of the classes.

    Args:
        images: n.
        labels: int64 [n], below 0 without a label; or None.
    """
    classes = labels[labels >= 0] if usable(labels) and labels is not None else None
    if classes is None:
        return Protocol(images, 0, min(images, max(2, round(math.sqrt(images) / 2))))
    count = len(classes.unique())
    return Protocol(images, max(1, min(_VOTES, len(classes) // count)), count)


def usable(labels: Tensor | None) -> bool:
    """Return whether two classes have labels, and one of them two images."""
    counts = [] if labels is None else labels[labels >= 0].unique(return_counts=True)[1].tolist()
    return len(counts) > 1 and max(counts) > 1


def measure_floors(pairs: ViewPairs, labels: Tensor | None) -> Values:
    """Measure an embedding with labels and without.

    Args:
        pairs: embeddings of two views of n images.
        labels: int64 [n], below 0 without a label; or None.

    Returns:
        Those that n and the labels permit of: "knn1", "knn200": accuracy by neighbors among the
        labeled images, leave one out, in 0-1; "nmi", "ari", "cluster_accuracy": agreement of
        k-means clusters with the classes; "view_retrieval": share of images that their other view
        finds first among all; "cluster_stability": mean adjusted Rand index of two clusterings
        with different seeds; "effective_rank": 1-D, the exponential of the entropy of the singular
        values (Roy & Vetterli 2007).
    """
    rows, size = pairs.center, len(pairs.center)
    protocol = floor_protocol(size, labels)
    found: Values = {}
    if protocol.neighbors and labels is not None:
        found |= _neighbor_accuracy(rows, labels, protocol.neighbors)
    if size >= _LEAST_CLUSTERED:
        found |= _cluster_values(rows, labels if protocol.neighbors else None, protocol.clusters)
    if size > 1:
        first = nearest_rows(pairs.other, rows, 1)[0].squeeze(1)
        found["view_retrieval"] = (first == torch.arange(size)).double().mean().item()
    found["effective_rank"] = effective_rank(rows)
    return found


def _neighbor_accuracy(rows: Tensor, labels: Tensor, neighbors: int) -> Values:
    known = (labels >= 0).nonzero().squeeze(1)
    bank, classes = rows[known], labels[known]
    asking = (classes.bincount()[classes] > 1).nonzero().squeeze(1)  # others cannot be right
    found = knn_accuracy(
        bank[asking], classes[asking], bank, classes, k=(1, neighbors), exclude=asking
    )
    return {"knn1": found["knn1"], f"knn{_VOTES}": found[f"knn{neighbors}"]}


def _cluster_values(rows: Tensor, labels: Tensor | None, clusters: int) -> Values:
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    found = []
    for seed in range(0, _CLUSTERINGS * _STARTS, _STARTS):
        starts = [kmeans(rows, clusters, seed=seed + start) for start in range(_STARTS)]
        found.append(min(starts, key=lambda each: each.inertia).labels.numpy())
    pairs = itertools.combinations(found, 2)
    values = {"cluster_stability": _mean([adjusted_rand_score(a, b) for a, b in pairs])}
    if labels is not None:
        known = (labels >= 0).numpy()
        classes, found = labels.numpy()[known], [each[known] for each in found]
        for name, score in (
            ("nmi", normalized_mutual_info_score),
            ("ari", adjusted_rand_score),
            ("cluster_accuracy", cluster_accuracy),
        ):
            values[name] = _mean([score(classes, each) for each in found])
    return values


def _mean(values: Sequence[Any]) -> float:
    return float(sum(values) / len(values))


def effective_rank(rows: Tensor) -> float:
    """Return the exponential of the entropy of the singular values of rows [n, D]."""
    x = rows.double()
    gram = x.T @ x if len(x) > x.shape[1] else x @ x.T
    sigma = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = sigma / sigma.sum().clamp(min=1e-12)
    return torch.special.entr(shares).sum().exp().item()


def pixel_rows(images: Tensor, side: int = 16) -> Tensor:
    """Return images [n, 3, S, S] in 0-1 as rows [n, D] of at most 16 x 16 pixels.

    Their mean image is to be subtracted: so they are the strongest floor of 8, 16 and 32 pixels.
    """
    return F.adaptive_avg_pool2d(images, min(side, images.shape[2])).flatten(1)


def verdict(floors: dict[str, Values], images: int, *, pretrained: bool = False) -> str:
    """Return one sentence on whether training was worth it.

    200-NN decides where labels exist (1-NN moves little and is the noisier), and at a level NMI;
    else view retrieval. Differences below 1 / sqrt(n), about two standard errors, count as none.

    Args:
        floors: values of :func:`measure_floors` by RAW_PIXELS, STARTING (if known) and TRAINED.
        images: n.
        pretrained: the starting network was not random, so it is an alternative.
    """
    trained, labeled = floors[TRAINED], f"knn{_VOTES}" in floors[TRAINED]
    if images < _ENOUGH:
        return f"Too few images for a verdict: {images} of at least {_ENOUGH}."
    metric, by = (
        (f"knn{_VOTES}", f"{_VOTES}-NN") if labeled else ("view_retrieval", "view retrieval")
    )
    value, margin = trained[metric], 1 / math.sqrt(images)
    before = {name: floors[name][metric] for name in (RAW_PIXELS, STARTING) if name in floors}
    below = {name: floor for name, floor in before.items() if value < floor - margin}
    level = {name: floor for name, floor in before.items() if abs(value - floor) <= margin}
    shown = below or level or before
    against = " and ".join(f"{floor:.1%}" for floor in shown.values())
    names = " and ".join(("the " if name == STARTING else "") + name for name in shown)
    numbers = f"{names} by {by} ({value:.1%} against {against})"
    if STARTING in below and before[STARTING] > before[RAW_PIXELS] + margin:
        return f"Below {numbers}: lower --learning-rate, or train fewer epochs."
    best = max(floors[name].get("nmi", 0.0) for name in before)
    clusters = trained.get("nmi", best) - best
    shares = f"(NMI {best + clusters:.2f} against {best:.2f})"
    if level and not below and clusters > _NMI_MARGIN:
        return f"Better by clusters {shares}, and level with {numbers}."
    if below or level:
        degree = "Below" if below else "No better than"
        advice = "train longer, or start from pretrained weights (recipe adapt)"
        if pretrained:
            keep = "keep the starting network, or " if STARTING in (below or level) else ""
            advice = f"{keep}use other --weights or --train last:1"
        return f"{degree} {numbers}: {advice}."
    if not labeled:
        return f"Better than {numbers}, which training aims at; labels would show the classes."
    if clusters < -_NMI_MARGIN:
        return f"Better than {numbers}, but not by clusters {shares}."
    return f"Better than {numbers}."


def floor_title(floors: dict[str, Any], images: int) -> str:
    """Return a line on the images and the numbers that the values depend on."""
    measured, k = floors["images"], floors["neighbors"]
    some = f"{measured:,} of {images:,}" if measured < images else f"{images:,}"
    capped = f", 200-NN of {k} neighbors" if 0 < k < _VOTES else ""
    return f"Floors on {some} images, k-means of {floors['clusters']} clusters{capped}:"


def floor_rows(floors: dict[str, Values]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of the printed table."""
    labels = {
        "knn1": "1-NN",
        "knn200": "200-NN",
        "nmi": "NMI",
        "ari": "ARI",
        "cluster_accuracy": "cluster accuracy",
        "view_retrieval": "view retrieval",
        "cluster_stability": "cluster stability",
        "effective_rank": "effective rank",
    }
    shown = [name for name in labels if name in floors[TRAINED]]

    def cell(name: str, value: float | None) -> str:
        if value is None:
            return ""
        return f"{value:.1f}" if name == "effective_rank" else f"{value:.1%}"

    rows = [[labels[n], *(cell(n, found.get(n)) for found in floors.values())] for n in shown]
    return ["", *floors], rows
