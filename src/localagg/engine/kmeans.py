"""Lloyd's k-means, written once against the number of points, their dimension, a subset of them,
the nearest centroid of each, and the sums of each cluster.

:class:`Points` alone knows whether the points are on a CPU, on a GPU or split over ranks.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..distributed.collectives import World
from .searchable_bank import not_finite_error, product_dtype

# Points and centroids of one product: on a CPU it stays in the cache, on a GPU it fills the chip.
_TILES = {"cpu": (512, 1024), "cuda": (16_384, 8_192)}
_CHUNK_ROWS = 2_048  # rows that are summed in float64 at a time; whole banks would leave the cache
_SPLIT_DISTANCE = 0.5  # from the center of a split cluster to its halves, in radii


class KMeans(NamedTuple):
    """One clustering of N points into k clusters."""

    labels: Tensor
    """int32 [N], the nearest centroid of each point; of this rank's points if they are split."""
    centroids: Tensor
    """float32 [k, D]."""
    inertia: float
    """Sum of squared distances of the points to their centroids."""
    iterations: int
    """Number of times the centroids were moved."""


class Points:
    """Points [N, D] to cluster, all of them or this rank's share.

    Split points: each rank has its :func:`~localagg.distributed.collectives.share`, and all ranks
    make the same calls in the same order. All have the same centroids, bit by bit. Collectives: one
    all-reduce of two numbers here, one of [k, D] float32 in :meth:`subset`, and one of [k, D + 2]
    float64 in :meth:`cluster_totals`, once a pass over the points.

    Args:
        rows: [n, D] in any float dtype, on a CPU or a CUDA GPU; copied to the CPU from others.
        world: the ranks that the points are split over. Default: not split.
        bfloat16: multiply in bfloat16 until the inertia settles. Default: if the device is fast in
            it.
        tile: points and centroids of one product. Default: measured for the device.

    Raises:
        UserError: values that are not finite, on any rank.
    """

    def __init__(
        self,
        rows: Tensor,
        world: World | None = None,
        *,
        bfloat16: bool | None = None,
        tile: tuple[int, int] | None = None,
    ) -> None:
        self.rows = rows.detach() if rows.device.type in _TILES else rows.detach().cpu()
        self.world = world or World()
        self.device, self.dim = self.rows.device, self.rows.shape[1]
        self.tile = tile or _TILES[self.device.type]
        if bfloat16 is None:
            bfloat16 = product_dtype(self.rows) in (torch.bfloat16, torch.float16)
        self.bfloat16 = bfloat16
        self._rounded: Tensor | None = None
        self._squares = torch.empty(len(self.rows), dtype=torch.float64, device=self.device)
        for at, part in self._float64_chunks():
            self._squares[at : at + len(part)] = part.square().sum(dim=1)
        both = torch.stack(
            [self._squares.sum(), torch.tensor(float(len(self.rows))).to(self._squares)]
        )
        squares, count = self.world.sum(both).tolist()
        if not np.isfinite(squares):
            raise not_finite_error()
        self.count = int(count)

    def subset(self, index: Tensor) -> Tensor:
        """Return the points of global indices, float32 [len(index), D], on every rank."""
        part = self.world.part(self.count)
        own = (index >= part.start) & (index < part.stop)
        out = torch.zeros(len(index), self.dim, device=self.device)
        own = own.to(self.device)
        local = index.to(self.device)[own] - part.start
        out[own] = self.rows[local].float()
        return self.world.sum(out)

    def assign(self, centroids: Tensor, *, exact: bool) -> Tensor:
        """Return the nearest centroid of each local point, int64 [n]; of equally near, the first.

        Args:
            centroids: float32 [k, D].
            exact: multiply in float32. bfloat16 is several times as fast and may choose another
                centroid if two are about equally near.
        """
        half = centroids.square().sum(dim=1) / 2  # x . c - |c|^2 / 2 is largest for the nearest c
        if exact:
            return _nearest(self.rows, centroids, half, self.tile)
        if self._rounded is None:
            self._rounded = self.rows.to(torch.bfloat16)
        if self.device.type == "cuda" and find_spec("flash_kmeans"):
            return nearest_by_flash_kmeans(self._rounded, centroids)
        return _nearest(self._rounded, centroids.to(torch.bfloat16), half, self.tile)

    def cluster_totals(self, labels: Tensor, clusters: int) -> Tensor:
        """Return each cluster's sum of points, their number and their sum of |x|^2, over all ranks.

        Args:
            labels: int [n], of the local points.
            clusters: k.

        Returns:
            float64 [k, D + 2].
        """
        sums = torch.zeros(clusters, self.dim, dtype=torch.float64, device=self.device)
        for at, part in self._float64_chunks():
            sums.index_add_(0, labels[at : at + len(part)], part)
        counts = torch.bincount(labels, minlength=clusters).double()
        squares = torch.bincount(labels, self._squares, minlength=clusters).double()
        return self.world.sum(torch.cat([sums, counts[:, None], squares[:, None]], dim=1))

    def _float64_chunks(self) -> Iterator[tuple[int, Tensor]]:
        for at in range(0, len(self.rows), _CHUNK_ROWS):
            yield at, self.rows[at : at + _CHUNK_ROWS].double()


