import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from localagg.engine.counter_rng import bits, integers, permutation, uniform


def splitmix64(state):
    """Steele, Lea & Flood 2014, on Python's unbounded integers."""
    mask = (1 << 64) - 1
    state &= mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4), st.integers(1, 4))
def test_bits_are_the_published_hash(keys, count):
    state = 0
    for key in keys:
        state = splitmix64((state ^ key) + 0x9E3779B97F4A7C15)
    expected = [splitmix64(state + (n + 1) * 0x9E3779B97F4A7C15) for n in range(count)]
    assert [value % 2**64 for value in bits(*keys, count=count).tolist()] == expected


def test_a_draw_does_not_depend_on_its_company():
    index = torch.arange(100)
    together = uniform(7, 1, 3, index, count=5)
    for chosen in ([4], [99, 4, 0]):
        assert torch.equal(uniform(7, 1, 3, torch.tensor(chosen), count=5), together[chosen])
    assert not torch.equal(uniform(7, 1, 4, index, count=5), together)
    assert not torch.equal(uniform(7, 2, 3, index, count=5), together)


def test_uniform_is_uniform_and_uncorrelated():
    from scipy.stats import kstest

    draws = uniform(0, 1, torch.arange(20_000), count=4).numpy()
    for column in draws.T:
        assert kstest(column, "uniform").pvalue > 1e-4
    correlation = np.corrcoef(draws.T) - np.eye(4)
    assert abs(correlation).max() < 0.03
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.03


@pytest.mark.parametrize("high", [1, 2, 10, 4097])
def test_integers_reach_both_ends_evenly(high):
    counts = integers(high, 0, 1, count=200 * high).bincount(minlength=high)
    assert len(counts) == high
    assert counts.min() > 100
    assert counts.max() < 320


def test_permutation_holds_each_once_and_changes_with_the_epoch():
    first, second = permutation(1000, 0, 0, 1), permutation(1000, 0, 0, 2)
    assert sorted(first.tolist()) == list(range(1000))
    assert (first == second).float().mean() < 0.02
