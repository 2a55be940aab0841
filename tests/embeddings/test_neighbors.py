"""Neighbors among all rows: against float64, and among equal rows."""

import numpy as np
import torch

from embeddings import blobs
from localagg.embeddings.neighbors import nearest_others


def test_neighbors_equal_a_float64_search():
    rows = blobs([700, 800, 9])
    cosine = rows.astype(np.float64) @ rows.T.astype(np.float64)
    np.fill_diagonal(cosine, -np.inf)
    neighbors, similarity = nearest_others(torch.from_numpy(rows), 7)
    best = np.sort(cosine, axis=1)[:, ::-1][:, :7]
    np.testing.assert_allclose(similarity, best, atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(cosine, neighbors.numpy(), 1), best, atol=1e-6)


def test_a_row_is_never_its_own_neighbor_among_equal_rows():
    rows = torch.nn.functional.normalize(torch.ones(30, 4), dim=1)
    neighbors, _ = nearest_others(rows, 3)
    assert neighbors[0].tolist() == [1, 2, 3]
    assert neighbors[29].tolist() == [0, 1, 2]
    assert not (neighbors == torch.arange(30).unsqueeze(1)).any()


def test_k_is_capped_at_the_other_rows():
    assert nearest_others(torch.eye(3), 9)[0].shape == (3, 2)
    assert nearest_others(torch.eye(1, 3), 9)[0].shape == (1, 0)
