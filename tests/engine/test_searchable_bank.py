"""The copy of a bank follows it; what no engine may pass over in silence; parts of a bank."""

import pytest
import torch
import torch.nn.functional as F
from search_cases import ENGINES, check_nearest, engine

from localagg.bank import MemoryBank
from localagg.engine import cpu_backend, searchable_bank
from localagg.engine import cpu_search_kernels as kernels
from localagg.engine.cpu_backend import bits
from localagg.engine.search import nearest
from localagg.engine.searchable_bank import SearchableBank, product_dtype
from localagg.errors import UserError


def unit(seed, *shape):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_copy_follows_updates_row_by_row_and_everything_else_whole(dtype, monkeypatch):
    monkeypatch.setattr(searchable_bank, "_multiplies_bf16", lambda: True)
    bank = MemoryBank(50, 8, dtype=dtype)
    ready = bank.searchable.refresh()
    copied = []
    copy = SearchableBank._copy
    monkeypatch.setattr(
        SearchableBank, "_copy", lambda self, i: (copied.append(i), copy(self, i))[1]
    )
    bank.update(torch.tensor([3, 4, 3]), 2 * unit(0, 3, 8))
    assert [list(index) for index in copied] == [[3, 4, 3]]
    assert torch.equal(ready.refresh().rounded, bank.rows.bfloat16())
    assert len(copied) == 1
    bank.rows[7] = 5 * unit(1, 1, 8)[0]  # behind its back
    bank.update(torch.tensor([1]), unit(2, 1, 8))
    assert torch.equal(ready.refresh().rounded, bank.rows.bfloat16())
    lost, longest = ready.row_bounds
    difference = (bank.rows.float() - ready.rounded.float()).norm(dim=1).max()
    assert lost == pytest.approx(difference.item()) or lost >= difference
    assert longest == pytest.approx(5, rel=0.01)
    bank.load_state_dict(MemoryBank(50, 8, seed=1).state_dict())
    assert torch.equal(bank.searchable.refresh().rounded, bank.rows.bfloat16())


def test_a_bank_of_bfloat16_is_its_own_copy(monkeypatch):
    monkeypatch.setattr(searchable_bank, "_multiplies_bf16", lambda: True)
    bank = MemoryBank(50, 8, dtype=torch.bfloat16)
    assert bank.searchable.refresh().rounded is bank.rows
    assert bank.searchable.row_bounds[0] == 0


def test_rows_are_rounded_as_torch_rounds_them_and_bounded():
    rows = torch.cat([unit(0, 40, 7), 1e-3 * unit(1, 40, 7), torch.zeros(1, 7), -torch.ones(1, 7)])
    coarse = torch.empty_like(rows, dtype=torch.bfloat16)
    lost, longest = kernels.round_rows(rows.numpy(), bits(coarse))
    assert torch.equal(coarse, rows.bfloat16())
    expected = (rows.double() - coarse.double()).norm(dim=1).max().item()
    assert lost**0.5 == pytest.approx(expected, rel=1e-5)
    assert longest == pytest.approx(7)
    assert kernels.longest_row(rows.numpy()) == pytest.approx(7)
    assert kernels.longest_row(bits(rows.bfloat16())) == pytest.approx(7)


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ENGINES)
def test_what_is_not_a_number_is_an_error_wherever_it_stands(name, value, dtype, copy):
    with engine(name):
        for row in (0, 17, 39):
            rows = unit(0, 40, 4).to(dtype)
            rows[row, 2] = value
            if str(value) == "nan" and row == 17:  # of the other sign, too
                rows[row, 2] = torch.tensor(value, dtype=dtype).neg()
            for K in (5, 40):
                with pytest.raises(UserError, match="not finite"):
                    nearest(unit(1, 3, 4), SearchableBank(rows, copy=copy), K)
        queries = unit(1, 3, 4)
        queries[1, 1] = value
        with pytest.raises(UserError, match="not finite"):
            nearest(queries, unit(0, 40, 4).to(dtype), 5)


