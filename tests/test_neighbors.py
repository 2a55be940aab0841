"""The engine's memory is bounded whatever the size of the bank."""

import subprocess
import sys
import textwrap

import torch

from localagg import objectives
from localagg.neighbors import find_neighbors, neighborhood_loss
from localagg.objectives import local_aggregation

_STEP = """
import resource, sys, torch
from pathlib import Path
def peak_kib():
    # Linux's own figure is this process's; getrusage inherits that of the process that forked it.
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
torch.set_num_threads(1)
from localagg import objectives
from localagg.neighbors import find_neighbors, neighborhood_loss
size, objectives.TOP_TILE_BYTES = int(sys.argv[1]), int(sys.argv[2])
generator = torch.Generator().manual_seed(0)
def step(bank, labels):
    embedding = torch.nn.functional.normalize(torch.randn(64, 32, generator=generator), dim=1)
    embedding.requires_grad_()
    found = find_neighbors(embedding, bank, labels, torch.arange(64), neighbors=256)
    neighborhood_loss(embedding, bank, found).backward()
bank = torch.randn(size, 32, generator=generator)
labels = torch.randint(0, 100, (3, size), dtype=torch.int32)
step(bank[:1000], labels[:, :1000])  # libraries load their buffers
before = peak_kib()
step(bank, labels)
print((peak_kib() - before) / 1024)
"""


def peak_mib(size: int, tile_mib: int) -> float:
    """Extra memory of one LA step in a fresh process."""
    command = [sys.executable, "-c", textwrap.dedent(_STEP), str(size), str(tile_mib << 20)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_memory_follows_the_tile_and_not_the_bank():
    # The whole product would take 64 x 400,000 x 4 bytes = 98 MiB.
    assert peak_mib(400_000, tile_mib=1) < 30
    assert peak_mib(400_000, tile_mib=512) > 80  # so the measurement does see a large product


def test_the_engine_and_the_objective_agree():
    generator = torch.Generator().manual_seed(1)
    bank = torch.nn.functional.normalize(torch.randn(300, 16, generator=generator), dim=1)
    embedding = torch.nn.functional.normalize(torch.randn(8, 16, generator=generator), dim=1)
    labels = torch.randint(0, 30, (2, 300), generator=generator)
    index = torch.arange(8)
    found = find_neighbors(embedding, bank, labels, index, neighbors=40)
    assert found.rows.shape == found.similarity.shape == found.close.shape == (8, 40)
    whole = local_aggregation(embedding, bank, labels, index, neighbors=40)
    assert torch.equal(neighborhood_loss(embedding, bank, found), whole)
    alone = find_neighbors(embedding, bank, torch.arange(300)[None], index, neighbors=1)
    itself = (alone.rows == index[:, None]).any(dim=1)
    assert alone.without_close == (~itself).float().mean()
    assert objectives.TOP_TILE_BYTES == 32 << 20
