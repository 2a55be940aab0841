"""Diagnose a run once an epoch, and warn where a value crosses its bound.

Each value has a name in metrics.jsonl and a sentence; ``docs/running.md`` lists them.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distributed.collectives import World

_COMPARED = 100_000  # rows whose labels are compared between clusterings, evenly spread

# Bounds, far from what good runs on digits and CIFAR-10 have shown from the first epoch to the
# last: spread 0.09 to 0.99, effective rank 12 to 77 of 128, staleness 0.41 to 0.07, largest cluster
# 1.5 to 1.9 times the mean, none lone, churn 0.25, hardly an image without a close neighbor.
LEAST_SPREAD = 0.03
LEAST_RANK = 0.03  # of the dimensions there are
MOST_STALE = 0.8
MOST_WITHOUT = 0.5
LARGEST_CLUSTER = 20.0  # times the mean
MOST_LONE = 0.3
MOST_CHURN = 0.98


class Diagnostics:
    """Diagnostics of an epoch: means over its steps, its clusters, and the bank at its end.

    Args:
        state: from :meth:`state`, saved in the checkpoint that a run resumes from.
        world: the ranks that hold bank and labels. Default: this process alone.
    """

    def __init__(self, state: dict[str, Any] | None = None, world: World | None = None) -> None:
        self._world = world or World()
        state = state or {"steps": {}, "clusters": {}, "warned": []}
        self._steps: dict[str, list[float]] = state["steps"]  # name: [sum, number of steps]
        self._clusters: dict[str, float] = state["clusters"]
        self._warned: list[str] = state["warned"]

    def state(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {"steps": self._steps, "clusters": self._clusters, "warned": self._warned}

    def add(self, values: dict[str, float]) -> None:
        """Add the values of a step."""
        for name in ("without_close", "staleness"):
            if name in values:
                total, count = self._steps.get(name, (0.0, 0))
                self._steps[name] = [total + values[name], count + 1]

    def record_clusters(self, labels: Tensor | None, before: Tensor | None) -> None:
        """Compare new labels of this rank's rows [H, n] with the ones before."""
        if labels is not None:
            self._clusters = cluster_facts(labels, before, self._world)

    def end_epoch(self, rows: Tensor) -> tuple[dict[str, Any], list[str]]:
        """Return the epoch's metrics, and a sentence for each bound that it crosses newly.

        Args:
            rows: of the bank, those of this rank [n, D].
        """
        total, second = moments(rows)
        sums = self._world.sum(torch.cat([second, total[None]]))
        second, total = sums[:-1], sums[-1]
        size = int(self._world.sum(torch.tensor(len(rows))))
        means = {name: total / count for name, (total, count) in self._steps.items()}
        metrics: dict[str, Any] = {**spread(total, second, size), **means, **self._clusters}
        crossed = warnings(metrics, min(size, rows.shape[1]))
        new = [sentence for name, sentence in crossed.items() if name not in self._warned]
        self._steps, self._clusters, self._warned = {}, {}, list(crossed)
        return metrics | ({"warnings": self._warned} if crossed else {}), new


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum [D] and second moment [D, D] of rows, float64 on the CPU; shards add up.

    Args:
        rows: [N, D], any float dtype and device.
    """
    dim = rows.shape[1]
    total, second = torch.zeros(dim).double(), torch.zeros(dim, dim).double()
    for chunk in rows.split(65536):
        part = chunk.to(torch.promote_types(chunk.dtype, torch.float32))
        total += part.sum(dim=0).cpu()
        second += (part.T @ part).cpu()
    return total, second


def spread(total: Tensor, second: Tensor, size: int) -> dict[str, float]:
    """Return how much of the sphere unit rows fill, from their :func:`moments`.

    Args:
        total: [D].
        second: [D, D].
        size: N.

    Returns:
        "spread": 1 minus the mean cosine of all pairs of rows (a row with itself too): 0 where all
        are one point, about 1 where they point everywhere. "effective_rank": the exponential of the
        entropy of the rows' singular values, which is 1 on a line and D on an even cloud (Roy &
        Vetterli 2007; of embeddings, RankMe, Garrido et al. 2023).
    """
    sigma = torch.linalg.eigvalsh(second).clamp(min=0).sqrt()
    p = sigma / sigma.sum()
    entropy = -torch.special.xlogy(p, p).sum()
    mean_cosine = float(total @ total) / size**2
    return {"spread": 1 - mean_cosine, "effective_rank": float(entropy.exp())}


def cluster_facts(
    labels: Tensor, before: Tensor | None, world: World | None = None
) -> dict[str, float]:
    """Return the sizes of clusters, and their change since the last clustering.

    Args:
        labels: int [H, N], or of this rank's rows.
        before: labels of the last clustering; None at the first.
        world: the ranks that hold the rows. Default: this process alone.

    Returns:
        "largest_cluster": the rows of the largest cluster over those of the mean one; "lone": the
        share of clusters that have one row or none; "churn": 1 minus the adjusted Rand index of
        each clustering and the one before (0: the same clusters, 1: as alike as by chance), on at
        most 100,000 rows; missing at the first clustering. Means over the H clusterings.
    """
    world = world or World()
    size = int(world.sum(torch.tensor(labels.shape[1])))
    tops = world.maximum(torch.tensor([int(row.max()) if len(row) else -1 for row in labels]))
    found: dict[str, list[float]] = {"largest_cluster": [], "lone": []}
    for row, top in zip(labels.cpu(), tops.tolist(), strict=True):
        sizes = world.sum(row.long().bincount(minlength=top + 1))
        found["largest_cluster"].append(float(sizes.max()) * len(sizes) / size)
        found["lone"].append(float((sizes <= 1).float().mean()))
    if before is not None and before.shape == labels.shape:
        old, new = _sampled(before, size, world), _sampled(labels, size, world)
        found["churn"] = [1 - _adjusted_rand_index(*pair) for pair in zip(old, new, strict=True)]
    return {name: float(np.mean(values)) for name, values in found.items()}


def _sampled(labels: Tensor, size: int, world: World) -> Tensor:
    """Return the labels [H, 100,000 at most] of rows spread evenly over all ranks, on the CPU."""
    step, start = -(-size // _COMPARED), world.part(size).start
    return torch.cat(world.gather_objects(labels[:, -start % step :: step].cpu()), dim=1)


def _adjusted_rand_index(one: Tensor, other: Tensor) -> float:
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(one.numpy(), other.numpy()))


def warnings(measured: dict[str, Any], rank: int) -> dict[str, str]:
    """Return a sentence for each bound that an epoch crossed, by the name of the value.

    Args:
        measured: by the names of this module and "without_close"; missing values are skipped.
        rank: the dimensions that the rows can fill, min(N, D).
    """
    crossed = {
        "spread": lambda v: v < LEAST_SPREAD,
        "effective_rank": lambda v: v < LEAST_RANK * rank,
        "staleness": lambda v: v > MOST_STALE,
        "without_close": lambda v: v > MOST_WITHOUT,
        "largest_cluster": lambda v: v > LARGEST_CLUSTER,
        "lone": lambda v: v > MOST_LONE,
        "churn": lambda v: v > MOST_CHURN,
    }
    return {
        name: _SENTENCES[name].format(measured[name], rank=rank)
        for name, wrong in crossed.items()
        if name in measured and wrong(measured[name])
    }


_SENTENCES = {
    "spread": "the embedding is nearly one point (spread {:.3f}, healthy near 1); give IR more"
    " epochs (--ir-epochs) or lower --learning-rate",
    "effective_rank": "the embedding uses {:.1f} of {rank} dimensions; give IR more epochs"
    " (--ir-epochs) or lower --learning-rate",
    "staleness": "the bank lags behind the network (1 - cosine of {:.2f}); lower --learning-rate or"
    " --bank-momentum",
    "without_close": "{:.0%} of the images had no close neighbor and taught nothing; raise"
    " --neighbors or lower --clusters",
    "largest_cluster": "the largest cluster has {:.0f} times the images of an average one; the"
    " embedding may be collapsing: lower --learning-rate",
    "lone": "{:.0%} of the clusters have one image or none; lower --clusters",
    "churn": "clusters change entirely each epoch ({:.0%} unlike the last); give IR more epochs"
    " (--ir-epochs) or lower --learning-rate",
}