def lloyd(
    points: Points,
    start: Tensor,
    *,
    iterations: int,
    tolerance: float = 0.0,
    overshoot: float = 0.0,
) -> KMeans:
    """Run Lloyd's iterations: assign points to centroids, move centroids to their means.

    A device that multiplies bfloat16 fast does so until the inertia settles, or until the last
    pass. From then on products are float32, so that labels and the stop are exact. The inertia is
    exact in every pass: it follows from the float64 sums of the clusters.

    Args:
        points: the points to cluster.
        start: centroids [k, D] to begin from, the same on all ranks.
        iterations: most moves of the centroids.
        tolerance: the inertia has settled once an iteration lowers it by at most this share of it.
            0: once it falls no further.
        overshoot: how far the centroids move beyond the means until the inertia settles, as a share
            of their move. Moves that refill an empty cluster do not overshoot. 0.7 halves the
            iterations of a warm start; from 1 on the iterations may diverge.

    Returns:
        A :class:`KMeans` on the points' device, after one more pass than iterations.

    Raises:
        ValueError: negative iterations.
    """
    centroids = start.to(points.device, torch.float32)
    leading, before = points.bfloat16 or overshoot > 0, float("inf")
    for done in range(iterations + 1):
        leading = leading and done < iterations
        labels = points.assign(centroids, exact=not (leading and points.bfloat16))
        totals = points.cluster_totals(labels, len(centroids))
        inertia = _inertia(totals, centroids)
        settled = before - inertia <= tolerance * inertia
        if done == iterations or (settled and not leading):
            return KMeans(labels.to(torch.int32), centroids, inertia, done)
        leading, before = leading and not settled and done + 1 < iterations, inertia
        moved = mean_centroids(totals, centroids)
        if leading and totals[:, -2].all():  # a refilled cluster has no move to extend
            moved = torch.lerp(centroids, moved, 1 + overshoot)
        centroids = moved
    raise ValueError(f"iterations is {iterations}; it must not be negative")


