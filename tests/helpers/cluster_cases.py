"""Clusterings of rows that are split over ranks, to be run by threads and by processes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from localagg.clustering import cluster
from localagg.distributed.collectives import World


def rows_of(size: int, dim: int = 16) -> Tensor:
    """Unit rows around thirty directions; some of them twice."""
    draws = torch.Generator().manual_seed(size)
    centers = torch.randn(30, dim, generator=draws)
    rows = centers[torch.randint(30, (size,), generator=draws)]
    rows = F.normalize(rows + 0.7 * torch.randn(size, dim, generator=draws), dim=1)
    rows[size // 2] = rows[0]
    return rows


def split(world: World, size: int, clusters: tuple[int, ...]) -> dict[str, object]:
    """Cold clusterings, then warm ones of moved rows, by labels and by far-off centroids."""
    rows = rows_of(size)
    part = world.part(size)
    mine = rows[part.start : part.stop]
    moved = F.normalize(mine + 0.1 * torch.ones(mine.shape[1]), dim=1)
    found = []
    centroids: list[Tensor] = []

    def note(_, result) -> None:
        found.append((result.inertia, result.iterations))

    options = {"world": world, "on_progress": note, "centroids": centroids}
    cold = cluster(mine, clusters, engine="lloyd", iterations=8, **options)
    begun = [c.clone() for c in centroids]
    warm = cluster(moved, clusters, start=cold, tolerance=0.003, **options)
    far = [torch.cat([c[: len(c) // 2], 9 + c[len(c) // 2 :]]) for c in begun]
    filled = cluster(moved, clusters, start=far, tolerance=0.003, **options)
    return {"labels": [cold, warm, filled], "centroids": [*begun, *centroids], "found": found}
