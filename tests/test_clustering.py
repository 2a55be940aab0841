import numpy as np
import pytest
import torch
from expect import user_error

from localagg.bank import MemoryBank
from localagg.clustering import cluster, kmeans


def lloyd_inertia(x, labels):
    return sum(((x[labels == k] - x[labels == k].mean(0)) ** 2).sum() for k in np.unique(labels))


def test_kmeans_is_as_good_as_scikit_learn_on_every_point():
    from sklearn.cluster import KMeans
    from sklearn.datasets import load_digits

    x = load_digits().data.astype(np.float32)
    tries = [kmeans(torch.from_numpy(x), 10, seed=seed) for seed in range(5)]
    ours = min(tries, key=lambda found: found.inertia)
    theirs = KMeans(10, init="random", n_init=5, max_iter=20, random_state=0).fit(x)
    assert lloyd_inertia(x, ours.labels.numpy()) < 1.01 * theirs.inertia_
    distances = ((x[:, None] - ours.centroids.numpy()[None]) ** 2).sum(-1)
    assert (distances.argmin(1) == ours.labels.numpy()).mean() > 0.999
    assert ours.inertia == pytest.approx(distances.min(1).sum(), rel=1e-4)


def test_all_points_are_used():
    # faiss would look at 256 points a centroid; means of these lie some 0.02 from those of all.
    x = torch.rand(20_000, 2, generator=torch.Generator().manual_seed(0))
    found = kmeans(x, 3, iterations=100)
    for label, centroid in enumerate(found.centroids):
        mean = x[found.labels == label].mean(dim=0)
        torch.testing.assert_close(centroid, mean, rtol=0, atol=1e-3)


def test_each_clustering_has_its_row_of_labels_and_its_seed():
    bank = MemoryBank(200, 8, seed=0)
    seen = []
    labels = cluster(bank, [10, 10, 25], on_progress=lambda h, found: seen.append(h))
    assert labels.shape == (3, 200)
    assert labels.dtype == torch.int32
    assert seen == [0, 1, 2]
    assert labels.amax(dim=1).tolist() == [9, 9, 24]
    assert not torch.equal(labels[0], labels[1])
    assert torch.equal(labels, cluster(bank.rows, [10, 10, 25]))
    assert torch.equal(labels[1], kmeans(bank.rows, 10, seed=1235).labels)


def test_a_warm_start_continues_from_the_last_centroids():
    rows = MemoryBank(2000, 8, seed=0).rows
    centroids: list[torch.Tensor] = []
    cluster(rows, [40], iterations=30, centroids=centroids)
    converged = kmeans(rows, 40, iterations=30)
    cold = kmeans(rows, 40, iterations=1)
    warm = kmeans(rows, 40, iterations=1, start=centroids[0])
    assert warm.inertia < converged.inertia * 1.001 < cold.inertia
    again = cluster(rows, [40], iterations=1, start=centroids)
    assert torch.equal(again[0], warm.labels)


@pytest.mark.parametrize("engine", ["faiss", "lloyd"])
def test_too_many_clusters_and_values_that_are_not_finite_are_errors(engine):
    with user_error("option-invalid", "30", "20"):
        kmeans(torch.randn(20, 4), 30, engine=engine)
    for value in (torch.nan, torch.inf):
        with user_error("not-finite"):
            kmeans(torch.full((20, 4), value), 3, engine=engine)
