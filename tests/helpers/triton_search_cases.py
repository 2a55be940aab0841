"""The Triton engine's search against float64. Tiles, samples and lists are made small, so that
small banks pass through every branch."""

from itertools import product

import naive
import pytest
import torch
from torch.nn.functional import normalize
from triton_harness import (
    BANKS,
    DEVICE,
    INTERPRETED,
    alike,
    draws,
    rising,
    similarity,
    uneven,
    unit,
)

from localagg.engine import cuda_backend as engine
from localagg.errors import UserError

SAMPLE = 96


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(engine, "SAMPLE_ROWS", SAMPLE)
    monkeypatch.setattr(engine, "LEAST_PLACES", 64)
    monkeypatch.setattr(engine, "QUERY_BLOCK", 16)
    monkeypatch.setattr(engine, "TILE_ROWS", 32)
    monkeypatch.setattr(engine, "WHOLE_TILE_ROWS", 32)


@pytest.fixture
def whole_searches(monkeypatch):
    """How many queries each search found wanting, and searched the whole bank for."""
    found = []
    kernel = engine.kernels.search_whole

    class Spy:
        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                found.append(int((args[3][:, 0] < 0).sum()))
                return kernel[grid](*args, **kwargs)

            return launch

    monkeypatch.setattr(engine.kernels, "search_whole", Spy())
    return found


def assert_best(embedding, bank, count, rows, sim, close=2e-6):
    """The result is a right answer: as good as float64's but for rounding, and told truly."""
    sim_BN = similarity(embedding, bank)
    B, N = sim_BN.shape
    K = min(count, N)
    assert rows.shape == sim.shape == (B, K)
    scale = embedding.double().norm(dim=1)[:, None] * bank.double().norm(dim=1).max()
    assert all(len(set(mine.tolist())) == K for mine in rows)
    assert ((sim - sim_BN.gather(1, rows)).abs() <= close * scale).all()
    unlisted = sim_BN.scatter(1, rows, -torch.inf)
    worst = sim_BN.gather(1, rows).amin(dim=1, keepdim=True)
    assert (unlisted.amax(dim=1, keepdim=True) <= worst + 2e-6 * scale).all()


# --- The search -----------------------------------------------------------------------------------


SIZES = [(1, 1), (5, 9), (97, 97), (110, 20), (150, 6)]


@pytest.mark.parametrize(("N", "K"), SIZES)
@pytest.mark.parametrize("make", BANKS)
def test_the_best_rows_of_any_bank(make, N, K):
    low = [None, torch.bfloat16, torch.float16][(N + K) % 3]
    bank = make(N, 12, seed=N)
    embedding = unit(6, 12, seed=99)
    embedding[1] = 0
    embedding[2] = bank[N // 2]
    embedding[3] *= 1e-3
    bank_low = None if low is None else bank.to(low)
    assert_best(embedding, bank, K, *engine.top_rows(embedding, bank, K, bank_low=bank_low))


def test_drawn_cases():
    """Two thousand on a GPU; the interpreter has time for a few."""
    for seed in range(6 if INTERPRETED else 2000):
        N, K, B, D = torch.randint(1, 180, (4,), generator=draws(seed)).tolist()
        B, D = (B % 3 + 1, D % 20 + 1) if INTERPRETED else (B, D)
        bank = BANKS[seed % len(BANKS)](N, D, seed)
        low = [None, torch.bfloat16, torch.float16][seed % 3]
        embedding = (seed % 5) * unit(B, D, seed=seed + 1)
        bank_low = None if low is None else bank.to(low)
        assert_best(embedding, bank, K, *engine.top_rows(embedding, bank, K, bank_low=bank_low))


def lattice(N, seed):
    """Numbers of which float16 products are exact: equal similarities are equal everywhere."""
    return torch.randint(-2, 3, (N, 6), generator=draws(seed)).float().to(DEVICE) / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "K"), [(3, 2), (40, 11), (100, 30), (100, 99)])
def test_ties_go_to_the_lowest_row(dtype, N, K):
    embedding, bank = lattice(5, seed=1), lattice(N, seed=N).to(dtype)
    embedding[0] = 0  # all are equal
    rows, sim = engine.top_rows(embedding, bank, K)
    sim_BN = similarity(embedding, bank)
    for mine, found, sim_N in zip(rows.tolist(), sim, sim_BN, strict=True):
        assert sorted(mine) == sorted(naive.background(sim_N.tolist(), K))
        assert torch.equal(found.double(), sim_N[mine])


