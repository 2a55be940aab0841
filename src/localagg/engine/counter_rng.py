"""Counter-based random numbers: every draw is a pure function of its keys.

``uniform(seed, VIEW, epoch, index, count=9)`` gives the same numbers on every device, with any
number of workers and ranks, and after any resume, because no state is stepped: the keys are
hashed. The hash is the finalizer of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014), applied once a
key and once a draw; it passes BigCrush as a counter-based generator.
"""

import torch
from torch import Tensor

# Purpose of a stream of draws: two uses of the same (seed, epoch, index) never share draws.
ORDER, VIEW, NOISE, BANK, SPLIT, SAMPLE, CACHED_VIEW, MAP = range(8)


def _signed(value: int) -> int:
    """Return the low 64 bits of ``value`` as a signed integer."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLY_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = _signed(0x94D049BB133111EB)


def _mix(state: Tensor) -> Tensor:
    """Apply SplitMix64's finalizer to int64; masks make the shifts logical."""
    state = (state ^ (state >> 30 & (1 << 34) - 1)) * _MULTIPLY_1
    state = (state ^ (state >> 27 & (1 << 37) - 1)) * _MULTIPLY_2
    return state ^ (state >> 31 & (1 << 33) - 1)


def bits(*keys: int | Tensor, count: int) -> Tensor:
    """Return 64 random bits for each combination of keys and each of ``count`` draws.

    Args:
        keys: integers or int64 tensors that broadcast to a shape S, for example seed, stream,
            epoch and index [B]. Their order matters.
        count: draws for each element of S.

    Returns:
        int64 [*S, count], uniform over all 64-bit patterns.
    """
    device = next((key.device for key in keys if isinstance(key, Tensor)), torch.device("cpu"))
    state = torch.zeros((), dtype=torch.int64, device=device)
    for key in keys:
        if not isinstance(key, Tensor):
            key = torch.tensor(_signed(key), dtype=torch.int64, device=device)
        state = _mix((state ^ key.to(torch.int64)) + _GOLDEN)
    counter = torch.arange(1, count + 1, dtype=torch.int64, device=device)
    return _mix(state.unsqueeze(-1) + counter * _GOLDEN)


def uniform(*keys: int | Tensor, count: int) -> Tensor:
    """Return uniform draws in [0, 1), float64 [*S, count] of 53 random bits; see :func:`bits`."""
    return (bits(*keys, count=count) >> 11 & (1 << 53) - 1).to(torch.float64) * 2.0**-53


def integers(high: int, *keys: int | Tensor, count: int) -> Tensor:
    """Return uniform integers in [0, high), int64 [*S, count]; their bias is below high / 2**53."""
    return (uniform(*keys, count=count) * high).to(torch.int64).clamp_(max=high - 1)


def permutation(size: int, *keys: int) -> Tensor:
    """Return a permutation of 0..size-1, int64 [size]: a function of the keys alone."""
    element = torch.arange(size, dtype=torch.int64)
    return bits(*keys, element, count=1).squeeze(-1).argsort(stable=True)
