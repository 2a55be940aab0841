"""k-nearest-neighbor accuracy and retrieval scores of an embedding, without any training.

Shape suffixes: Q queries, N bank rows (the reference set), D embedding size, C classes, k
neighbors. Similarities are dot products in float32, or in the dtype of wider rows. Queries are
processed in batches, which bounds memory to some 60 MB beside a coarse copy of the bank.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..config import check_arguments, check_temperature, is_integer
from ..config.tensor_checks import check_integers, check_rows
from ..engine.search import nearest, sort_by_similarity
from ..engine.searchable_bank import SearchableBank, not_finite_error
from ..errors import UserError

VOTES = (1, 10, 20, 100, 200)
"""Numbers of neighbors that are reported by default."""
_BATCH = 1024  # queries at a time
_RANKED_BYTES = 16 << 20  # similarities that are ranked whole at a time


def nearest_rows(
    queries: Tensor, bank: Tensor, k: int, *, exclude: Tensor | None = None, batch: int = _BATCH
) -> tuple[Tensor, Tensor]:
    """Return the k most similar bank rows of each query, most similar first; ties by lowest row.

    Args:
        queries: unit rows [Q, D].
        bank: unit rows [N, D].
        k: at most N (N - 1 with ``exclude``).
        exclude: int64 [Q], one row that each query must not find (itself).
        batch: queries at a time.

    Returns:
        (rows, similarity): int64 and float [Q, k].

    Raises:
        UserError: k exceeds the rows, or values are not finite.
    """
    found = [part[1:] for part in _nearest_batches(queries, bank, k, exclude, batch)]
    if not found:
        return torch.empty(0, k, dtype=torch.int64), queries.new_empty(0, k)
    return torch.cat([rows for rows, _ in found]), torch.cat([sim for _, sim in found])


def _nearest_batches(
    queries: Tensor, bank: Tensor, k: int, exclude: Tensor | None, batch: int = _BATCH
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (slice of queries, rows, similarity) of :func:`nearest_rows`, batch by batch."""
    check_rows(queries=queries, bank=bank)
    check_arguments(batch=(batch, 1))
    check_neighbors(k, len(bank) - (exclude is not None))
    if exclude is not None:
        check_integers("exclude", exclude, (len(queries),), len(bank), device=queries.device)
    if not (queries.isfinite().all() and bank.isfinite().all()):
        raise not_finite_error()
    searchable = SearchableBank(bank)
    for start in range(0, len(queries), batch):
        part = slice(start, start + batch)
        rows_Qk, sim_Qk = sort_by_similarity(
            *nearest(queries[part], searchable, k + (exclude is not None))
        )
        if exclude is not None:
            others = rows_Qk != exclude[part].unsqueeze(1)
            others[:, -1] &= others[:, :-1].sum(dim=1) < k  # the excluded row was not among them
            rows_Qk, sim_Qk = rows_Qk[others].view(-1, k), sim_Qk[others].view(-1, k)
        yield part, rows_Qk, sim_Qk


def check_neighbors(k: int, available: int) -> None:
    """Raise UserError unless k is an integer and 1 <= k <= available."""
    if not (is_integer(k) and 1 <= k <= available):
        raise UserError(
            "option-invalid", f"k is {k!r}; it must be in 1-{available:,}, the number of images."
        )


