"""Lloyd's k-means, written once against what it asks of its rows: how many, how long, the nearest
centroid of each, and the sums of each cluster.

Where the rows are (a CPU, a GPU, the shards of many ranks) and how the nearest centroid is found
(in tiles by torch, by flash-kmeans) is known to :class:`Points` alone.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..distributed.collectives import World
from ..errors import UserError
from .searchable_bank import product_dtype

# Rows and centroids of one product: on a CPU it stays in the cache, on a GPU it fills it.
_TILES = {"cpu": (512, 1024), "cuda": (16_384, 8_192)}
_CHUNK = 2_048  # rows that are summed in float64 at a time; whole banks would leave the cache
_SPLIT = 0.5  # of the cluster's radius, from its center to those of its halves


class KMeans(NamedTuple):
    """One clustering of N rows into k clusters."""

    labels: Tensor
    """int32 [N], the nearest centroid of each row; of this rank's rows where they are sharded."""
    centroids: Tensor
    """float32 [k, D]."""
    inertia: float
    """Sum of squared distances of the rows to their centroids."""
    iterations: int
    """How often the centroids were moved."""


class Points:
    """Rows [N, D] to be clustered, all of them here or this rank's share of them.

    Sharded rows: each rank has its :func:`~localagg.distributed.collectives.share` of the N rows, and all
    ranks do the same calls in the same order. All see the same centroids, bit by bit. Collectives:
    one all-reduce of two numbers here, one of [k, D] float32 in :meth:`subset`, and one of [k, D + 2]
    float64 in :meth:`cluster_totals`, which is 8 k (D + 2) bytes a pass over the rows whatever N is.

    Args:
        rows: [n, D] in any float dtype, on a CPU or a CUDA GPU (others are copied to the CPU).
        world: whose share the rows are. None: they are all.

    Raises:
        UserError: values that are not finite, on any rank.
    """

    def __init__(self, rows: Tensor, world: World | None = None) -> None:
        self.rows = rows.detach() if rows.device.type in _TILES else rows.detach().cpu()
        self.world = world or World()
        self.device, self.dim = self.rows.device, self.rows.shape[1]
        self._squares = torch.empty(len(self.rows), dtype=torch.float64, device=self.device)
        for at, part in self._doubles():
            self._squares[at : at + len(part)] = part.square().sum(dim=1)
        both = torch.stack(
            [self._squares.sum(), torch.tensor(float(len(self.rows))).to(self._squares)]
        )
        squares, count = self.world.sum(both).tolist()
        if not np.isfinite(squares):
            raise UserError(
                "TODO", "The bank holds values that are not finite and cannot be clustered."
            )
        self.count = int(count)
        self.multiplies_bfloat16 = product_dtype(self.rows) in (torch.bfloat16, torch.float16)
        self._coarse: Tensor | None = None

    def subset(self, index: Tensor) -> Tensor:
        """The rows of global indices, float32 [len(index), D], on every rank."""
        part = self.world.part(self.count)
        mine = (index >= part.start) & (index < part.stop)
        out = torch.zeros(len(index), self.dim, device=self.device)
        mine = mine.to(self.device)
        local = index.to(self.device)[mine] - part.start
        out[mine] = self.rows[local].float()
        return self.world.sum(out)

    def assign(self, centroids: Tensor, *, exact: bool) -> Tensor:
        """The nearest centroid of each row here, int64 [n]; of equally near ones the first.

        Args:
            centroids: float32 [k, D].
            exact: by float32 products; else by bf16 products, which are several times as fast and
                take another centroid where two are about equally near.
        """
        half = centroids.square().sum(dim=1) / 2  # x . c - |c|^2 / 2 is largest for the nearest c
        if exact:
            return _nearest(self.rows, centroids, half)
        if self._coarse is None:
            self._coarse = self.rows.to(torch.bfloat16)
        if self.device.type == "cuda" and has_flash_kmeans():
            return _nearest_flash(self._coarse, centroids)
        return _nearest(self._coarse, centroids.to(torch.bfloat16), half)

    def cluster_totals(self, labels: Tensor, clusters: int) -> Tensor:
        """Of all ranks' rows in each cluster the sum [D], the number, and the sum of |x|^2.

        Args:
            labels: int [n], of the rows here.
            clusters: k.

        Returns:
            float64 [k, D + 2].
        """
        sums = torch.zeros(clusters, self.dim, dtype=torch.float64, device=self.device)
        for at, part in self._doubles():
            sums.index_add_(0, labels[at : at + len(part)], part)
        counts = torch.bincount(labels, minlength=clusters).double()
        squares = torch.bincount(labels, self._squares, minlength=clusters).double()
        return self.world.sum(torch.cat([sums, counts[:, None], squares[:, None]], dim=1))

    def _doubles(self) -> Iterator[tuple[int, Tensor]]:
        for at in range(0, len(self.rows), _CHUNK):
            yield at, self.rows[at : at + _CHUNK].double()