@pytest.mark.parametrize("name", ENGINES)
def test_parts_of_a_bank_find_together_what_the_whole_does(name):
    with engine(name):
        for seed in range(60):
            bank, queries, K = unit(seed, 90, 5), unit(seed + 1, 4, 5), 1 + seed % 25
            whole_rows, whole_sim = nearest(queries, bank, K)
            least = whole_sim.amin(dim=1) - 1e-6  # products of other shapes round otherwise
            rows = []
            for start in range(0, 90, 30):
                found = nearest(queries, bank[start : start + 30], K, at_least=least)
                there = found[0] >= 0
                assert (there == (found[1] >= least[:, None])).all()
                assert not (there[:, 1:] & ~there[:, :-1]).any()  # free places are the last
                assert not there.shape[1] or there[:, -1].any()  # and no more than are needed
                rows.append(found[0] + start * (found[0] >= 0))
            for i in range(4):
                there = torch.cat([r[i] for r in rows])
                assert sorted(there[there >= 0].tolist()) == sorted(whole_rows[i].tolist())


@pytest.mark.parametrize("name", ENGINES)
def test_no_queries_have_no_neighbors(name):
    with engine(name):
        rows, sim = nearest(unit(0, 4, 5)[:0], SearchableBank(unit(1, 90, 5)), 7)
    assert rows.shape == sim.shape == (0, 7)


def test_what_a_bank_keeps_from_search_to_search_serves_searches_of_other_shapes():
    bank = unit(0, 9000, 16)
    ready = SearchableBank(bank).refresh()
    for B, k in [(3, 7), (600, 50), (512, 50), (512, 400), (88, 50), (3, 7)]:
        queries = unit(B, B, 16)
        found = cpu_backend.nearest(queries, ready, k)
        assert all(map(torch.equal, found, cpu_backend.nearest(queries, SearchableBank(bank), k)))
        assert len(ready.workspace) == 1  # the last search's alone


def test_a_search_leaves_alone_what_another_of_the_same_bank_holds(monkeypatch):
    """As from a second thread, in the middle of the first one's search."""
    ready, queries, others = (
        SearchableBank(unit(0, 9000, 16)).refresh(),
        unit(1, 40, 16),
        unit(2, 40, 16),
    )
    wanted = cpu_backend.nearest(queries, ready, 50)
    choose = kernels.choose

    def interrupted(*arguments):
        monkeypatch.setattr(kernels, "choose", choose)
        cpu_backend.nearest(others, ready, 50)
        choose(*arguments)

    monkeypatch.setattr(kernels, "choose", interrupted)
    assert all(map(torch.equal, cpu_backend.nearest(queries, ready, 50), wanted))
    assert kernels.choose is choose


def test_the_number_of_threads_changes_nothing():
    bank, queries = unit(0, 3000, 16), unit(1, 40, 16)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(cpu_backend.nearest(queries, SearchableBank(bank).refresh(), 70))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for rows, sim in found:
        assert torch.equal(rows, found[0][0])
        assert torch.equal(sim, found[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["even", "clusters", "negative"])
def test_the_lists_answer_and_seldom_all_rows(kind, dtype, monkeypatch):
    bank, queries = unit(0, 8000, 32), unit(1, 64, 32)
    if kind == "clusters":  # sorted, so that a stretch of rows is alike
        bank = F.normalize(unit(2, 8, 32).repeat_interleave(1000, dim=0) + 0.8 * bank, dim=1)
        queries = F.normalize(unit(2, 8, 32).repeat(8, 1) + 0.8 * queries, dim=1)
    if kind == "negative":
        bank, queries = bank.abs(), -queries.abs()
    judged = []
    judge = kernels.judge
    monkeypatch.setattr(kernels, "judge", lambda *a: (judge(*a), judged.append(a[-1].copy()))[0])
    search = SearchableBank(bank.to(dtype)).refresh()
    rescored = []
    rescore = kernels.rescore
    monkeypatch.setattr(kernels, "rescore", lambda *a: (rescored.append(a[6].mean()), rescore(*a)))
    found = cpu_backend.nearest(queries, search, 100)
    check_nearest(found, queries, bank.to(dtype).float(), 100)
    assert sum(int(each.sum()) for each in judged) <= 1
    assert rescored[0] < 300  # of 8,000: three a neighbor


def test_only_types_that_are_not_finer_are_multiplied(monkeypatch):
    monkeypatch.setattr(searchable_bank, "_multiplies_bf16", lambda: False)
    for dtype in (torch.float32, torch.bfloat16):
        assert product_dtype(torch.empty(1, 2, dtype=dtype)) == torch.float32
    monkeypatch.setattr(searchable_bank, "_multiplies_bf16", lambda: True)
    assert product_dtype(torch.empty(1, 2)) == torch.bfloat16
    assert product_dtype(torch.empty(1, 2, dtype=torch.float64)) == torch.float64
