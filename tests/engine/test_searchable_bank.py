"""The copy of a bank follows its updates; values that are not finite are reported."""

import pytest
import torch
from expect import user_error
from search_cases import BACKENDS, unit, use_backend

from localagg.bank import MemoryBank
from localagg.engine import SETTINGS
from localagg.engine.search import nearest
from localagg.engine.searchable_bank import SearchableBank, product_dtype


@pytest.fixture
def bfloat16_products():
    with SETTINGS.changed(bfloat16_products=True):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_copy_follows_every_change(dtype, bfloat16_products):
    bank = MemoryBank(50, 8, dtype=dtype)
    ready = bank.searchable.refresh()
    bank.update(torch.tensor([3, 4, 3]), 2 * unit(0, 3, 8))
    assert torch.equal(ready.refresh().rounded, bank.rows.bfloat16())
    bank.rows[7] = 5 * unit(1, 1, 8)[0]  # without MemoryBank.update
    bank.update(torch.tensor([1]), unit(2, 1, 8))
    assert torch.equal(ready.refresh().rounded, bank.rows.bfloat16())
    difference = (bank.rows.float() - ready.rounded.float()).norm(dim=1).max().item()
    assert difference * (1 - 1e-6) <= ready.row_bounds.rounding_error
    assert ready.row_bounds.norm == pytest.approx(5, rel=0.01)
    bank.load_state_dict(MemoryBank(50, 8, seed=1).state_dict())
    assert torch.equal(bank.searchable.refresh().rounded, bank.rows.bfloat16())


def test_an_update_rounds_the_changed_rows_alone(bfloat16_products):
    bank = MemoryBank(50, 8)
    ready = bank.searchable.refresh()
    ready.rounded[9] = 0  # a mark that only a whole copy removes
    bank.update(torch.tensor([3, 4]), unit(0, 2, 8))
    assert (ready.refresh().rounded[9] == 0).all()
    bank.rows[7] = unit(1, 1, 8)[0]
    assert torch.equal(ready.refresh().rounded, bank.rows.bfloat16())


def test_a_bfloat16_bank_is_its_own_copy(bfloat16_products):
    bank = MemoryBank(50, 8, dtype=torch.bfloat16)
    assert bank.searchable.refresh().rounded is bank.rows
    assert bank.searchable.row_bounds.rounding_error == 0


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", BACKENDS)
def test_values_that_are_not_finite_are_reported_wherever_they_are(name, value, dtype, copy):
    with use_backend(name):
        for row in (0, 17, 39):
            rows = unit(0, 40, 4).to(dtype)
            rows[row, 2] = value
            if str(value) == "nan" and row == 17:  # the other sign, too
                rows[row, 2] = torch.tensor(value, dtype=dtype).neg()
            for K in (5, 40):
                with user_error("not-finite"):
                    nearest(unit(1, 3, 4), SearchableBank(rows, copy=copy), K)
        queries = unit(1, 3, 4)
        queries[1, 1] = value
        with user_error("not-finite"):
            nearest(queries, unit(0, 40, 4).to(dtype), 5)


@pytest.mark.parametrize("fast", [True, False])
def test_products_are_never_finer_than_the_rows(fast):
    with SETTINGS.changed(bfloat16_products=fast):
        assert product_dtype(torch.empty(1, 2)) == (torch.bfloat16 if fast else torch.float32)
        of_bfloat16 = product_dtype(torch.empty(1, 2, dtype=torch.bfloat16))
        assert of_bfloat16 == (torch.bfloat16 if fast else torch.float32)
        assert product_dtype(torch.empty(1, 2, dtype=torch.float64)) == torch.float64
