import pytest
import torch

from localagg.bank import MemoryBank
from localagg.objectives import momentum_update


def test_rows_start_as_unit_rows_that_depend_on_seed_and_position_alone():
    bank = MemoryBank(50, 8, seed=3)
    torch.testing.assert_close(bank.rows.norm(dim=1), torch.ones(50))
    assert torch.equal(MemoryBank(20, 8, seed=3).rows, bank.rows[:20])
    assert not torch.equal(MemoryBank(20, 8, seed=4).rows, bank.rows[:20])


def test_chunks_of_the_start_do_not_show(monkeypatch):
    whole = MemoryBank(50, 8, seed=3).rows
    monkeypatch.setattr("localagg.bank._INIT_CHUNK", 7)
    assert torch.equal(MemoryBank(50, 8, seed=3).rows, whole)


@pytest.mark.parametrize("index", [[0, 1, 2], [2, 0, 2], [1, 1, 1]])
def test_of_repeated_indices_the_last_wins_and_other_rows_stay(index):
    bank = MemoryBank(5, 4, seed=0)
    before = bank.rows.clone()
    new = torch.nn.functional.normalize(
        torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dim=1
    )
    bank.update(torch.tensor(index), new, momentum=0.5)
    expected = before.clone()
    for position, row in enumerate(index):
        expected[row] = momentum_update(before[row : row + 1], new[position : position + 1])[0]
    torch.testing.assert_close(bank.rows, expected)
    assert torch.equal(bank.rows[3:], before[3:])
