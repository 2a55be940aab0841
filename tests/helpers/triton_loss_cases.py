"""The Triton losses against float64, and LA from end to end."""

import naive
import pytest
import torch
import triton
from triton_harness import (
    DEVICE,
    INTERPRETED,
    alike,
    draws,
    falling,
    repeated,
    rising,
    similarity,
    unit,
)

from localagg.engine import SETTINGS
from localagg.engine import cuda_backend as engine
from localagg.engine.bank_shard import Neighbors
from localagg.objectives import aggregation_loss

# --- The exact softmax ----------------------------------------------------------------------------


def assert_partition(embedding, bank, temperature):
    log_Z, mean = engine.log_partition(embedding, bank, temperature)
    logit = similarity(embedding, bank) / temperature
    wanted = logit.softmax(dim=1) @ bank.double()
    assert ((log_Z - logit.logsumexp(dim=1)).abs() <= 1e-5 * logit.abs().amax(dim=1)).all()
    assert ((mean - wanted).norm(dim=1) <= 1e-4 * wanted.norm(dim=1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("B", "N", "D"), [(3, 1, 5), (5, 63, 16), (20, 300, 24), (130, 40, 8)])
def test_log_partition_and_mean_row(B, N, D, dtype):
    bank = unit(N, D, seed=N).to(dtype)
    embedding = unit(B, D, seed=1)
    embedding[0] = bank[N // 2].float()
    for temperature in (0.07, 1.0):
        assert_partition(embedding, bank, temperature)


@pytest.mark.parametrize("make", [repeated, alike, rising, falling])
def test_log_partition_of_contrived_banks(make):
    assert_partition(unit(4, 12, seed=99), make(200, 12, seed=2), 0.05)


def test_many_small_weights_count():
    """One row has nearly all the weight; 600 rows of weight 1e-8 point the same way."""
    bank = torch.zeros(601, 4, device=DEVICE)
    bank[0, 0] = 1
    bank[1:, 1] = 1
    query = torch.tensor([[1.0, 0, 0, 0]], device=DEVICE)
    _, mean = engine.log_partition(query, bank, 1 / 18.4)
    small = 600 * torch.tensor(-18.4, dtype=torch.float64).exp()
    assert mean[0, 1].item() == pytest.approx((small / (1 + small)).item(), rel=1e-3)


def test_nan_shows_in_the_partition():
    bank = unit(100, 8)
    bank[50, 2] = torch.nan
    log_Z, mean = engine.log_partition(unit(2, 8, seed=1), bank, 0.07)
    assert log_Z.isnan().all()
    assert mean.isnan().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_close_rows(dtype):
    N, H, B, K = 120, 3, 4, 50
    labels = torch.randint(0, 6, (H, N), generator=draws(0), dtype=dtype).to(DEVICE)
    index = torch.tensor([3, 119, 0, 3], device=DEVICE)
    rows = torch.randint(0, N, (B, K), generator=draws(1)).to(DEVICE)
    rows[1, 4] = -1
    wanted = [
        [j >= 0 and naive.close(labels.tolist(), i, j) for j in mine]
        for i, mine in zip(index.tolist(), rows.tolist(), strict=True)
    ]
    with SETTINGS.changed(gpu_label_block=32):
        for stored in (labels, labels.T.contiguous().T):
            assert engine.close_rows(stored, labels[:, index], rows).tolist() == wanted


def test_local_aggregation_from_end_to_end():
    B, N, D, K = 4, 130, 10, 15
    embedding, bank = unit(B, D, seed=1).requires_grad_(), unit(N, D, seed=2)
    labels = torch.randint(0, 12, (2, N), generator=draws(3)).to(DEVICE)
    index = torch.arange(B, device=DEVICE)
    background = Neighbors(*engine.top_rows(embedding.detach(), bank, K), None)
    close = engine.close_rows(labels, labels[:, index], background.rows)
    loss, _ = aggregation_loss(embedding, bank, background, close)
    (grad,) = torch.autograd.grad(loss.mean(), embedding)
    arguments = (embedding.tolist(), bank.tolist(), labels.tolist(), index.tolist())
    wanted_loss, wanted_grad = naive.local_aggregation(*arguments, K, 0.07)
    assert loss.mean().item() == pytest.approx(wanted_loss, rel=1e-5)
    gap = grad.cpu().double() - torch.from_numpy(wanted_grad)
    assert gap.norm() <= 1e-4 * torch.from_numpy(wanted_grad).norm()


def test_the_cases_run_where_they_are_meant_to():
    assert triton.knobs.runtime.interpret == INTERPRETED
