"""What the loop asks of the engine; that its memory is bounded whatever the size of the bank."""

import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F

from localagg.bank import MemoryBank
from localagg.engine import cpu_backend, search
from localagg.objectives import local_aggregation
from localagg.training.neighbors import (
    estimate_search_bytes,
    find_neighbors,
    missing_backend_note,
    neighborhood_loss,
    store_by_row,
)

_STEP = """
import sys, torch
from pathlib import Path
def peak_kib():
    # Linux's own figure is this process's; getrusage inherits that of the process that forked it.
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
torch.set_num_threads(1)
from localagg.engine import SETTINGS
from localagg.training.neighbors import SearchableBank, find_neighbors, neighborhood_loss
size, SETTINGS.torch_tile_bytes = int(sys.argv[1]), int(sys.argv[2])
if sys.argv[3] == "torch":
    SETTINGS.min_compiled_rows = sys.maxsize
generator = torch.Generator().manual_seed(0)
def step(bank, labels):
    embedding = torch.nn.functional.normalize(torch.randn(64, 32, generator=generator), dim=1)
    embedding.requires_grad_()
    found = find_neighbors(embedding, bank, labels, torch.arange(64), neighbors=256)
    neighborhood_loss(embedding, bank, found).backward()
bank = torch.randn(size, 32, generator=generator)
labels = torch.randint(0, 100, (3, size), dtype=torch.int32)
step(bank[:5000], labels[:, :5000])  # libraries load their buffers, loops are compiled
before = peak_kib()
step(bank, labels)
print((peak_kib() - before) / 1024)
"""


def peak_mib(size: int, tile_mib: int, engine: str) -> float:
    """Extra memory of one LA step in a fresh process."""
    arguments = [str(size), str(tile_mib << 20), engine]
    command = [sys.executable, "-c", textwrap.dedent(_STEP), *arguments]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_follows_the_tile_and_not_the_bank():
    # The whole product would take 64 x 400,000 x 4 bytes = 98 MiB.
    assert peak_mib(400_000, 1, "numba") < 30
    assert peak_mib(400_000, 1, "torch") < 30
    assert peak_mib(400_000, 512, "torch") > 80  # so the measurement does see a large product


@pytest.mark.parametrize("size", [300, 5000])  # by torch alone, and by the compiled loops
def test_the_engine_and_the_objective_agree(size):
    generator = torch.Generator().manual_seed(1)
    bank = MemoryBank(size, 16, seed=1)
    embedding = F.normalize(torch.randn(8, 16, generator=generator), dim=1)
    labels = store_by_row(torch.randint(0, 30, (2, size), generator=generator))
    index = torch.arange(8)
    found = find_neighbors(embedding, bank.prepared, labels, index, neighbors=40)
    assert found.rows.shape == found.similarity.shape == found.close.shape == (8, 40)
    whole = local_aggregation(embedding, bank.rows, labels, index, neighbors=40)
    torch.testing.assert_close(neighborhood_loss(embedding, bank.prepared, found), whole)
    alone = find_neighbors(embedding, bank.rows, torch.arange(size)[None], index, neighbors=1)
    itself = (alone.rows == index[:, None]).any(dim=1)
    assert alone.without_close == (~itself).float().mean()


@pytest.mark.parametrize("size", [300, 5000])
def test_part_of_the_loss_can_stay_irs(size):
    """Against the equation in float64 over the whole bank: K = N, so all of it is background."""
    generator = torch.Generator().manual_seed(2)
    bank = F.normalize(torch.randn(size, 16, generator=generator), dim=1)
    labels = torch.randint(0, 30, (2, size), generator=generator, dtype=torch.int32)
    index = torch.arange(3, 11)
    moved = bank[index] + 0.2 * torch.randn(8, 16, generator=generator)
    embedding = F.normalize(moved, dim=1).requires_grad_()
    found = find_neighbors(embedding, bank, store_by_row(labels), index, neighbors=size)
    mixed = neighborhood_loss(embedding, bank, found, temperature=0.1, instance_share=0.3)
    (gradient,) = torch.autograd.grad(mixed, embedding)

    exact = embedding.detach().double().requires_grad_()
    P = torch.softmax(exact @ bank.double().T / 0.1, dim=1)
    close = (labels[:, None, :] == labels[:, index][:, :, None]).any(dim=0)
    terms = 0.7 * (P * close).sum(dim=1).log() + 0.3 * P[torch.arange(8), index].log()
    (wanted,) = torch.autograd.grad(-terms.mean(), exact)
    assert mixed.item() == pytest.approx(-terms.mean().item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-5)


def test_where_the_loops_do_not_compile_torch_answers_and_a_sentence_says_so(monkeypatch):
    def broken():
        raise OSError("no folder for compiled code")

    monkeypatch.setattr(cpu_backend, "compile_all", broken)
    search.load_cpu_backend.cache_clear()
    try:
        bank = MemoryBank(5000, 8, seed=0)
        note = missing_backend_note(bank.rows)
        assert note is not None
        assert "numba does not run here (no folder for compiled code)" in note
        assert missing_backend_note(bank.rows[:100]) is None  # there nobody would notice
        found = find_neighbors(
            bank.rows[:3], bank.prepared, torch.arange(5000)[None], torch.arange(3), neighbors=4
        )
        assert found.close.sum().item() == 3
    finally:
        search.load_cpu_backend.cache_clear()
    monkeypatch.undo()
    assert missing_backend_note(bank.rows) is None


def test_the_forecast_of_memory_knows_of_the_copy():
    for dtype in (torch.float32, torch.bfloat16):
        bank = MemoryBank(10, 8, dtype=dtype).prepared
        copied = estimate_search_bytes(bank, 2000, 4, 10) - estimate_search_bytes(bank, 1000, 4, 10)
        assert (
            copied == 0 if bank.product_dtype == dtype else 1000 * 8 * bank.product_dtype.itemsize
        )
