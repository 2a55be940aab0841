"""The Triton search against float64. Tiles, samples and lists are so small that small banks pass
through every branch."""

from itertools import product

import naive
import pytest
import torch
from expect import user_error
from search_cases import check_nearest
from torch.nn.functional import normalize
from triton_harness import (
    BANKS,
    DEVICE,
    INTERPRETED,
    alike,
    draws,
    similarity,
    uneven,
    unit,
)

from localagg.engine import SETTINGS, cuda_search_kernels
from localagg.engine import cuda_backend as engine

SAMPLE = 96


@pytest.fixture(autouse=True)
def small():
    with SETTINGS.changed(
        gpu_sample_rows=SAMPLE,
        gpu_min_candidates=64,
        gpu_query_block=16,
        gpu_tile_rows=32,
        gpu_scan_rows=32,
    ):
        yield


@pytest.fixture
def whole_searches(monkeypatch):
    """The number of queries of each search that needed the whole bank."""
    found = []
    kernel = cuda_search_kernels.search_all_rows

    class Spy:
        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                found.append(int((args[3][:, 0] < 0).sum()))
                return kernel[grid](*args, **kwargs)

            return launch

    monkeypatch.setattr(cuda_search_kernels, "search_all_rows", Spy())
    return found


def assert_best(embedding, bank, count, rows, sim):
    check_nearest((rows, sim), embedding, bank, count, strict=False)


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
    """Two thousand on a GPU, a few under the interpreter."""
    for seed in range(6 if INTERPRETED else 2000):
        N, K, B, D = torch.randint(1, 180, (4,), generator=draws(seed)).tolist()
        B, D = (B % 3 + 1, D % 20 + 1) if INTERPRETED else (B, D)
        bank = BANKS[seed % len(BANKS)](N, D, seed)
        low = [None, torch.bfloat16, torch.float16][seed % 3]
        embedding = (seed % 5) * unit(B, D, seed=seed + 1)
        bank_low = None if low is None else bank.to(low)
        assert_best(embedding, bank, K, *engine.top_rows(embedding, bank, K, bank_low=bank_low))


def lattice(N, seed):
    """Numbers with exact float16 products: equal similarities are equal everywhere."""
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


def test_ordinary_banks_are_not_searched_whole(whole_searches):
    embedding = unit(4, 16, seed=5)
    with SETTINGS.changed(gpu_min_candidates=256):
        for low, N in product((None, torch.bfloat16, torch.float16), (90, 400)):
            bank = unit(N, 16, seed=N)
            bank_low = None if low is None else bank.to(low)
            found = engine.top_rows(embedding, bank, 12, bank_low=bank_low)
            assert_best(embedding, bank, 12, *found)
    assert whole_searches == [0] * 6


def floats(keys):
    """The float32 numbers of ordered keys."""
    return torch.where(keys < 0, keys ^ 0x7FFFFFFF, keys).view(torch.float32)


def sampled_rows(N, size=SAMPLE):
    """The rows that the sample takes, read from a bank whose rows are their own numbers."""
    numbers = torch.arange(N, device=DEVICE).float()[:, None]
    queries = engine.RoundedQueries(torch.ones(1, 1, device=DEVICE), numbers, None)
    return floats(queries.sample_keys(min(size, N)))[0].long()


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
    """All best rows are sampled, so that the threshold is too high; or none, and it is too low."""
    N, K = 700, 60
    sample = sampled_rows(N)
    good = sample[:K] if inside else rows_not_in(sample, N)[: 5 * K]
    bank, query = 0.1 * unit(N, 10, seed=1), unit(1, 10, seed=2)
    bank[good] += query
    assert_best(query, bank, K, *engine.top_rows(query, bank, K))
    assert whole_searches == [1]


def test_rows_at_the_cut_that_rounding_misplaces(whole_searches):
    """K and more rows are listed, but rounded products exclude some better ones."""
    N, K = 700, 60
    query = unit(1, 10, seed=2)
    queries = engine.RoundedQueries(query, query, None)
    error = (queries.slope + queries.absolute).item()
    sample = sampled_rows(N)
    wanted = torch.zeros(N, device=DEVICE)
    near = 0.9 - 3 * error + 1e-4 * torch.randn(160, generator=draws(3)).to(DEVICE)
    wanted[rows_not_in(sample, N)[:160]] = near
    wanted[sample[: engine.sample_rank(K, SAMPLE, N) + 5]] = 0.9
    bank = toward(query, wanted, unit(N, 10, seed=1))
    assert_best(query, bank, K, *engine.top_rows(query, bank, K))
    assert whole_searches == [1]