def test_minus_zero_is_zero():
    bank = -torch.ones(40, 16, device=DEVICE)
    bank[20:] = 1
    rows, sim = engine.top_rows(torch.zeros(1, 16, device=DEVICE), bank, 10)
    assert sorted(rows[0].tolist()) == list(range(10))
    assert (sim == 0).all()


def test_identical_rows_and_zero_rows_are_searched_whole(whole_searches):
    for bank in (unit(1, 8).expand(200, 8).contiguous(), torch.zeros(200, 8, device=DEVICE)):
        rows, _ = engine.top_rows(unit(3, 8, seed=1), bank, 20)
        assert all(sorted(mine) == list(range(20)) for mine in rows.tolist())
    assert whole_searches == [3, 3]


def test_ordinary_banks_are_not_searched_whole(whole_searches, monkeypatch):
    monkeypatch.setattr(engine, "LEAST_PLACES", 256)
    embedding = unit(4, 16, seed=5)
    for low, N in product((None, torch.bfloat16, torch.float16), (90, 400)):
        bank = unit(N, 16, seed=N)
        found = engine.top_rows(embedding, bank, 12, bank_low=None if low is None else bank.to(low))
        assert_best(embedding, bank, 12, *found)
    assert whole_searches == [0] * 6


def sampled_rows(N, size=SAMPLE):
    """Which rows the sample takes: told by a bank whose rows are their own numbers."""
    numbers = torch.arange(N, device=DEVICE).float()[:, None]
    return engine.sample_keys(torch.ones(1, 1, device=DEVICE), numbers, size=size)[0].long()


def rows_not_in(sample, N):
    others = torch.ones(N, dtype=torch.bool, device=DEVICE)
    others[sample] = False
    return others.nonzero().squeeze(1)


def toward(query, similarity, sideways, norm=1.0):
    """Rows [N, D] of one length with these similarities [N] to a unit query."""
    sideways = normalize(sideways - (sideways @ query.T) * query, dim=1)
    along = similarity[:, None]
    return along * query + (norm**2 - along**2).sqrt() * sideways


def test_the_sample_takes_one_row_of_each_stretch():
    N = 1000
    rows = sampled_rows(N).cpu()
    edges = torch.arange(SAMPLE + 1) * N // SAMPLE
    assert (rows >= edges[:-1]).all()
    assert (rows < edges[1:]).all()
    assert len((rows - edges[:-1]).unique()) > 5  # not always at the same place
    assert sampled_rows(60).tolist() == list(range(60))


@pytest.mark.parametrize("inside", [True, False])
def test_a_sample_that_misleads(inside, whole_searches):
    """All the best rows are in the sample, so it asks for too much; or none is, for too little."""
    N, K = 700, 60
    sample = sampled_rows(N)
    good = sample[:K] if inside else rows_not_in(sample, N)[: 5 * K]
    bank, query = 0.1 * unit(N, 10, seed=1), unit(1, 10, seed=2)
    bank[good] += query
    assert_best(query, bank, K, *engine.top_rows(query, bank, K))
    assert whole_searches == [1]


def test_rows_at_the_cut_that_rounding_misplaces(whole_searches):
    """Listed are K and more, but some left out by the rounded products are better."""
    N, K = 700, 60
    query = unit(1, 10, seed=2)
    queries = engine._Queries(query, query, None)
    error = (queries.slope + queries.absolute).item()
    sample = sampled_rows(N)
    wanted = torch.zeros(N, device=DEVICE)
    near = 0.9 - 3 * error + 1e-4 * torch.randn(160, generator=draws(3)).to(DEVICE)
    wanted[rows_not_in(sample, N)[:160]] = near
    wanted[sample[: engine._sample_rank(K, SAMPLE, N) + 5]] = 0.9
    bank = toward(query, wanted, unit(N, 10, seed=1))
    assert_best(query, bank, K, *engine.top_rows(query, bank, K))
    assert whole_searches == [1]


