"""Losses, gradients and bank updates of the reference program, on its eight recorded cases."""

import numpy as np
import pytest
import torch

from localagg.bank import MemoryBank
from localagg.objectives import (
    background_neighbors,
    close_neighbors,
    instance_nce,
    local_aggregation,
    momentum_update,
)

pytestmark = pytest.mark.reference
CASES = (
    "h1", "h3", "h10", "k_equals_n", "no_close_neighbour", "duplicate_index",
    "other_hyperparameters", "initial_state",
)  # fmt: skip


@pytest.fixture(params=CASES)
def case(request, fixtures):
    with np.load(fixtures / "losses" / f"{request.param}.npz") as arrays:
        return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays}


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def gradient(loss, embedding):
    return torch.autograd.grad(loss, embedding)[0]


def test_local_aggregation(case):
    embedding = case["embedding"].requires_grad_()
    index, K = case["index"].long(), int(case["K"])
    bank, labels, temperature = case["bank"], case["cluster_labels"], float(case["instance_t"])
    loss = local_aggregation(embedding, bank, labels, index, neighbors=K, temperature=temperature)
    assert relative(loss.detach(), case["la_loss"]) < 1e-5
    assert relative(gradient(loss, embedding), case["la_grad_embedding"]) < 1e-4
    rows = background_neighbors(embedding, case["bank"], K).rows
    close = close_neighbors(case["cluster_labels"], index, rows)
    assert close.sum(dim=1).tolist() == case["num_close"].tolist()


def test_instance_nce(case):
    embedding = case["embedding"].requires_grad_()
    index, noise_index = case["index"].long(), case["noise_index"].long()
    loss, data_term, noise_term = instance_nce(
        embedding, case["bank"], index, noise_index, temperature=float(case["instance_t"])
    )
    assert relative(loss.detach(), case["ir_loss"]) < 1e-5
    assert relative(data_term.detach(), case["ir_loss_data"]) < 1e-5
    assert relative(noise_term.detach(), case["ir_loss_noise"]) < 1e-5
    assert relative(gradient(data_term + noise_term, embedding), case["ir_grad_embedding"]) < 1e-4


def test_bank_update(case):
    index, m = case["index"].long(), float(case["instance_m"])
    bank = MemoryBank(len(case["bank"]), case["bank"].shape[1])
    bank.rows.copy_(case["bank"])
    new = momentum_update(bank.rows[index], case["embedding"], momentum=m)
    torch.testing.assert_close(new, case["new_data_memory"], rtol=1e-5, atol=1e-6)
    bank.update(index, case["embedding"], momentum=m)
    expected = case["bank_rows_after_update"]
    torch.testing.assert_close(bank.rows[index], expected, rtol=1e-5, atol=1e-6)