def test_long_rows_that_the_sample_did_not_show(whole_searches):
    """Their products err by more than the margin below the given threshold."""
    N, query = 700, unit(1, 10, seed=2)
    bank = 0.1 * unit(N, 10, seed=1)
    long = rows_not_in(sampled_rows(N, size=SETTINGS.gpu_tile_rows * 8), N)[:40]
    wanted = 0.5 + 1e-3 * (1 + torch.rand(40, generator=draws(3)).to(DEVICE))
    bank[long] = toward(query, wanted, unit(40, 10, seed=3), norm=100.0)
    threshold = torch.full((1,), 0.5, device=DEVICE)
    rows, _ = engine.top_rows(query, bank, 60, threshold=threshold)
    assert set(rows[0].tolist()) == {-1, *long.tolist()}
    assert whole_searches == [1]


def test_long_lists_are_read_in_pieces():
    embedding = unit(4, 12, seed=7)
    with SETTINGS.changed(gpu_list_block=16):
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
    """Rows that rounding to float16 or bfloat16 shortens the most, all numbers alike, so that the
    errors of their products with a row of ones add up."""
    bank = unit(N, D, seed=seed)
    bank[0], bank[1] = 1 + 0.98 * 2**-11, 1 + 0.98 * 2**-8
    return bank


@pytest.mark.parametrize("low", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [aligned, alike, uneven])
@pytest.mark.parametrize("stored", [False, True])
def test_the_error_of_a_low_product_is_within_its_bound(make, low, stored):
    """``stored``: bank and queries have the low dtype already, and only sums are rounded."""
    bank = make(SAMPLE, 24, seed=4)
    embedding = torch.cat([unit(6, 24, seed=8), 1e-4 * unit(6, 24, seed=9)])
    embedding[5] = 1
    bank_low = None if low is None else bank.to(low)
    if stored and low is not None:
        bank, embedding = bank.to(low), embedding.to(low).float()
        bank_low = None
    queries = engine.RoundedQueries(embedding, bank, bank_low)
    error = (floats(queries.sample_keys(SAMPLE)).double() - similarity(embedding, bank)).abs()
    norm = bank.double().norm(dim=1)
    bound = queries.slope.double()[:, None] * norm + queries.absolute.double()[:, None]
    assert (error <= bound).all()
    assert bound.max() < 2e-2 * norm.max() * embedding.norm(dim=1).max()  # of use
    assert torch.allclose(queries.norm.view(torch.float32).sqrt().double(), norm.max(), rtol=4e-3)


def test_a_threshold_is_exact_where_rounding_decides(whole_searches):
    query = unit(1, 10, seed=2)
    wanted = 0.5 + 2e-4 * torch.randn(90, generator=draws(5)).to(DEVICE)
    bank = toward(query, wanted, unit(90, 10, seed=6))
    assert_best(query, bank, 30, *engine.top_rows(query, bank, 30))
    rows, _ = engine.top_rows(query, bank, 60, threshold=torch.full((1,), 0.5, device=DEVICE))
    sim_N = similarity(query, bank)[0]
    assert (sim_N - 0.5).abs().min() > 1e-7
    assert set(rows[0].tolist()) == {-1, *(sim_N > 0.5).nonzero().squeeze(1).tolist()}
    assert whole_searches == [0, 0]


def test_a_given_threshold_limits_the_rows():
    embedding, bank = unit(4, 12, seed=6), unit(250, 12)
    sim_BN = similarity(embedding, bank)
    best = sim_BN.sort(dim=1, descending=True).values
    # Seven rows reach the first threshold; more than K the second; none the third; all the fourth.
    between = [best[0, 6:8].mean(), best[1, 39:41].mean(), torch.tensor(9.0), torch.tensor(-9.0)]
    threshold = torch.stack([t.to(DEVICE) for t in between]).float()
    rows, sim = engine.top_rows(embedding, bank, 20, threshold=threshold)
    assert (rows >= 0).sum(dim=1).tolist() == [7, 20, 0, 20]
    for i in range(4):
        there = rows[i] >= 0
        wanted = sim_BN[i].topk(int(there.sum()))
        assert set(rows[i][there].tolist()) == set(wanted.indices.tolist())
        assert (sim[i][~there] == -torch.inf).all()


def test_nan_shows_in_the_result():
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
    ("embedding", "bank", "error"),
    [
        (unit(2, 8), unit(9, 7), ("mismatch", 8, 7)),
        (unit(2, 600), unit(9, 600), ("too-large", 512, 600)),
        (unit(2, 8), unit(9, 8).double(), ("unsupported", "torch.float64")),
        (unit(2, 8), unit(8, 9).T, ("unsupported", ".contiguous()")),
    ],
)
def test_banks_that_the_kernels_do_not_read_are_errors(embedding, bank, error):
    with user_error(*error):
        engine.top_rows(embedding, bank, 3)