def test_long_rows_that_the_sample_did_not_show(whole_searches):
    """Their products err by more than the given threshold was lowered for."""
    N, query = 700, unit(1, 10, seed=2)
    bank = 0.1 * unit(N, 10, seed=1)
    long = rows_not_in(sampled_rows(N, size=engine.TILE_ROWS * 8), N)[:40]
    wanted = 0.5 + 1e-3 * (1 + torch.rand(40, generator=draws(3)).to(DEVICE))
    bank[long] = toward(query, wanted, unit(40, 10, seed=3), norm=100.0)
    threshold = torch.full((1,), 0.5, device=DEVICE)
    rows, _ = engine.top_rows(query, bank, 60, threshold=threshold)
    assert set(rows[0].tolist()) == {-1, *long.tolist()}
    assert whole_searches == [1]


def test_long_lists_are_read_in_pieces(monkeypatch):
    monkeypatch.setattr(engine, "LIST_BLOCK", 16)
    embedding = unit(4, 12, seed=7)
    for bank in (unit(150, 12), alike(150, 12, seed=3)):
        assert_best(embedding, bank, 33, *engine.top_rows(embedding, bank, 33))


def test_numbers_beyond_float16():
    bank, embedding = unit(50, 8), unit(3, 8, seed=1)
    bank[7] *= 1e6
    bank[8] *= -1e6
    assert_best(embedding, bank, 5, *engine.top_rows(embedding, bank, 5))
    assert_best(embedding * 1e6, bank, 5, *engine.top_rows(embedding * 1e6, bank, 5))
    # The best row, whose rounded product is minus infinity.
    bank[7:9] = 0
    bank[7, :2] = torch.tensor([66000.0, 65000.0])
    query = torch.zeros(1, 8, device=DEVICE)
    query[0, :2] = torch.tensor([-0.1, 0.99])
    assert 7 in engine.top_rows(query, bank, 5)[0][0]


def aligned(N, D, seed):
    """Rows that rounding, to float16 or to bfloat16, shortens as much as it can, all numbers alike;
    so the errors of their products with a row of ones add up."""
    bank = unit(N, D, seed=seed)
    bank[0], bank[1] = 1 + 0.98 * 2**-11, 1 + 0.98 * 2**-8
    return bank


@pytest.mark.parametrize("low", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [aligned, alike, uneven])
@pytest.mark.parametrize("stored", [False, True])
def test_the_error_of_a_low_product_is_within_its_bound(make, low, stored):
    """``stored``: bank and queries are in the low type already, and only the sums round."""
    bank = make(SAMPLE, 24, seed=4)
    embedding = torch.cat([unit(6, 24, seed=8), 1e-4 * unit(6, 24, seed=9)])
    embedding[5] = 1
    bank_low = None if low is None else bank.to(low)
    if stored and low is not None:
        bank, embedding = bank.to(low), embedding.to(low).float()
        bank_low = None
    queries = engine._Queries(embedding, bank, bank_low)
    keys = queries.sample(SAMPLE)
    found = torch.where(keys < 0, keys ^ 0x7FFFFFFF, keys).view(torch.float32).double()
    error = (found - similarity(embedding, bank)).abs()
    norm = bank.double().norm(dim=1)
    bound = queries.slope.double()[:, None] * norm + queries.absolute.double()[:, None]
    assert (error <= bound).all()
    assert bound.max() < 2e-2 * norm.max() * embedding.norm(dim=1).max()  # of use
    assert torch.allclose(queries.norm.view(torch.float32).sqrt().double(), norm.max(), rtol=4e-3)


def test_rows_alone_need_fewer_looks():
    embedding, bank = unit(6, 16, seed=5), unit(150, 16)
    rows, sim = engine.top_rows(embedding, bank, 12, values=False)
    exact_rows, exact = engine.top_rows(embedding, bank, 12)
    assert torch.equal(rows.sort(dim=1).values, exact_rows.sort(dim=1).values)
    order, exact_order = rows.argsort(dim=1), exact_rows.argsort(dim=1)
    gap = (sim.gather(1, order) - exact.gather(1, exact_order)).abs()
    assert 1e-6 < gap.max() < 4e-3