def mean_centroids(totals: Tensor, centroids: Tensor | None = None) -> Tensor:
    """Return the mean of each cluster [k, D]; empty clusters take halves of others.

    Each empty cluster, in order, splits the largest cluster (the first of several). The halves
    stand on opposite sides of its center, half its radius (the root of its mean squared distance)
    away, with half its points each. Directions are Walsh functions, so that halves of halves
    spread. Unlike here, faiss splits a random cluster and moves by 1/1024 of the coordinates,
    regardless of the cluster's radius.

    Args:
        totals: float64 [k, D + 2] of :meth:`Points.cluster_totals`.
        centroids: kept by empty clusters that find no cluster to split. Default: zeros.
    """
    sums, counts, squares = totals[:, :-2], totals[:, -2], totals[:, -1]
    divisor = counts.clamp(min=1)
    centers = sums / divisor.unsqueeze(1)
    empty = (counts == 0).nonzero().flatten().tolist()
    if not empty:
        return centers.float()
    if centroids is not None:
        centers = torch.where(counts.unsqueeze(1) == 0, centroids.double(), centers)
    variance = squares / divisor - centers.square().sum(dim=1)
    size, radius = counts.cpu().numpy().copy(), variance.clamp(min=0).sqrt().cpu().numpy().copy()
    dim = torch.arange(sums.shape[1], device=totals.device)
    bits = max(1, (len(dim) - 1).bit_length())
    for number, cluster in enumerate(empty):
        largest = int(size.argmax())
        if size[largest] < 2:
            break
        sign = 1 - 2 * ((dim >> number % bits) & 1)
        move = float(_SPLIT_DISTANCE * radius[largest] / len(dim) ** 0.5) * sign
        centers[cluster] = centers[largest] + move
        centers[largest] -= move
        radius[cluster] = radius[largest]
        size[cluster] = size[largest] // 2
        size[largest] -= size[cluster]
    return centers.float()


def initial_centroids(points: Points, clusters: int, seed: int) -> Tensor:
    """Return the centroids [k, D] of a cold start: the points that faiss draws for this seed."""
    import faiss

    order = np.empty(points.count, dtype=np.int32)
    pointer = faiss.swig_ptr(order)
    faiss.rand_perm(pointer, points.count, seed + 1)  # type: ignore[attr-defined]
    return points.subset(torch.from_numpy(order[:clusters].astype(np.int64)))


def _inertia(totals: Tensor, centroids: Tensor) -> float:
    """Sum |x|^2 - 2 S_k . c_k + n_k |c_k|^2 over clusters; S_k is the sum of n_k points."""
    sums, counts, squares = totals[:, :-2], totals[:, -2], totals[:, -1]
    c = centroids.double()
    parts = squares - 2 * (sums * c).sum(dim=1) + counts * c.square().sum(dim=1)
    return max(0.0, parts.sum().item())


def _nearest(rows: Tensor, centroids: Tensor, half: Tensor, tile: tuple[int, int]) -> Tensor:
    """Return the first argmax_k of x . c_k - half_k, int64 [n], in the centroids' dtype."""
    height, width = tile
    labels = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    blocks = [part.T.contiguous() for part in centroids.split(width)]
    for at in range(0, len(rows), height):
        x, best, label = rows[at : at + height].to(centroids.dtype), None, None
        for number, (block, offset) in enumerate(zip(blocks, half.split(width), strict=True)):
            # bfloat16 products are rounded before the float32 offset is subtracted.
            single = x.dtype == torch.float32
            score = torch.addmm(-offset, x, block) if single else x @ block - offset
            column = argmax_columns(score)
            value = score.gather(1, column.unsqueeze(1)).squeeze(1)
            if best is None or label is None:
                best, label = value, column
            else:
                label = torch.where(value > best, column + number * width, label)
                best = torch.maximum(value, best)
        assert label is not None
        labels[at : at + height] = label
    return labels


def argmax_columns(score: Tensor) -> Tensor:
    """Return the first column of each row's largest value, int64."""
    if score.device.type != "cpu":
        return score.argmax(dim=1)
    # numpy's is vectorized: 2.3 ms where torch's took 50 (50,000 x 781 in tiles, one thread)
    return torch.from_numpy(score.numpy().argmax(axis=1))


def nearest_by_flash_kmeans(rows: Tensor, centroids: Tensor) -> Tensor:
    """Return the nearest centroids by flash-kmeans' Triton kernel, whose products are bfloat16."""
    from flash_kmeans.assign_euclid_triton import (  # pyright: ignore[reportMissingImports]
        euclid_assign_triton,
    )

    squares = rows.float().square().sum(dim=1)
    found = euclid_assign_triton(rows[None], centroids.to(rows.dtype)[None], squares[None])
    return found[0].to(torch.int64)
