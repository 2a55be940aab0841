"""Sums over lists of different lengths: of each query the rows that it chose, one after the other.

Legend of shape suffixes: B queries, D embedding size, F listed rows of all queries; query i has
``counts[i]`` of them, and they stand in the order of the queries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GATHERED_BYTES = 16 << 20  # of listed rows, at a time


def similarities(query: Tensor, bank: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """v_i . M_j [F] for the listed rows j, of which query i has ``counts[i]``."""
    line = torch.arange(len(query), device=query.device).repeat_interleave(counts)
    step = max(1, GATHERED_BYTES // (bank.shape[1] * query.element_size()))
    parts = [
        (bank[rows_].to(query.dtype) * query[line_]).sum(dim=1)
        for rows_, line_ in zip(rows.split(step), line.split(step), strict=True)
    ]
    return torch.cat(parts)


def weighted_rows(bank: Tensor, rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """sum_j weight_j M_j [B, D] over the listed rows of each query, in the weights' dtype."""
    if not len(rows):
        return weight.new_zeros(len(counts), bank.shape[1])
    if bank.dtype == weight.dtype:
        offsets = counts.cumsum(0) - counts
        return F.embedding_bag(rows, bank, offsets, per_sample_weights=weight, mode="sum")
    parts, sizes = [], counts.tolist()
    for rows_, weight_ in zip(rows.split(sizes), weight.split(sizes), strict=True):
        parts.append(weight_ @ bank[rows_].to(weight.dtype))
    return torch.stack(parts)
