"""The number of clusters: that of clear groups, of the digits, and of rows without any."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from localagg.embeddings.cluster_count import candidates, choose_clusters, principal_components


def groups(count: int, each: int, noise: float = 0.1) -> torch.Tensor:
    torch.manual_seed(count)
    centers = F.normalize(torch.randn(count, 32), dim=1).repeat_interleave(each, dim=0)
    return F.normalize(centers + noise * torch.randn(count * each, 32) / 32**0.5, dim=1)


@pytest.mark.parametrize(("count", "each"), [(2, 30), (3, 4), (6, 20), (9, 40)])
def test_clear_groups_are_counted(count, each):
    found = choose_clusters(groups(count, each))
    assert found.k == count
    assert max(found.silhouettes.values()) == found.silhouettes[count] > 0.8
    assert found.images == count * each


def test_many_groups_are_counted_within_a_factor_of_1_5():
    assert 40 / 1.5 <= choose_clusters(groups(40, 40)).k <= 40 * 1.5


def test_ten_digits_are_counted_within_a_factor_of_1_5_and_by_the_seed():
    rows = torch.from_numpy(load_digits().data).float()
    assert 10 / 1.5 <= choose_clusters(rows).k <= 15
    assert choose_clusters(rows[:60], seed=1) == choose_clusters(rows[:60], seed=1)


@pytest.mark.parametrize("size", [1, 2, 5, 30])
def test_equal_or_few_rows_are_one_cluster(size):
    assert choose_clusters(torch.ones(size, 4)).k == 1
    assert choose_clusters(torch.randn(min(size, 5), 4)).k == 1


def test_candidates_are_dense_and_leave_images_for_each_cluster():
    assert candidates(5) == []
    assert candidates(12) == [2, 3, 4]
    many = candidates(10_000)
    assert (many[0], many[-1] > 85, many[-1] <= 100) == (2, True, True)
    assert all(b <= max(a + 1, 1.2 * a) for a, b in itertools.pairwise(many))


def test_components_are_those_of_scikit_learn():
    rows = groups(6, 20)
    expected = torch.from_numpy(PCA(8).fit_transform(rows.numpy())).float()
    signs = (principal_components(rows, 8).flip(1) * expected).sum(dim=0).sign()
    expected = F.normalize(expected * signs, dim=1)
    torch.testing.assert_close(principal_components(rows, 8).flip(1), expected, atol=1e-3, rtol=0)