def lloyd(
    rows: Points, first: Tensor, *, iterations: int, tolerance: float = 0.0, overshoot: float = 0.0
) -> KMeans:
    """Lloyd's iterations: rows to their nearest centroid, centroids to the means of their rows.

    Where the device multiplies bf16 fast, the passes over the rows use it until the inertia settles
    or ``iterations`` are done; they only lead the centroids. From then on they are exact, so that
    the labels returned are the nearest centroids by float32, and it is by them that it stops. The
    inertia is exact in every pass: it follows from the float64 sums of the clusters.

    Args:
        rows: what to cluster.
        first: centroids [k, D] to begin from, the same on all ranks.
        iterations: moves of the centroids, at most.
        tolerance: the inertia has settled once an iteration lowers it by no more than this share of
            it. 0: once it falls no further.
        overshoot: how far beyond the means the centroids are led, as a share of their move, until
            the inertia settles; then they are the means, as they are where a cluster was empty. 0.7
            halves the iterations that a warm start needs; from 1 on it need not converge.

    Returns:
        A :class:`KMeans` on the rows' device. Its passes over the rows are one more than its
        iterations.
    """
    centroids = first.to(rows.device, torch.float32)
    leading, before = rows.multiplies_bfloat16 or overshoot > 0, float("inf")
    for done in range(iterations + 1):
        leading = leading and done < iterations
        labels = rows.assign(centroids, exact=not (leading and rows.multiplies_bfloat16))
        totals = rows.cluster_totals(labels, len(centroids))
        inertia = _inertia(totals, centroids)
        settled = before - inertia <= tolerance * inertia
        if done == iterations or (settled and not leading):
            return KMeans(labels.to(torch.int32), centroids, inertia, done)
        leading, before = leading and not settled and done + 1 < iterations, inertia
        moved = mean_centroids(totals, centroids)
        if leading and totals[:, -2].all():  # a centroid that was set anew has not moved
            moved = torch.lerp(centroids, moved, 1 + overshoot)
        centroids = moved
    raise ValueError(f"iterations is {iterations}; it must not be negative")


def mean_centroids(totals: Tensor, centroids: Tensor | None = None) -> Tensor:
    """The centroids [k, D] of cluster totals. Those of empty clusters come from splitting others.

    Each empty cluster, in order, takes one half of the cluster that is the largest then (the first
    of several): the halves stand on opposite sides of its center, half its radius (the root of its
    mean squared distance) away, and have half its number each. The directions are Walsh functions,
    so that halves of halves spread. faiss splits too, but draws which cluster, and moves the halves
    by 1/1024 of the coordinates, which says nothing of how far its rows lie.

    Args:
        totals: float64 [k, D + 2] of :meth:`Points.cluster_totals`.
        centroids: what clusters keep that are empty when nothing is left to split. None: zeros.
    """
    sums, counts, squares = totals[:, :-2], totals[:, -2], totals[:, -1]
    number = counts.clamp(min=1)
    centers = sums / number.unsqueeze(1)
    empty = (counts == 0).nonzero().flatten().tolist()
    if not empty:
        return centers.float()
    if centroids is not None:
        centers = torch.where(counts.unsqueeze(1) == 0, centroids.double(), centers)
    variance = squares / number - centers.square().sum(dim=1)
    left, radius = counts.cpu().numpy().copy(), variance.clamp(min=0).sqrt().cpu().numpy().copy()
    dim = torch.arange(sums.shape[1], device=totals.device)
    bits = max(1, (len(dim) - 1).bit_length())
    for number, cluster in enumerate(empty):
        largest = int(left.argmax())
        if left[largest] < 2:
            break
        sign = 1 - 2 * ((dim >> number % bits) & 1)
        move = float(_SPLIT * radius[largest] / len(dim) ** 0.5) * sign
        centers[cluster] = centers[largest] + move
        centers[largest] -= move
        radius[cluster] = radius[largest]
        left[cluster] = left[largest] // 2
        left[largest] -= left[cluster]
    return centers.float()


