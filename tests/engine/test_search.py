"""The engine against loops in float64, thousands of tiny banks that are hard on purpose.

Tiles are so small that every bank has many; each engine answers more than 2,000 cases.
"""

import naive
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from search_cases import CASES, ENGINES, KINDS, check_nearest, engine, problem

from localagg.engine import cpu_backend, search
from localagg.engine.bank_shard import Neighbors
from localagg.engine.search import nearest
from localagg.engine.searchable_bank import SearchableBank
from localagg.objectives import aggregation_loss, close_neighbors, local_aggregation


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_rows_and_the_loss_are_those_of_loops_in_float64(kind, name):
    with engine(name) as patch:
        for seed in range(CASES):
            # With no deviation to spare every other sample misleads.
            sizes = cpu_backend.SIZES._replace(spare=seed % 3)
            patch.setattr(cpu_backend, "SIZES", sizes)
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
@pytest.mark.parametrize("name", ENGINES)
def test_inference_mode_changes_nothing_then_or_later(name, threads):
    """Not in which memory is kept for later searches, nor where other threads write."""
    bank, queries, K = problem("even", 5)
    labels, index = torch.arange(len(bank)).unsqueeze(0) % 3, torch.arange(len(queries))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with engine(name):
            ready = SearchableBank(bank)
            with torch.inference_mode():
                found = [nearest(queries, ready, K)]
                losses = [local_aggregation(queries, bank, labels, index, neighbors=K)]
            found.append(nearest(queries, ready, K))
            losses.append(local_aggregation(queries, bank, labels, index, neighbors=K))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(("sample", "rank"), [(1, 1), (30, 7), (90, 90)])
def test_what_is_guessed_is_reached_by_as_many_of_the_sampled_rows(name, sample, rank):
    g = torch.Generator().manual_seed(rank)
    bank, queries = (F.normalize(torch.randn(n, 6, generator=g), dim=1) for n in (94, 3))
    with engine(name):
        guess = search.sample_threshold(
            queries.requires_grad_(), SearchableBank(bank), rank, sample
        )
    assert not guess.requires_grad
    step = len(bank) // sample
    sim = queries.double() @ bank[: step * sample : step].double().T
    assert ((sim > guess.unsqueeze(1) - 2**-7).sum(dim=1) >= rank).all()
    assert ((sim > guess.unsqueeze(1) + 2**-7).sum(dim=1) <= rank).all()