def test_rows_alone_are_exact_where_rounding_decides(whole_searches):
    query = unit(1, 10, seed=2)
    wanted = 0.5 + 2e-4 * torch.randn(90, generator=draws(5)).to(DEVICE)
    bank = toward(query, wanted, unit(90, 10, seed=6))
    found = engine.top_rows(query, bank, 30, values=False)
    assert_best(query, bank, 30, *found, close=4e-3)
    # So is the end of those that reach a threshold.
    rows, _ = engine.top_rows(query, bank, 60, threshold=torch.full((1,), 0.5, device=DEVICE))
    sim_N = similarity(query, bank)[0]
    assert (sim_N - 0.5).abs().min() > 1e-7
    assert set(rows[0].tolist()) == {-1, *(sim_N > 0.5).nonzero().squeeze(1).tolist()}
    assert whole_searches == [0, 0]


def test_a_given_threshold_and_an_offset():
    embedding, bank = unit(4, 12, seed=6), unit(250, 12)
    sim_BN = similarity(embedding, bank)
    best = sim_BN.sort(dim=1, descending=True).values
    # Seven rows reach the first threshold; more than K the second; none the third; all the fourth.
    between = [best[0, 6:8].mean(), best[1, 39:41].mean(), torch.tensor(9.0), torch.tensor(-9.0)]
    threshold = torch.stack([t.to(DEVICE) for t in between]).float()
    rows, sim = engine.top_rows(embedding, bank, 20, threshold=threshold, offset=1000)
    assert (rows >= 0).sum(dim=1).tolist() == [7, 20, 0, 20]
    for i in range(4):
        there = rows[i] >= 0
        wanted = sim_BN[i].topk(int(there.sum()))
        assert set((rows[i][there] - 1000).tolist()) == set(wanted.indices.tolist())
        assert (sim[i][~there] == -torch.inf).all()


def test_shards_together_find_what_the_whole_finds():
    N, K = 360, 25
    embedding, bank = unit(5, 10, seed=3), rising(N, 10, seed=2)
    parts = [(0, 100), (100, 130), (130, N)]
    sample = torch.cat([engine.sample_keys(embedding, bank[a:b]) for a, b in parts], dim=1)
    threshold = engine.threshold_of_sample(sample, K, N)
    found = [
        engine.top_rows(embedding, bank[a:b], K, threshold=threshold, offset=a) for a, b in parts
    ]
    rows = torch.cat([rows for rows, _ in found], dim=1)
    sim = torch.cat([sim for _, sim in found], dim=1)
    assert ((rows >= 0).sum(dim=1) >= K).all()
    assert (rows < 0).any()  # so the threshold did spare work
    best = sim.topk(K, dim=1)
    assert_best(embedding, bank, K, rows.gather(1, best.indices), best.values)


def test_nan_is_met_in_the_result():
    embedding, bank = unit(2, 8, seed=1), unit(110, 8)
    bank[100, 3] = torch.nan
    assert engine.top_rows(embedding, bank, 5)[1].isnan().sum(dim=1).tolist() == [1, 1]
    assert engine.top_rows(embedding, bank.bfloat16(), 5)[1].isnan().any(dim=1).all()
    bank[100, 3] = 0
    embedding[1, 0] = -torch.nan
    assert engine.top_rows(embedding, bank, 5)[1].isnan().any(dim=1).tolist() == [False, True]


def test_deterministic_algorithms_give_rows_in_order():
    embedding, bank = unit(2, 8, seed=1), unit(90, 8)
    torch.use_deterministic_algorithms(True)
    try:
        rows, sim = engine.top_rows(embedding, bank, 10)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(rows, rows.sort(dim=1).values)
    assert_best(embedding, bank, 10, rows, sim)


def test_batches_beyond_a_block_and_empty_ones():
    bank = unit(70, 8)
    embedding = unit(20, 8, seed=1)
    assert_best(embedding, bank, 2, *engine.top_rows(embedding, bank, 2))
    assert engine.top_rows(embedding[:0], bank, 2)[0].shape == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((unit(2, 8), unit(9, 7)), "8 numbers and the bank's rows 7"),
        ((unit(2, 600), unit(9, 600)), "at most 512 numbers, not 600"),
        ((unit(2, 8), unit(9, 8).double()), "not torch.float64"),
        ((unit(2, 8), unit(8, 9).T), "contiguous"),
    ],
)
def test_wrong_use_is_told(arguments, message):
    with pytest.raises(UserError, match=message):
        engine.top_rows(*arguments, 3)


def test_a_low_copy_of_another_bank_is_told():
    with pytest.raises(UserError, match="low copy"):
        engine.top_rows(unit(2, 8), unit(9, 8), 3, bank_low=unit(8, 8).half())
