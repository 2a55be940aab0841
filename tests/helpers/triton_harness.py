"""The device and the banks of the Triton cases.

``test_cuda_backend.py`` runs the cases in a process of its own, on a GPU or under Triton's
interpreter, because the interpreter has to be chosen before Triton is imported.
"""

import os

import torch
from torch.nn.functional import normalize

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

if INTERPRETED:
    # Each call of a function within a kernel patches Triton's language again, which takes most of
    # the interpreter's time. Once for each module is enough.
    from triton.runtime import interpreter

    _patched: set[int] = set()

    def _call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in _patched:
            _patched.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = _call


def draws(seed):
    return torch.Generator().manual_seed(seed)


def unit(*shape, seed=0):
    return normalize(torch.randn(*shape, generator=draws(seed)), dim=1).to(DEVICE)


def similarity(embedding, bank):
    return embedding.double() @ bank.double().T


def gaussian(N, D, seed):
    return unit(N, D, seed=seed)


def repeated(N, D, seed):
    return unit(N // 3 + 1, D, seed=seed).repeat_interleave(3, dim=0)[:N]


def alike(N, D, seed):
    """Rows that differ far below the resolution of 16 bits."""
    return normalize(unit(1, D, seed=seed) + 2e-5 * unit(N, D, seed=seed + 1), dim=1)


def rising(N, D, seed):
    """The most similar to the first query last."""
    bank = unit(N, D, seed=seed)
    return bank[(bank @ unit(1, D, seed=99)[0]).argsort()]


def falling(N, D, seed):
    return rising(N, D, seed).flip(0)


def uneven(N, D, seed):
    """Lengths from 0 to 100, one row far longer than the sample may show."""
    length = 10 * torch.rand(N, 1, generator=draws(seed)).to(DEVICE)
    length[N // 2] = 100
    length[:: max(1, N // 4)] = 0
    return unit(N, D, seed=seed) * length


BANKS = [gaussian, repeated, alike, rising, falling, uneven]
