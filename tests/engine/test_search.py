"""Each backend against loops in float64, on hundreds of tiny banks of each hard kind."""

import naive
import numpy as np
import pytest
import torch
from search_cases import BACKENDS, CASES, KINDS, check_nearest, problem, unit, use_backend

from localagg.engine.bank_shard import Neighbors
from localagg.engine.search import nearest, sample_threshold
from localagg.engine.searchable_bank import SearchableBank
from localagg.objectives import aggregation_loss, close_neighbors, local_aggregation


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_nearest_rows_and_loss_are_those_of_float64_loops(kind, name):
    for seed in range(CASES):
        # With no deviation to spare, every other sample misleads.
        with use_backend(name, sample_deviations=seed % 3):
            bank, queries, K = problem(kind, seed)
            if seed % 4 == 3:
                bank = bank.bfloat16()
            found = nearest(queries, SearchableBank(bank) if seed % 2 else bank, K)
            check_nearest(found, queries, bank.float(), K, strict=name != "torch")
            check_loss(found, queries, bank, seed)


def check_loss(found, queries, bank, seed):
    rng = np.random.RandomState(seed)
    N, B = len(bank), len(queries)
    labels = torch.from_numpy(rng.randint(0, 1 + N // 3, (1 + seed % 3, N)).astype(np.int32))
    index, t = torch.from_numpy(rng.randint(0, N, B)), [0.07, 0.2, 1.0][seed % 3]
    v, rows = queries.clone().requires_grad_(), found[0]
    marked = close_neighbors(labels, index, rows)
    loss = aggregation_loss(v, bank, Neighbors(*found, None), marked, temperature=t)[0].mean()
    (gradient,) = torch.autograd.grad(loss, v)
    expected = naive.aggregation(
        queries.tolist(), bank.tolist(), labels.tolist(), index.tolist(), rows.tolist(), t
    )
    assert loss.item() == pytest.approx(expected[0], rel=1e-5)
    error = np.abs(gradient.numpy() - expected[1]).max()
    assert error <= 1e-4 * np.abs(expected[1]).max() + 2e-6 * expected[2] + 1e-12


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", BACKENDS)
def test_inference_mode_changes_neither_this_search_nor_later_ones(name, threads):
    bank, queries, K = problem("even", 5)
    labels, index = torch.arange(len(bank)).unsqueeze(0) % 3, torch.arange(len(queries))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with use_backend(name):
            ready = SearchableBank(bank)
            with torch.inference_mode():
                found = [nearest(queries, ready, K)]
                losses = [local_aggregation(queries, bank, labels, index, neighbors=K)]
            found.append(nearest(queries, ready, K))
            losses.append(local_aggregation(queries, bank, labels, index, neighbors=K))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, found[0], found[1]))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("sample", "rank"), [(1, 1), (30, 7), (90, 90)])
def test_as_many_sampled_rows_as_requested_reach_the_threshold(name, sample, rank):
    bank, queries = unit(rank, 94, 6), unit(rank + 1, 3, 6)
    with use_backend(name):
        threshold = sample_threshold(queries.requires_grad_(), SearchableBank(bank), rank, sample)
    assert not threshold.requires_grad
    step = len(bank) // sample
    sim = queries.double() @ bank[: step * sample : step].double().T
    assert ((sim > threshold.unsqueeze(1) - 2**-7).sum(dim=1) >= rank).all()
    assert ((sim > threshold.unsqueeze(1) + 2**-7).sum(dim=1) <= rank).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_parts_of_a_bank_together_find_the_neighbors_in_the_whole(name):
    with use_backend(name):
        for seed in range(60):
            bank, queries, K = unit(seed, 90, 5), unit(seed + 1, 4, 5), 1 + seed % 25
            whole_rows, whole_sim = nearest(queries, bank, K)
            least = whole_sim.amin(dim=1) - 1e-6  # products of other shapes round otherwise
            rows = []
            for start in range(0, 90, 30):
                found = nearest(queries, bank[start : start + 30], K, at_least=least)
                there = found[0] >= 0
                assert (there == (found[1] >= least[:, None])).all()
                assert not (there[:, 1:] & ~there[:, :-1]).any()  # free places come last
                assert not there.shape[1] or there[:, -1].any()  # lists are no longer than needed
                rows.append(found[0] + start * there)
            for i in range(4):
                there = torch.cat([r[i] for r in rows])
                assert sorted(there[there >= 0].tolist()) == sorted(whole_rows[i].tolist())


@pytest.mark.parametrize("name", BACKENDS)
def test_no_queries_have_no_neighbors(name):
    with use_backend(name):
        rows, sim = nearest(unit(0, 4, 5)[:0], SearchableBank(unit(1, 90, 5)), 7)
    assert rows.shape == sim.shape == (0, 7)
