"""1-NN validation of the reference program."""

import numpy as np
import pytest
import torch

from localagg.evaluation.knn import knn_accuracy, knn_vote

pytestmark = pytest.mark.reference


def test_one_nearest_neighbor_is_the_references_also_where_rows_tie(fixtures):
    recorded = np.load(fixtures / "evaluation" / "nearest_neighbour.npz")
    similarity = torch.from_numpy(recorded["similarity"])
    bank = torch.eye(similarity.shape[1])  # then the dot products are the recorded similarities
    known = torch.from_numpy(recorded["all_labels"]).long()
    labels = torch.from_numpy(recorded["labels"]).long()
    voted = knn_vote(similarity, bank, known, k=(1,))[1]
    assert voted.tolist() == recorded["predicted"].tolist()
    found = knn_accuracy(similarity, labels, bank, known, k=(1,))["knn1"]
    assert found == pytest.approx(recorded["top1"].mean().item())
