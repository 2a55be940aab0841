"""The compiled search: bounds, reused memory, threads, and the number of rows it scores."""

import pytest
import torch
import torch.nn.functional as F
from search_cases import check_nearest, unit

from localagg.engine import SETTINGS, cpu_backend
from localagg.engine import cpu_search_kernels as kernels
from localagg.engine.cpu_backend import bits, nearest
from localagg.engine.searchable_bank import SearchableBank


def test_rows_are_rounded_as_torch_rounds_them_and_bounded():
    rows = torch.cat([unit(0, 40, 7), 1e-3 * unit(1, 40, 7), torch.zeros(1, 7), -torch.ones(1, 7)])
    rounded = torch.empty_like(rows, dtype=torch.bfloat16)
    error, norm = kernels.round_rows(rows.numpy(), bits(rounded))
    assert torch.equal(rounded, rows.bfloat16())
    expected = (rows.double() - rounded.double()).norm(dim=1).max().item()
    assert error**0.5 == pytest.approx(expected, rel=1e-5)
    assert norm == pytest.approx(7)
    assert kernels.max_squared_norm(rows.numpy()) == pytest.approx(7)
    assert kernels.max_squared_norm(bits(rows.bfloat16())) == pytest.approx(7)


def test_products_of_few_queries_are_rounded_to_the_nearest():
    queries, rows = unit(0, 2, 33).bfloat16(), unit(1, 50, 33).bfloat16()
    found = torch.empty(2, 50, dtype=torch.bfloat16)
    kernels.multiply_few(queries.float().numpy(), bits(rows), bits(found))
    exact = queries.double() @ rows.double().T
    # Half a unit in the last place of bfloat16, and the rounding of the float32 sum.
    assert ((found.double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-6).all()


@pytest.mark.parametrize("few", [False, True])
def test_one_query_finds_what_it_finds_among_others(few):
    rows, queries = unit(0, 9000, 16), unit(1, 3, 16)
    bank = SearchableBank(rows, few_queries=few)
    assert bank.product_dtype == torch.bfloat16 or not few
    rows, similarity = nearest(queries, bank.refresh(), 50)
    for i in range(3):
        alone = nearest(queries[i : i + 1], bank, 50)
        assert torch.equal(alone[0], rows[i : i + 1])
        assert torch.equal(alone[1], similarity[i : i + 1])


def test_a_workspace_serves_searches_of_other_shapes():
    bank = unit(0, 9000, 16)
    ready = SearchableBank(bank).refresh()
    for B, k in [(3, 7), (600, 50), (512, 50), (512, 400), (88, 50), (3, 7)]:
        queries = unit(B, B, 16)
        fresh = nearest(queries, SearchableBank(bank), k)
        assert all(map(torch.equal, nearest(queries, ready, k), fresh))
        assert len(ready.workspaces) == 1  # of the last search alone


def test_a_search_does_not_disturb_another_of_the_same_bank(monkeypatch):
    """The second search begins in the middle of the first, as in another thread."""
    ready = SearchableBank(unit(0, 9000, 16)).refresh()
    queries, others = unit(1, 40, 16), unit(2, 40, 16)
    expected = nearest(queries, ready, 50)
    select = kernels.select_top_k

    def interrupted(*arguments):
        monkeypatch.setattr(kernels, "select_top_k", select)
        nearest(others, ready, 50)
        select(*arguments)

    monkeypatch.setattr(kernels, "select_top_k", interrupted)
    assert all(map(torch.equal, nearest(queries, ready, 50), expected))
    assert kernels.select_top_k is select


def test_the_number_of_threads_changes_no_result():
    bank, queries = unit(0, 3000, 16), unit(1, 40, 16)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(nearest(queries, SearchableBank(bank).refresh(), 70))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for one in found[1:]:
        assert all(map(torch.equal, one, found[0]))


def test_it_does_not_matter_which_thread_takes_which_tile(monkeypatch):
    bank, queries = unit(0, 9000, 16).repeat(2, 1), unit(1, 40, 16)  # each row twice: ties
    before = torch.get_num_threads()
    shares = iter([1, 2, 0])  # of three threads, in turn; the first of them takes the second tile

    def every_third(queue):
        share = next(shares)
        yield from (number for number in queue if number % 3 == share)

    try:
        torch.set_num_threads(3)
        with SETTINGS.changed(tile_products=40 * 500):
            ready = SearchableBank(bank).refresh()
            expected = nearest(queries, ready, 301)
            monkeypatch.setattr(cpu_backend, "take_from", every_third)
            found = nearest(queries, ready, 301)
    finally:
        torch.set_num_threads(before)
    assert next(shares, None) is None
    assert all(map(torch.equal, found, expected))
    check_nearest(found, queries, bank, 301)
    (workspace,) = ready.workspaces.values()
    assert workspace.incomplete_B.sum() <= 1  # those found all the same, by scoring all rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["even", "clusters", "negative"])
def test_few_rows_are_scored_in_float32(kind, dtype):
    bank, queries = unit(0, 8000, 32), unit(1, 64, 32)
    if kind == "clusters":  # sorted, so that neighboring rows are alike
        bank = F.normalize(unit(2, 8, 32).repeat_interleave(1000, dim=0) + 0.8 * bank, dim=1)
        queries = F.normalize(unit(2, 8, 32).repeat(8, 1) + 0.8 * queries, dim=1)
    if kind == "negative":
        bank, queries = bank.abs(), -queries.abs()
    search = SearchableBank(bank.to(dtype)).refresh()
    check_nearest(nearest(queries, search, 100), queries, bank.to(dtype).float(), 100)
    (workspace,) = search.workspaces.values()
    assert workspace.incomplete_B.sum() <= 1
    assert workspace.count_B[~workspace.incomplete_B].mean() < 300  # of 8,000: three a neighbor


def test_all_rows_are_scored_if_too_many_are_alike():
    search = SearchableBank(unit(0, 1, 16).repeat(9000, 1)).refresh()
    with SETTINGS.changed(tile_products=500):  # 100 rows a tile, so that lists overflow
        rows, _ = nearest(unit(1, 5, 16), search, 40)
    assert (rows == torch.arange(40)).all()
    (workspace,) = search.workspaces.values()
    assert workspace.incomplete_B.all()
