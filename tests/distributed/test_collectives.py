"""Shares, and the collectives with threads for ranks; tests/training covers gloo."""

import ctypes
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import in_threads

from localagg.distributed.collectives import World, lower_gloo_priority, share

sizes = st.integers(0, 23), st.integers(1, 5)


@given(*sizes)
def test_shares_are_consecutive_ranges_whose_sizes_differ_by_one_at_most(size, ranks):
    parts = [share(size, rank, ranks) for rank in range(ranks)]
    assert [i for part in parts for i in part] == list(range(size))
    lengths = [len(part) for part in parts]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] <= 1


@given(*sizes)
def test_gather_concatenates_the_shares(size, ranks):
    whole = torch.arange(size * 3).view(size, 3)

    def call(world):
        part = world.part(size)
        return world.gather(whole[part.start : part.stop], size)

    for found in in_threads(ranks, call):
        assert torch.equal(found, whole)


@given(*sizes)
def test_scatter_sum_gives_each_rank_its_share_of_the_sum(size, ranks):
    terms = torch.randint(-9, 9, (ranks, size, 2))
    found = in_threads(ranks, lambda world: world.scatter_sum(terms[world.rank].clone()))
    assert torch.equal(torch.cat(found), terms.sum(dim=0))


def test_sum_maximum_and_stack():
    terms = torch.tensor([[1, 5], [2, -3], [4, 0]])
    for name, expected in (("sum", [7, 2]), ("maximum", [4, 5]), ("stack", terms.tolist())):
        for found in in_threads(3, lambda w, name=name: getattr(w, name)(terms[w.rank].clone())):
            assert found.tolist() == expected


def test_one_rank_calls_no_collective():
    world, rows = World.current(), torch.eye(3)
    assert (world.rank, world.size) == (0, 1)
    for found in (world.sum(rows), world.maximum(rows), world.stack(rows)[0]):
        assert torch.equal(found, torch.eye(3))
    assert torch.equal(world.gather(rows, 3), rows)
    assert torch.equal(world.scatter_sum(rows), rows)
    assert world.gather_objects("a") == ["a"]
    assert world.calls == 0


def test_rows_that_are_not_the_share_raise():
    with pytest.raises(ValueError, match=r"rank 0 of 1 .* 2 of 3"):
        World().gather(torch.eye(2), 3)


@pytest.mark.parametrize(
    ("name", "policy"),
    [(b"gloo_tcp_loop", os.SCHED_BATCH), (b"\xd0\xb9\xd0", os.SCHED_OTHER)],  # a cut letter
)
def test_only_the_polling_thread_of_gloo_becomes_a_batch_task(name, policy):
    def named():
        set_name = 15
        ctypes.CDLL(None).prctl(set_name, name)
        lower_gloo_priority()
        return os.sched_getscheduler(threading.get_native_id())

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(named).result() == policy