def knn_vote(
    queries: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    *,
    k: Sequence[int] = (1, 200),
    temperature: float = 0.07,
    exclude: Tensor | None = None,
) -> dict[int, Tensor]:
    """Return the class of each query by the weighted vote of its k neighbors (IR section 3.4).

    A neighbor votes for its class with weight exp(similarity / temperature), summed in float64;
    among equal sums the lowest class wins. k = 1 is the reference's online validation. k is capped
    at the number of rows.

    Args:
        queries: unit rows [Q, D].
        bank: unit rows [N, D].
        bank_labels: int64 [N], from 0.
        k: numbers of neighbors to report.
        temperature: divides the similarities in the weights.
        exclude: int64 [Q], one bank row that each query must not use (itself).

    Returns:
        {k: int64 [Q]} on the bank's device.

    Raises:
        UserError: no rows, k below 1, negative labels, values that are not finite, or an argument
            of another kind, shape or range.
    """
    check_temperature(temperature)
    queries, bank_labels, exclude, most = _check(queries, bank, bank_labels, k, exclude)
    classes_C, class_N = bank_labels.unique(return_inverse=True)  # increasing, so ties stay
    found: dict[int, list[Tensor]] = {count: [] for count in sorted(k)}
    for _, rows_Qk, sim_Qk in _nearest_batches(queries, bank, most, exclude):
        winners = vote(class_N[rows_Qk], sim_Qk, k, len(classes_C), temperature)
        for count, winner_Q in winners.items():
            found[count].append(classes_C[winner_Q])
    none = torch.empty(0, dtype=torch.int64, device=bank.device)
    return {count: torch.cat([none, *parts]) for count, parts in found.items()}


def vote(
    labels: Tensor, similarity: Tensor, k: Sequence[int], classes: int, temperature: float = 0.07
) -> dict[int, Tensor]:
    """Return the winning classes of :func:`knn_vote`, given the neighbors.

    Args:
        labels: int64 [Q, most], of each query's neighbors, nearest first.
        similarity: [Q, most].
        k: numbers of neighbors to report, capped at ``most``.
        classes: C.
        temperature: as in :func:`knn_vote`.

    Returns:
        {k: int64 [Q]}, by increasing k.
    """
    # Subtracting the best similarity leaves every vote's outcome alone and cannot overflow.
    weight_Qk = ((similarity - similarity[:, :1]) / temperature).double().exp()
    votes_QC = weight_Qk.new_zeros(len(labels), classes)
    counted, winners = 0, {}
    for count in sorted(k):  # each count adds to the sums of the one below it
        new = slice(counted, counted := min(count, labels.shape[1]))
        votes_QC.scatter_add_(1, labels[:, new], weight_Qk[:, new])
        winners[count] = votes_QC.argmax(dim=1)
    return winners


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
    """Return the top-1 accuracy of :func:`knn_vote`; arguments and errors as there.

    Args:
        query_labels: int64 [Q].

    Returns:
        {"knn1": 0-1, "knn200": 0-1}: one entry a k, named after the k requested.
    """
    query_labels = _check_queries(queries, query_labels, bank)
    winners = knn_vote(queries, bank, bank_labels, k=k, temperature=temperature, exclude=exclude)
    return {f"knn{count}": (winners[count] == query_labels).double().mean().item() for count in k}


def retrieval_scores(
    queries: Tensor,
    query_labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    *,
    k: Sequence[int] = VOTES,
    exclude: Tensor | None = None,
) -> dict[str, float | int | None]:
    """Return precision@k, and mAP over the full ranking.

    precision@k: share of the query's class among its k nearest rows (k capped at the number of
    rows), averaged over queries. The average precision of a query is the mean over the R rows of
    its class of (rows of the class ranked as high as this one or higher) / (all rows ranked so);
    equal similarities rank equally high, as in scikit-learn's ``average_precision_score``. mAP is
    the mean over queries whose class has a row (R > 0); the other queries are counted.

    mAP ranks all N rows for each query, exactly: some 5 ms of one core a query at N = 50,000.

    Arguments and errors: as of :func:`knn_accuracy`.

    Returns:
        {"precision1": 0-1, ..., "map": 0-1 or None if no query counts, "map_left_out": queries}.
    """
    query_labels = _check_queries(queries, query_labels, bank)
    queries, bank_labels, exclude, most = _check(queries, bank, bank_labels, k, exclude)
    hits = torch.zeros(most, dtype=torch.int64, device=bank.device)
    for part, rows_Qk, _ in _nearest_batches(queries, bank, most, exclude):
        hits += (bank_labels[rows_Qk] == query_labels[part].unsqueeze(1)).sum(dim=0)
    total_hits = hits.cumsum(0).tolist()
    found: dict[str, float | int | None] = {}
    for count in k:
        capped = min(count, most)
        found[f"precision{count}"] = total_hits[capped - 1] / (capped * max(1, len(queries)))
    precision = _average_precisions(queries, query_labels, bank, bank_labels, exclude)
    counted = precision[~precision.isnan()]
    found["map"] = counted.mean().item() if len(counted) else None
    found["map_left_out"] = len(precision) - len(counted)
    return found


