"""Find the exact nearest neighbors of every row among all others."""

import torch
from torch import Tensor

from ..engine.search import nearest, sort_by_similarity
from ..engine.searchable_bank import SearchableBank
from ..io.console import show_progress

_BATCH = 1024


def nearest_others(rows: Tensor, k: int, *, queries: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the k nearest other rows of each row, by dot product, exactly.

    Args:
        rows: float32 unit rows [N, D].
        k: neighbors of each row, capped at N - 1.
        queries: float32 [N, D], if other vectors of the same N things are searched for.

    Returns:
        (neighbors, similarity): int64 and float32 [N, k], most similar first, equal ones by row.
    """
    size = len(rows)
    k = max(0, min(k, size - 1))
    neighbors, similarity = torch.empty(size, k, dtype=torch.int64), torch.empty(size, k)
    bank = SearchableBank(rows)
    with show_progress("searching neighbors") as show:
        for start in range(0, size if k else 0, _BATCH):
            part = slice(start, min(start + _BATCH, size))
            asked = (rows if queries is None else queries)[part]
            found, cosine = sort_by_similarity(*nearest(asked, bank, k + 1))
            # The row itself goes last; the last place is cut, also if equal rows displaced it.
            own = found == torch.arange(part.start, part.stop).unsqueeze(1)
            order = own.int().argsort(dim=1, stable=True)[:, :k]
            neighbors[part], similarity[part] = found.gather(1, order), cosine.gather(1, order)
            show(part.stop, size)
    return neighbors, similarity.clamp_(-1, 1)
