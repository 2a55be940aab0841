"""Memory of a loss is bounded whatever the size of the bank; the engine's fallback."""

import subprocess
import sys
import textwrap
import time

import pytest
import torch
import torch.nn.functional as F

from localagg.bank import MemoryBank
from localagg.engine import cpu_backend, search
from localagg.engine.search import estimate_search_bytes, missing_backend_note, store_by_row
from localagg.objectives import background_neighbors, close_neighbors, mixed_loss

_STEP = """
import sys, torch
from pathlib import Path
def peak_kib():
    # Linux's own figure is this process's; getrusage inherits that of the process that forked it.
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
torch.set_num_threads(1)
from localagg.engine import SETTINGS
from localagg.objectives import local_aggregation
size, SETTINGS.torch_tile_bytes = int(sys.argv[1]), int(sys.argv[2])
if sys.argv[3] == "torch":
    SETTINGS.min_compiled_rows = sys.maxsize
generator = torch.Generator().manual_seed(0)
def step(bank, labels):
    embedding = torch.nn.functional.normalize(torch.randn(64, 32, generator=generator), dim=1)
    embedding.requires_grad_()
    local_aggregation(embedding, bank, labels, torch.arange(64), neighbors=256).backward()
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
def test_part_of_the_loss_can_stay_irs(size):
    """Against the equation in float64 over the whole bank: K = N, so all of it is background."""
    generator = torch.Generator().manual_seed(2)
    bank = F.normalize(torch.randn(size, 16, generator=generator), dim=1)
    labels = torch.randint(0, 30, (2, size), generator=generator, dtype=torch.int32)
    index = torch.arange(3, 11)
    moved = bank[index] + 0.2 * torch.randn(8, 16, generator=generator)
    embedding = F.normalize(moved, dim=1).requires_grad_()
    background = background_neighbors(embedding, bank, size)
    close = close_neighbors(store_by_row(labels), index, background.rows)
    options = {"temperature": 0.1, "instance_share": 0.3}
    losses, ratio = mixed_loss(embedding, bank, background, close, index, **options)
    (gradient,) = torch.autograd.grad(losses.mean(), embedding)

    exact = embedding.detach().double().requires_grad_()
    P = torch.softmax(exact @ bank.double().T / 0.1, dim=1)
    close = (labels[:, None, :] == labels[:, index][:, :, None]).any(dim=0)
    terms = 0.7 * (P * close).sum(dim=1).log() + 0.3 * P[torch.arange(8), index].log()
    (wanted,) = torch.autograd.grad(-terms.mean(), exact)
    assert losses.mean().item() == pytest.approx(-terms.mean().item(), rel=1e-5)
    torch.testing.assert_close(ratio, (P * close).sum(dim=1).detach(), rtol=1e-5, atol=1e-7)
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
        rows = background_neighbors(bank.rows[:3], bank.searchable, 4).rows
        assert (rows == torch.arange(3)[:, None]).any(dim=1).all()
    finally:
        search.load_cpu_backend.cache_clear()
    monkeypatch.undo()
    assert missing_backend_note(bank.rows) is None


def test_a_slow_compilation_is_announced_once(monkeypatch, capsys):
    monkeypatch.setattr(search, "_SLOW_SECONDS", 0.01)
    monkeypatch.setattr(cpu_backend, "compile_all", lambda: time.sleep(0.2))
    search.load_cpu_backend.cache_clear()
    try:
        search.load_cpu_backend()
        search.load_cpu_backend()
    finally:
        search.load_cpu_backend.cache_clear()
    assert capsys.readouterr().err.count("once") == 1


def test_the_forecast_of_memory_knows_of_the_copy():
    for dtype in (torch.float32, torch.bfloat16):
        bank = MemoryBank(10, 8, dtype=dtype).searchable
        copied = estimate_search_bytes(bank, 2000, 4, 10) - estimate_search_bytes(bank, 1000, 4, 10)
        assert (
            copied == 0 if bank.product_dtype == dtype else 1000 * 8 * bank.product_dtype.itemsize
        )
