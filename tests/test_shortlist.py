"""The shortlist against the whole product in float64: the same rows, whatever the data are."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from localagg import shortlist
from localagg.shortlist import Shortlist, nearest_in_order

COARSE = [torch.bfloat16, torch.float32]


def spaces(kind: str, size: int, dim: int, generator: torch.Generator):
    """A bank [size, dim] and 20 queries of some kind."""
    bank, queries = (torch.randn(n, dim, generator=generator) for n in (size, 20))
    if kind == "near":  # all rows within some degrees: many just miss the guess
        bank, queries = (1 + 0.05 * x for x in (bank, queries))
    if kind == "plateau":  # rows differ by some coarse steps
        bank, queries = torch.ones(dim) / dim**0.5 + 0.0025 * bank, 1 + queries
    if kind == "clusters":  # sorted by cluster, so that a stretch of rows is alike
        centers = torch.randn(8, dim, generator=generator)
        bank = centers.repeat_interleave(-(-size // 8), dim=0)[:size] + 0.2 * bank
        queries = centers[torch.arange(20) % 8] + 0.2 * queries
    if kind == "long":  # rows of very different lengths
        bank = bank * torch.logspace(-3, 3, size).unsqueeze(1)
        return bank, queries
    if kind == "negative":  # every similarity is below zero
        bank, queries = bank.abs(), -queries.abs()
    return F.normalize(bank, dim=1), F.normalize(queries, dim=1)


def assert_nearest(found, queries, bank, k):
    """Float64 agrees on the similarities in order, and that each row has the one named."""
    rows, sim = found
    exact = queries.double() @ bank.double().T
    scale = queries.norm(dim=1, keepdim=True) * bank.norm(dim=1).max()
    best = exact.topk(k, dim=1).values
    assert ((sim - best).abs() / scale).max() < 2e-6
    assert ((exact.gather(1, rows) - best).abs() / scale).max() < 2e-6
    assert all(len(set(line)) == k for line in rows.tolist())
    assert (sim.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("coarse", COARSE)
@pytest.mark.parametrize("kind", ["even", "near", "plateau", "clusters", "long", "negative"])
@settings(max_examples=8)
@given(st.integers(0, 2**31), st.sampled_from([1, 7, 60]), st.sampled_from([300, 1000, 4097]))
def test_the_same_rows_as_the_whole_product(coarse, kind, seed, k, size):
    bank, queries = spaces(kind, size, 24, torch.Generator().manual_seed(seed))
    assert_nearest(Shortlist(bank, coarse)(queries, k), queries, bank, k)


@pytest.mark.parametrize("coarse", COARSE)
@pytest.mark.parametrize("kind", ["even", "negative", "clusters"])
def test_it_is_the_list_that_answers_and_not_the_whole_product(kind, coarse, monkeypatch):
    bank, queries = spaces(kind, 5000, 32, torch.Generator().manual_seed(0))
    asked = []

    def counted(queries, bank, k):
        asked.append(len(queries))
        return nearest_in_order(queries, bank, k)

    monkeypatch.setattr(shortlist, "nearest_in_order", counted)
    search = Shortlist(bank, coarse)
    found = search(queries, 50)
    assert sum(asked) <= 1
    # In parts of the bank, as many rows need them.
    search._tile, search._marks = search._tile[:1500], search._marks[:9000]
    in_parts = search(queries, 50)
    assert sum(asked) <= 2
    assert torch.equal(in_parts[0], found[0])
    torch.testing.assert_close(in_parts[1], found[1])


@pytest.mark.parametrize("rounded", ["queries", "bank"])
def test_the_margin_covers_the_worst_rounding_and_little_more(rounded):
    rows = F.normalize(torch.randn(50, 24, generator=torch.Generator().manual_seed(0)), dim=1)
    lost = rows - rows.bfloat16().float()
    along = F.normalize(lost, dim=1).bfloat16().float()  # itself it loses nothing
    queries, bank = (rows, along) if rounded == "queries" else (along, rows)
    search = Shortlist(bank, torch.bfloat16)
    coarse, error = shortlist._rounded(queries, torch.bfloat16)
    found = (coarse @ search.coarse.T).diagonal().double()
    exact = (queries.double() * bank.double()).sum(dim=1)
    margin = search._margin(queries, error, exact.float()).double()
    assert (found >= exact - margin).all()
    assert (found < exact - 0.5 * margin).any()


def deceived():
    """(query, nearest row, a row that is farther but looks nearer in bfloat16)."""
    for nearest in F.normalize(torch.randn(50, 24, generator=torch.Generator().manual_seed(0))):
        query = F.normalize(nearest - nearest.bfloat16().float(), dim=0).bfloat16()
        looks, true = query @ nearest.bfloat16(), query.double() @ nearest.double()
        for scale in torch.linspace(0.9, 1.1, 200) * true:
            decoy = (scale * query).bfloat16()
            if looks < query @ decoy <= query.double() @ decoy.double() < true:
                return query, nearest, decoy
    pytest.fail("nothing deceives")


def test_the_nearest_is_found_though_rounding_puts_it_below_the_guess():
    query, nearest, decoy = deceived()
    bank = -query.float().repeat(4096, 1)
    bank[0], bank[16], bank[5] = decoy.float(), decoy.float(), nearest  # two in the sample
    search = Shortlist(bank, torch.bfloat16)
    assert search._guess(query.unsqueeze(0), 1) == query @ decoy
    assert search(query.float().unsqueeze(0), 1)[0].item() == 5


@pytest.mark.parametrize("coarse", COARSE)
def test_equal_rows_come_in_their_order(coarse):
    generator = torch.Generator().manual_seed(0)
    few = F.normalize(torch.randn(40, 8, generator=generator), dim=1)
    bank = few[torch.randint(0, 40, (1000,), generator=generator)]
    queries = F.normalize(torch.randn(30, 8, generator=generator), dim=1)
    rows, _ = Shortlist(bank, coarse)(queries, 60)
    exact = (queries.double() @ few.double().T)[:, (bank @ few.T).argmax(dim=1)]
    expected = torch.sort(exact, dim=1, descending=True, stable=True).indices[:, :60]
    assert torch.equal(rows, expected)


def test_a_misleading_sample_is_noticed():
    generator = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(2000, 16, generator=generator), dim=1)
    queries = F.normalize(torch.randn(5, 16, generator=generator), dim=1)
    bank[::16] = queries[0]  # the sample alone: it promises far more near rows than there are
    assert_nearest(Shortlist(bank, torch.bfloat16)(queries, 200), queries, bank, 200)


def test_a_crowd_of_equal_rows_goes_to_the_whole_product():
    bank = F.normalize(torch.ones(6000, 16), dim=1)
    rows, sim = Shortlist(bank, torch.bfloat16)(bank[:3], 4)
    assert rows.tolist() == [[0, 1, 2, 3]] * 3
    torch.testing.assert_close(sim, torch.ones(3, 4))


def test_only_large_float32_banks_on_a_cpu_are_worth_it():
    assert Shortlist.pays(torch.empty(4096, 2), 200)
    assert not Shortlist.pays(torch.empty(4095, 2), 200)
    assert not Shortlist.pays(torch.empty(4096, 2), 257)
    assert not Shortlist.pays(torch.empty(4096, 2, dtype=torch.float64), 1)
    assert not Shortlist.pays(torch.empty(4096, 2, device="meta"), 1)
