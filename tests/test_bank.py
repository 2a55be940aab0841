import pytest
import torch

from localagg.bank import MemoryBank
from localagg.objectives import momentum_update


def test_initial_rows_are_unit_rows_that_depend_on_seed_and_position_alone():
    bank = MemoryBank(50, 8, seed=3)
    torch.testing.assert_close(bank.rows.norm(dim=1), torch.ones(50))
    assert torch.equal(MemoryBank(20, 8, seed=3).rows, bank.rows[:20])
    assert not torch.equal(MemoryBank(20, 8, seed=4).rows, bank.rows[:20])


def test_a_part_of_a_bank_has_the_same_initial_rows():
    size = (1 << 16) + 20  # rows are drawn in chunks of 65,536
    whole = MemoryBank(size, 1, seed=3).rows
    part = range(size - 40, size)
    assert torch.equal(MemoryBank(size, 1, seed=3, part=part).rows, whole[part.start :])


@pytest.mark.parametrize("index", [[0, 1, 2], [2, 0, 2], [1, 1, 1]])
def test_the_last_of_repeated_indices_wins_and_other_rows_stay(index):
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


def test_a_bfloat16_bank_is_updated_in_float32_and_rounded_once():
    bank = MemoryBank(5, 16, seed=0, dtype=torch.bfloat16)
    before = bank.rows.float()
    new = torch.nn.functional.normalize(
        torch.randn(2, 16, generator=torch.Generator().manual_seed(0)), dim=1
    )
    bank.update(torch.tensor([3, 0]), new, momentum=0.5)
    expected = before.clone()
    expected[[3, 0]] = momentum_update(before[[3, 0]], new)
    assert torch.equal(bank.rows, expected.bfloat16())
    assert not torch.equal(bank.rows[3], bank.rows[0])


@pytest.mark.slow
def test_a_bfloat16_bank_learns_like_a_float32_bank(tmp_path):
    from localagg.checkpoint import load_bank
    from localagg.config import override
    from localagg.evaluation.measure_run import measure_run
    from localagg.recipes.builtin import recipe
    from localagg.training.runs import pretrain

    config = override(
        recipe("digits").config, epochs=2, ir_epochs=1, width=8, blocks=(1,), batch_size=100,
        ir_batch_size=100, clusters=(20,), neighbors=64, device="cpu", bank_dtype="bfloat16",
    )  # fmt: skip
    final = pretrain(config, "digits", tmp_path / "run")["final"]
    rows = load_bank(tmp_path / "run")
    assert rows.dtype == torch.bfloat16
    torch.testing.assert_close(rows.float().norm(dim=1), torch.ones(1400), rtol=0.01, atol=0)
    measured = measure_run(tmp_path / "run", data=None, against="bank", workers=0, retrieval=True)
    assert measured["accuracy"]["knn1"] == pytest.approx(final["knn1"], abs=0.01)
    config = override(config, bank_dtype="float32")
    other = pretrain(config, "digits", tmp_path / "other")["final"]
    assert final["knn200"] == pytest.approx(other["knn200"], abs=0.05)
