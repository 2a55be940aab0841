"""Lloyd's k-means against scikit-learn's, faiss', and its own equations in float64 loops."""

import sys
import types

import faiss
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans as TheirKMeans
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score

from localagg.clustering import cluster, kmeans
from localagg.engine.kmeans import (
    Points,
    initial_centroids,
    lloyd,
    mean_centroids,
    nearest_by_flash_kmeans,
)

DIGITS = torch.from_numpy(load_digits().data.astype(np.float32))


def unit(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Unit rows around some forty directions, as in a bank."""
    draws = torch.Generator().manual_seed(seed)
    centers = torch.randn(40, dim, generator=draws)
    rows = centers[torch.randint(40, (count,), generator=draws)]
    return F.normalize(rows + 0.8 * torch.randn(count, dim, generator=draws), dim=1)


def distances(x: torch.Tensor, centroids: torch.Tensor) -> np.ndarray:
    """[N, k] squared, in float64 and by differences."""
    a, b = x.double().numpy(), centroids.double().numpy()
    return ((a[:, None] - b[None]) ** 2).sum(-1)


@pytest.mark.parametrize("iterations", [0, 1, 2, 7])
def test_iterations_match_scikit_learn(iterations):
    x = unit(1500, 24)  # without ties, as digits have them
    ours = lloyd(Points(x, bfloat16=False), x[:25], iterations=iterations)
    if iterations:
        theirs = TheirKMeans(25, init=x[:25].numpy(), n_init=1, max_iter=iterations, tol=0)
        theirs.fit(x.double().numpy())
        np.testing.assert_allclose(ours.centroids, theirs.cluster_centers_, rtol=0, atol=1e-5)
        assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-6)
    else:
        assert torch.equal(ours.centroids, x[:25])
    squared = distances(x, ours.centroids)
    assert (squared.argmin(axis=1) == ours.labels.numpy()).all()
    assert ours.inertia == pytest.approx(squared.min(axis=1).sum(), rel=1e-6)
    assert ours.iterations == iterations


def test_a_cold_start_begins_and_ends_as_in_faiss():
    x = unit(3000, 32)
    engine = faiss.Kmeans(32, 60, niter=20, seed=1236, max_points_per_centroid=3000)
    engine.train(x.numpy())
    theirs = engine.index.search(x.numpy(), 1)[1][:, 0]
    rows = Points(x, bfloat16=False)
    ours = lloyd(rows, initial_centroids(rows, 60, 1236), iterations=20)
    assert (ours.labels.numpy() != theirs).mean() < 0.002
    np.testing.assert_allclose(ours.centroids, engine.centroids, rtol=0, atol=2e-3)
    assert torch.equal(kmeans(x, 60, seed=1236).labels, torch.from_numpy(theirs).int())


@pytest.mark.parametrize("clusters", [1, 9, 130])
def test_the_nearest_is_exact_for_any_tile_and_the_first_of_equals(clusters):
    x = DIGITS[:300].round()  # whole numbers: float32 products are exact, and many rows tie
    x = torch.cat([x, x[:50]])
    centroids = torch.cat([x[::3][: clusters - clusters // 2], x[::3][: clusters // 2]])
    expected = distances(x, centroids).argmin(axis=1)
    for tile in ((512, 1024), (7, 4), (350, 1)):
        found = Points(x, tile=tile).assign(centroids, exact=True)
        assert (found.numpy() == expected).all()


def test_the_result_is_exact_after_bfloat16_passes():
    x = unit(2000, 64)
    cold = lloyd(Points(x, bfloat16=False), x[:50], iterations=20)
    led = lloyd(Points(x, bfloat16=True), x[:50], iterations=20)
    for found in (cold, led):
        squared = distances(x, found.centroids)
        assert (squared.argmin(axis=1) == found.labels.numpy()).all()
        assert found.inertia == pytest.approx(squared.min(axis=1).sum(), rel=1e-6)
    assert led.inertia < 1.005 * cold.inertia
    bfloat16 = Points(x, bfloat16=True).assign(cold.centroids, exact=False)
    assert 0 < (bfloat16 != cold.labels).float().mean() < 0.05  # so it was bfloat16, and is close


def test_iterations_continue_in_float32_if_bfloat16_cannot_distinguish_rows():
    # x . c is 16, to 0.06 in bfloat16; the squared distances are some 0.002.
    x = 1 + 0.05 * unit(600, 16)
    exact = lloyd(Points(x, bfloat16=False), x[:20], iterations=50)
    led = lloyd(Points(x, bfloat16=True), x[:20], iterations=50)
    assert led.inertia < 1.05 * exact.inertia
    assert led.iterations > 3


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("tolerance", [0.0, 0.003, 0.03])
def test_iterations_stop_when_the_inertia_settles(bfloat16, tolerance):
    x = unit(2000, 16)
    rows = Points(x, bfloat16=bfloat16)
    found = lloyd(rows, x[:60], iterations=200, tolerance=tolerance)
    assert 1 < found.iterations < 200
    # One more plain iteration gains no more than that.
    more = lloyd(Points(x, bfloat16=False), found.centroids, iterations=1)
    assert found.inertia - more.inertia <= 2 * tolerance * found.inertia + 1e-9 * found.inertia
    if tolerance == 0:
        assert torch.equal(found.labels, more.labels)


def test_a_larger_tolerance_or_overshoot_takes_fewer_iterations():
    x = unit(3000, 32)
    first = x[:100]
    counts = [
        lloyd(Points(x, bfloat16=False), first, iterations=99, tolerance=t).iterations
        for t in (0.05, 0.01, 0.001)
    ]
    assert counts[0] < counts[1] < counts[2]
    plain = lloyd(Points(x, bfloat16=False), first, iterations=6)
    beyond = lloyd(Points(x, bfloat16=False), first, iterations=6, overshoot=0.7)
    assert beyond.inertia < plain.inertia


def test_a_warm_start_from_labels_begins_at_their_means_in_new_rows():
    x = unit(2000, 32)
    last = kmeans(x, 60).labels
    moved = F.normalize(x + 0.05 * torch.randn(32, generator=torch.Generator().manual_seed(1)))
    expected = torch.stack([moved[last == k].mean(dim=0) for k in range(60)])
    found = kmeans(moved, 60, start=last, iterations=1)
    by_hand = lloyd(Points(moved, bfloat16=False), expected, iterations=1)
    assert (found.labels == by_hand.labels).float().mean() > 0.99
    cold = kmeans(moved, 60, iterations=20)
    warm = kmeans(moved, 60, start=last, tolerance=0.003)
    assert warm.inertia < 1.003 * cold.inertia
    assert warm.iterations < 10
    assert adjusted_rand_score(last, warm.labels) > 0.8
    labels = torch.stack([last, last])
    both = cluster(moved, [60, 60], start=labels, tolerance=0.003)
    assert torch.equal(both[0], warm.labels)
    assert torch.equal(both[1], warm.labels)  # the seed matters to cold starts alone


def test_empty_clusters_split_the_largest_ones():
    x = torch.cat([torch.randn(90, 4), 20 + torch.randn(30, 4), -20 + torch.randn(10, 4)])
    labels = torch.tensor([1] * 90 + [4] * 30 + [2] * 10)
    found = mean_centroids(Points(x).cluster_totals(labels, 6), torch.full((6, 4), 7.0))
    center = {k: x[labels == k].mean(dim=0) for k in (1, 4, 2)}
    radius = (x[:90] - center[1]).square().sum(dim=1).mean().sqrt()
    first = radius / 2 * torch.tensor([1.0, -1.0, 1.0, -1.0]) / 2  # unit directions
    second = radius / 2 * torch.tensor([1.0, 1.0, -1.0, -1.0]) / 2
    # Empty are 0, 3 and 5. 90 halve to 45 and 45; 0 comes before 1, so 3 splits 0 (45: 23 and 22);
    # then 1 with its 45 is the largest, and 5 splits it.
    expected = [
        center[1] + first - second,
        center[1] - first - first,
        center[2],
        center[1] + first + second,
        center[4],
        center[1] - first + first,
    ]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("bfloat16", [False, True])
def test_no_cluster_stays_empty_if_rows_can_fill_it(bfloat16):
    x = unit(1000, 16)
    first = torch.cat([x[:30], torch.full((20, 16), 50.0)])  # far from every row
    found = lloyd(Points(x, bfloat16=bfloat16), first, iterations=30)
    assert len(found.labels.unique()) == 50
    same = lloyd(Points(x, bfloat16=bfloat16), first, iterations=30)
    assert torch.equal(found.labels, same.labels)
    beyond = lloyd(Points(x, bfloat16=bfloat16), first, iterations=30, overshoot=0.7)
    assert len(beyond.labels.unique()) == 50
    assert beyond.inertia < 1.02 * found.inertia


def test_more_clusters_than_different_rows():
    x = torch.ones(12, 4)
    found = lloyd(Points(x, bfloat16=False), x[:8] * 1.0, iterations=5)
    assert found.inertia == pytest.approx(0, abs=1e-9)
    zeros = lloyd(Points(torch.zeros(5, 3), bfloat16=False), torch.zeros(5, 3), iterations=2)
    assert zeros.inertia == 0


def test_sums_of_large_clusters_keep_small_rows():
    x = torch.full((200_000, 1), 0.1)
    totals = Points(x).cluster_totals(torch.zeros(200_000, dtype=torch.int64), 1)
    assert totals[0, 0].item() == pytest.approx(200_000 * float(np.float32(0.1)), rel=1e-12)
    assert totals[0, 1].item() == 200_000


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_rows_of_other_types_are_clustered_as_float32(dtype):
    x = unit(800, 16).to(dtype)
    found = kmeans(x, 20, engine="lloyd")
    same = kmeans(x.float(), 20, engine="faiss")
    assert found.inertia == pytest.approx(same.inertia, rel=0.03)
    assert found.centroids.dtype == torch.float32
    squared = distances(x, found.centroids)
    assert found.inertia == pytest.approx(squared.min(axis=1).sum(), rel=1e-5)


def test_negative_iterations_are_an_error():
    with pytest.raises(ValueError, match="-1"):
        lloyd(Points(torch.randn(20, 4)), torch.randn(2, 4), iterations=-1)


def test_flash_kmeans_gets_the_arguments_of_its_signature(monkeypatch):
    """Its kernel needs a GPU; a stand-in checks the arguments."""
    shapes = []

    def euclid_assign_triton(x, centroids, x_sq, out=None, c_sq=None, *, use_heuristic=True):
        assert x.dtype == centroids.dtype == torch.bfloat16
        assert x.ndim == centroids.ndim == 3
        torch.testing.assert_close(x_sq, x.float().square().sum(-1))
        shapes.append(x.shape)
        return torch.cdist(x.float(), centroids.float()).argmin(dim=-1).to(torch.int32)

    fake = types.ModuleType("flash_kmeans.assign_euclid_triton")
    fake.euclid_assign_triton = euclid_assign_triton  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_kmeans", types.ModuleType("flash_kmeans"))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    x = unit(500, 16)
    found = nearest_by_flash_kmeans(x.bfloat16(), x[:30])
    assert shapes == [(1, 500, 16)]
    assert found.dtype == torch.int64
    exact = Points(x).assign(x[:30], exact=True)
    assert (found == exact).float().mean() > 0.97


def test_flash_kmeans_is_not_imported_on_a_cpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_kmeans", None)  # importing it now raises
    rows = Points(unit(500, 16), bfloat16=True)
    assert lloyd(rows, rows.rows[:20], iterations=3).iterations == 3
