"""Small banks that are hard to search, tiny tiles to search them in, and a float64 check."""

import contextlib
import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from localagg.engine import SETTINGS

BACKENDS = ["compiled, bfloat16 products", "compiled, float32 products", "torch"]
KINDS = [
    *("even", "repeated", "equal", "rising", "sample misleads", "zero", "near ties"),
    *("negative", "long", "all of them", "few rows"),
]
CASES = 64  # of each kind


@contextlib.contextmanager
def use_backend(name: str, tile: int = 5, **changes: object) -> Iterator[None]:
    """Search by one backend, in tiles so small that every bank has many."""
    with (
        SETTINGS.changed(
            min_compiled_rows=sys.maxsize if name == "torch" else 0,
            bfloat16_products="bfloat16" in name,
            tile_products=3 * tile,
            chunk_rows=4,
            batch_queries=3,
            max_sample_rows=16,
            min_sample_rows=6,
            torch_tile_bytes=16 * tile,
        ),
        SETTINGS.changed(**changes),
    ):
        yield


def unit(seed: int, *shape: int) -> torch.Tensor:
    """Unit rows."""
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


def problem(kind: str, seed: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(bank [N, D], queries [B, D], K) in float32."""
    g = torch.Generator().manual_seed(seed)
    B, N, D = (
        int(torch.randint(*bounds, (1,), generator=g)) for bounds in [(1, 5), (8, 50), (1, 9)]
    )
    if kind == "few rows":
        N = 1 + seed % 7
    K = int(torch.randint(1, max(2, N // 2), (1,), generator=g))
    bank = F.normalize(torch.randn(N, D, generator=g), dim=1)
    queries = F.normalize(torch.randn(B, D, generator=g), dim=1)
    if kind == "repeated":
        bank = bank[torch.randint(0, 1 + N // 4, (N,), generator=g)]
        queries[0] = bank[0]
    if kind == "equal":
        bank = bank[:1].repeat(N, 1)
    if kind == "rising":  # each tile beats the last one
        bank = bank[(bank @ queries[0]).argsort()]
    if kind == "sample misleads":  # only sampled rows are near
        bank[:: max(1, N // 6)] = queries[0]
        K = min(N - 1, N // 3 + 1) or 1
    if kind == "zero":
        bank[torch.rand(N, generator=g) < 0.5] = 0
        queries[0] *= seed % 2
    if kind == "near ties":  # some steps of bfloat16 apart
        bank = F.normalize(bank[:1] + 0.004 * bank, dim=1)
    if kind == "negative":
        bank, queries = bank.abs(), -queries.abs()
    if kind == "long":
        bank = bank * torch.logspace(-2, 1, N).unsqueeze(1)
        queries = 3 * queries
    if kind == "all of them":
        K = N + seed % 3
    return bank, queries, K


def check_nearest(found, queries, bank, K, strict=True) -> None:
    """Compare the set of rows with float64, up to rounding; of equal rows the lowest are in it."""
    rows, sim = found
    N = len(bank)
    exact = queries.double() @ bank.double().T
    scale = (queries.norm(dim=1) * bank.norm(dim=1).max()).double() + 1e-30
    assert rows.shape == sim.shape == (len(queries), min(K, N))
    inside = torch.zeros_like(exact, dtype=torch.bool).scatter_(1, rows, True)
    assert (inside.sum(dim=1) == min(K, N)).all()  # no row twice
    error = (sim.double() - exact.gather(1, rows)).abs()
    assert (error <= 2e-7 * len(bank.T) ** 0.5 * scale[:, None]).all()
    if K < N:
        worst = exact.masked_fill(~inside, torch.inf).amin(dim=1)
        missed = exact.masked_fill(inside, -torch.inf).amax(dim=1)
        assert ((missed - worst) / scale < 1e-6).all()
    if strict:
        _, same = torch.unique(bank, dim=0, return_inverse=True)
        same, order = same.sort(stable=True)
        later = inside[:, order].int().diff(dim=1) > 0  # in, though the one before it is not
        assert not (later & (same.diff() == 0)).any()
