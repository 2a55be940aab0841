"""The K largest over ranks, against sorting everything in one place."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import in_threads

from localagg.distributed.collectives import share
from localagg.engine import SETTINGS
from localagg.engine.topk import (
    bounds,
    count_digits,
    disordered,
    largest,
    offsets,
    ordered,
)

SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, 3.4e38, -3.4e38, float("inf"), -float("inf")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_have_the_order_of_the_floats(dtype):
    values = torch.tensor([*SPECIAL, 1 + 1e-7, 0.5, 0.25, -0.25], dtype=dtype)
    key = ordered(values)
    for i in range(len(values)):
        assert torch.equal(key[i] < key, values[i] < values)
        assert torch.equal(key[i] == key, values[i] == values)
    assert torch.equal(disordered(key), values)


@st.composite
def lines(draw):
    """Values of N rows for B queries: plain, all alike, from a handful, or at the limits."""
    B, N, ranks = draw(st.integers(1, 4)), draw(st.integers(1, 24)), draw(st.integers(1, 5))
    rng = np.random.RandomState(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["plain", "alike", "few", "special", "near"]))
    values = {
        "plain": lambda: rng.randn(B, N),
        "alike": lambda: np.full((B, N), rng.randn()),
        "few": lambda: rng.randint(-1, 2, (B, N)) / 3,
        "special": lambda: rng.choice(SPECIAL[:-2], (B, N)),
        "near": lambda: np.nextafter(np.float32(0.5), rng.choice([0, 0.5, 1], (B, N))),
    }[kind]()
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return torch.from_numpy(values).to(dtype), ranks, draw(st.integers(1, N))


@settings(max_examples=200)
@given(lines(), st.booleans())
def test_the_largest_are_those_of_a_stable_sort(case, close):
    values, ranks, count = case
    B, N = values.shape
    best = values.sort(dim=1, descending=True, stable=True)
    expected = torch.zeros(B, N, dtype=torch.bool).scatter_(1, best.indices[:, :count], True)

    def call(world):
        part = share(N, world.rank, ranks)
        own = values[:, part.start : part.stop]
        # Candidates: this rank's `count` largest, the lowest among equals, in any order.
        place = own.sort(dim=1, descending=True, stable=True).indices[:, :count].flip(1)
        value, row = own.gather(1, place), place + part.start
        between = bounds(world, value, count)
        if close:  # from elsewhere it may be known that enough reach more
            between = best.values[:, count - 1], between[1]
        chosen = largest(world, value, row, count, between)
        found = torch.zeros(B, N, dtype=torch.bool)
        return found.scatter_(1, row, chosen), between[1]

    results = in_threads(ranks, call)
    assert torch.equal(torch.stack([found for found, _ in results]).sum(dim=0), expected.long())
    assert all(torch.equal(high, best.values[:, 0]) for _, high in results)


@pytest.mark.parametrize("shift", [0, 2, 26])
@pytest.mark.parametrize("least", [-1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_and_plain_counts_of_digits_are_those_of_a_loop(dtype, shift, least):
    generator = torch.Generator().manual_seed(shift)
    value = torch.rand(3, 4096, generator=generator, dtype=dtype) * 2 - 1
    value[0, :2000] = torch.from_numpy(np.linspace(0.5, 0.5001, 2000, dtype=np.float32))
    value[2, ::3] = -torch.inf
    low, every = ordered(torch.tensor([least, 0.0, least], dtype=dtype)), 2 ** (8 * dtype.itemsize)
    known = -1 << shift + 6 if shift < 26 else 0
    prefix = (torch.maximum(ordered(value[:, 1]), low) - low) & known
    wanted = torch.zeros(3, 64, dtype=torch.int32)
    for line in range(3):
        for number, key in zip(value[line].tolist(), ordered(value[line]).tolist(), strict=True):
            offset = max(key - low[line].item(), 0) % every
            if number > -np.inf and (offset ^ prefix[line].item()) & known & every - 1 == 0:
                wanted[line, offset >> shift & 63] += 1
    assert (wanted.sum(dim=1) >= 1).all()
    for min_compiled_rows in (0, sys.maxsize):
        with SETTINGS.changed(min_compiled_rows=min_compiled_rows):
            found = count_digits(offsets(value, low), known, prefix, shift)
        assert torch.equal(found, wanted)
