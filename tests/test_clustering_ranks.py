"""k-means over split rows: the same as in one process, with traffic independent of N."""

import cluster_cases as cases
import pytest
import torch
from expect import user_error
from ranks import Pool, in_threads

from localagg.clustering import cluster, kmeans
from localagg.distributed.collectives import World
from localagg.engine.kmeans import Points, initial_centroids, lloyd

CASES = [(1000, (40, 25)), (301, (60,)), (7, (3, 7)), (2, (1, 2))]


def assert_as_alone(found, alone) -> None:
    for number, labels in enumerate(alone["labels"]):
        assert torch.equal(torch.cat([one["labels"][number] for one in found], dim=1), labels)
    for one in found:
        for ours, theirs, first in zip(
            one["centroids"], alone["centroids"], found[0]["centroids"], strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
            assert torch.equal(ours, first)  # ranks agree bit by bit
        for (inertia, done), (expected, iterations) in zip(
            one["found"], alone["found"], strict=True
        ):
            assert inertia == pytest.approx(expected, rel=1e-9, abs=1e-9)
            assert done == iterations


@pytest.mark.parametrize(("size", "clusters"), CASES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_split_rows_are_clustered_like_whole_ones(ranks, size, clusters):
    found = in_threads(ranks, lambda world: cases.split(world, size, clusters))
    assert_as_alone(found, cases.split(World(), size, clusters))


def test_processes_over_gloo_cluster_like_one():
    pool = Pool(3)
    try:
        for size, clusters in CASES:
            alone = cases.split(World(), size, clusters)
            for ranks in (1, 2, 3):
                assert_as_alone(pool(ranks, cases.split, size, clusters), alone)
    finally:
        pool.close()


def test_a_split_bank_starts_from_the_rows_that_faiss_draws():
    rows = cases.rows_of(301)
    alone = initial_centroids(Points(rows), 50, seed=1234)

    def call(world):
        part = world.part(301)
        return initial_centroids(Points(rows[part.start : part.stop], world), 50, seed=1234)

    for found in in_threads(3, call):
        assert torch.equal(found, alone)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_bytes_over_the_wire_do_not_grow_with_n(ranks):
    k, iterations = 20, 4

    def call(world, size):
        part, sent = world.part(size), []
        sum_of = world.sum
        world.sum = lambda tensor: (sent.append(tensor.nbytes), sum_of(tensor))[1]
        rows = Points(cases.rows_of(size)[part.start : part.stop], world)
        lloyd(rows, initial_centroids(rows, k, 0), iterations=iterations, tolerance=-1)
        return sent

    for size in (100, 3000):
        for sent in in_threads(ranks, lambda world, size=size: call(world, size)):
            assert sent == [16, 4 * k * 16, *[8 * k * (16 + 2)] * (iterations + 1)]


def test_an_error_on_one_rank_is_raised_on_all():
    rows = cases.rows_of(30)
    rows[3, 0] = torch.nan  # the first rank's

    def call(world):
        part = world.part(30)
        with user_error("not-finite"):
            kmeans(rows[part.start : part.stop], 3, world=world)
        with user_error("option-invalid", "31", "30"):
            cluster(rows[part.start : part.stop].nan_to_num(), [31], world=world)
        with user_error("option-conflict", "--kmeans faiss", "3"):
            kmeans(rows, 3, world=world, engine="faiss")
        return True

    assert in_threads(3, call) == [True] * 3
