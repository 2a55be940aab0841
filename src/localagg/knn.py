"""Nearest-neighbor classification: an embedding's quality without any training."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import UserError
from .objectives import background_neighbors

_BATCH = 256  # queries at a time: bounds memory at 256 x tile, and 256 x k candidates


def nearest_rows(
    queries: Tensor, bank: Tensor, k: int, *, exclude: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k most similar bank rows of each query, most similar first; ties by the lowest row.

    Args:
        queries: unit rows [Q, D].
        bank: unit rows [N, D].
        k: at most N (N - 1 with ``exclude``).
        exclude: int64 [Q], one row that each query may not find (itself).

    Returns:
        (rows, similarity): int64 and float [Q, k].
    """
    available = len(bank) - (exclude is not None)
    if not 1 <= k <= available:
        raise UserError(f"{k} neighbors of {available:,} images cannot be.")
    found_rows, found_sim = [], []
    for start in range(0, len(queries), _BATCH):
        part = slice(start, start + _BATCH)
        rows_Qk, sim_Qk = background_neighbors(queries[part], bank, k + (exclude is not None))
        if exclude is not None:
            self_Qk = rows_Qk == exclude[part].unsqueeze(1)
            sim_Qk = sim_Qk.masked_fill(self_Qk, -torch.inf)
        by_row = rows_Qk.argsort(dim=1)
        rows_Qk, sim_Qk = rows_Qk.gather(1, by_row), sim_Qk.gather(1, by_row)
        by_sim = sim_Qk.argsort(dim=1, descending=True, stable=True)[:, :k]
        found_rows.append(rows_Qk.gather(1, by_sim))
        found_sim.append(sim_Qk.gather(1, by_sim))
    return torch.cat(found_rows), torch.cat(found_sim)


def knn_accuracy(
    queries: Tensor,
    query_labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    *,
    k: Sequence[int] = (1, 200),
    temperature: float = 0.07,
    exclude: Tensor | None = None,
) -> dict[str, float]:
    """Top-1 accuracy by the weighted vote of k nearest neighbors (IR section 3.4).

    A neighbor votes for its class with weight exp(similarity / temperature); k = 1 is the
    reference's online validation. k is capped at the number of rows.

    Args:
        queries: unit rows [Q, D].
        query_labels: int64 [Q].
        bank: unit rows [N, D].
        bank_labels: int64 [N].
        k: the numbers of neighbors to report.
        temperature: of the weights.
        exclude: int64 [Q], one bank row that each query may not use (itself).

    Returns:
        {"knn1": 0-1, "knn200": 0-1}: one entry a k, named after the k asked for.
    """
    bank_labels, query_labels = bank_labels.to(bank.device), query_labels.to(bank.device)
    available = len(bank) - (exclude is not None)
    most = min(max(k), available)
    rows_Qk, sim_Qk = nearest_rows(queries.to(bank.device), bank, most, exclude=exclude)
    # Subtracting the best similarity leaves every vote's outcome alone and cannot overflow.
    weight_Qk = ((sim_Qk - sim_Qk[:, :1]) / temperature).double().exp()
    classes = int(torch.maximum(bank_labels.max(), query_labels.max())) + 1
    accuracy = {}
    for count in k:
        used = slice(0, min(count, most))
        votes_QC = torch.zeros(len(rows_Qk), classes, dtype=torch.float64, device=bank.device)
        votes_QC.scatter_add_(1, bank_labels[rows_Qk[:, used]], weight_Qk[:, used])
        correct = votes_QC.argmax(dim=1) == query_labels
        accuracy[f"knn{count}"] = correct.double().mean().item()
    return accuracy