@torch.no_grad()
def _average_precisions(
    queries: Tensor, query_labels: Tensor, bank: Tensor, bank_labels: Tensor, exclude: Tensor | None
) -> Tensor:
    """Return the average precision of each query, float64 [Q]; NaN where its class has no row."""
    dtype = torch.promote_types(queries.dtype, bank.dtype)
    queries, bank = queries.to(dtype), bank.to(dtype)
    batch = max(1, _RANKED_BYTES // (len(bank) * bank.element_size()))
    precision = torch.full((len(queries),), torch.nan, dtype=torch.float64, device=bank.device)
    for label in query_labels.unique().tolist():  # queries of a class share their relevant rows
        relevant = (bank_labels == label).nonzero().squeeze(1)
        for part in (query_labels == label).nonzero().squeeze(1).split(batch):
            sim_QN = queries[part] @ bank.T
            if exclude is not None:
                sim_QN[torch.arange(len(part), device=bank.device), exclude[part]] = -torch.inf
            relevant_QR = sim_QN[:, relevant].sort(dim=1).values
            all_QN = sim_QN.sort(dim=1).values
            # Rows at least as similar: all of them, less those that sort before.
            of_class = len(relevant) - torch.searchsorted(relevant_QR, relevant_QR)
            of_all = len(bank) - torch.searchsorted(all_QN, relevant_QR)
            present = relevant_QR > -torch.inf
            share_QR = (of_class.double() / of_all).masked_fill_(~present, 0.0)
            precision[part] = share_QR.sum(dim=1) / present.sum(dim=1)
    return precision


def _check_queries(queries: Tensor, query_labels: Tensor, bank: Tensor) -> Tensor:
    """Return the labels of the queries on the bank's device."""
    check_rows(queries=queries)
    check_rows(bank=bank)
    if not len(queries):
        raise UserError("no-images", "There are no queries; pass at least one.")
    check_integers("query_labels", query_labels, (len(queries),))
    return _require_labels(query_labels).to(bank.device)


def _require_labels(labels: Tensor) -> Tensor:
    if len(labels) and int(labels.min()) < 0:
        raise UserError(
            "no-labels", f"A label is {int(labels.min())}; exclude images without a label."
        )
    return labels


def _check(
    queries: Tensor, bank: Tensor, bank_labels: Tensor, k: Sequence[int], exclude: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Return all on the bank's device, and the largest k that there are rows for."""
    check_rows(queries=queries)
    check_rows(bank=bank)
    available = len(bank) - (exclude is not None)
    if available < 1:
        raise UserError("no-images", "No images to be neighbors; at least 2 are needed.")
    check_integers("bank_labels", bank_labels, (len(bank),))
    sized = isinstance(k, Sequence) and not isinstance(k, str)
    if not sized or not k or not all(is_integer(count) and count >= 1 for count in k):
        raise UserError("option-invalid", f"k is {k!r}; pass a list of integers of at least 1.")
    if exclude is not None:
        check_integers("exclude", exclude, (len(queries),), len(bank))
        exclude = exclude.to(bank.device)
    labels = _require_labels(bank_labels).to(bank.device, torch.int64)
    return queries.to(bank.device), labels, exclude, int(min(max(k), available))