def initial_centroids(rows: Points, clusters: int, seed: int) -> Tensor:
    """The first centroids [k, D] of a cold start: the rows that faiss draws for this seed."""
    import faiss

    order = np.empty(rows.count, dtype=np.int32)
    pointer = faiss.swig_ptr(order)
    faiss.rand_perm(pointer, rows.count, seed + 1)  # type: ignore[attr-defined]
    return rows.subset(torch.from_numpy(order[:clusters].astype(np.int64)))


def has_flash_kmeans() -> bool:
    """Whether the extra ``cuda`` is installed. Nothing is imported."""
    from importlib.util import find_spec

    return find_spec("flash_kmeans") is not None


def _inertia(totals: Tensor, centroids: Tensor) -> float:
    """sum |x - c|^2 = sum_k ( sum |x|^2 - 2 S_k . c_k + n_k |c_k|^2 ), S_k the sum of its rows."""
    sums, counts, squares = totals[:, :-2], totals[:, -2], totals[:, -1]
    c = centroids.double()
    parts = squares - 2 * (sums * c).sum(dim=1) + counts * c.square().sum(dim=1)
    return max(0.0, parts.sum().item())


def _nearest(rows: Tensor, centroids: Tensor, half: Tensor) -> Tensor:
    """argmax_k of x . c_k - half_k in tiles; the products in the dtype of the centroids."""
    tile, width = _TILES[rows.device.type]
    labels = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    blocks = [part.T.contiguous() for part in centroids.split(width)]
    halves = half.split(width)
    for at in range(0, len(rows), tile):
        x = rows[at : at + tile].to(centroids.dtype)
        scores = (_score(x, block, part) for block, part in zip(blocks, halves, strict=True))
        labels[at : at + tile] = _first_largest(scores, width)
    return labels


def _score(x: Tensor, block: Tensor, half: Tensor) -> Tensor:
    if x.dtype == torch.float32:
        return torch.addmm(-half, x, block)
    return x @ block - half  # in float32, as half is


def _first_largest(scores: Iterable[Tensor], width: int) -> Tensor:
    """The column of each row's largest value, the first of several, over blocks of columns."""
    best = label = None
    for number, score in enumerate(scores):
        found = argmax_columns(score)
        value = score.gather(1, found.unsqueeze(1)).squeeze(1)
        if best is None or label is None:
            best, label = value, found
        else:
            label = torch.where(value > best, found + number * width, label)
            best = torch.maximum(value, best)
    assert label is not None
    return label


def argmax_columns(score: Tensor) -> Tensor:
    if score.device.type != "cpu":
        return score.argmax(dim=1)
    # numpy's is vectorized: 2.3 ms where torch's took 50 (50,000 x 781 in tiles, one thread)
    return torch.from_numpy(score.numpy().argmax(axis=1))


def _nearest_flash(rows: Tensor, centroids: Tensor) -> Tensor:
    """flash-kmeans' Triton kernel: no rows x centroids array. Its products are bf16."""
    from flash_kmeans.assign_euclid_triton import (  # pyright: ignore[reportMissingImports]
        euclid_assign_triton,
    )

    squares = rows.float().square().sum(dim=1)
    found = euclid_assign_triton(rows[None], centroids.to(rows.dtype)[None], squares[None])
    return found[0].to(torch.int64)
