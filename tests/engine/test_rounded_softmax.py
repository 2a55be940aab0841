"""IR's softmax by products in bfloat16, against float64; torch emulates them where a CPU cannot."""

import math

import pytest
import torch
import torch.nn.functional as F
from search_cases import unit

from localagg.engine import SETTINGS, search
from localagg.engine.searchable_bank import SearchableBank
from localagg.objectives import instance_softmax

N, B, D = 5000, 7, 32


@pytest.fixture(autouse=True)
def bfloat16_products():
    if search.load_cpu_backend()[0] is None:
        pytest.skip("numba does not compile here")
    with SETTINGS.changed(bfloat16_products=True, tile_products=300 * B):
        yield


def problem(kind):
    bank, index = unit(1, N, D), torch.arange(0, N, N // B)[:B]
    if kind == "trained":  # the own row has most of the probability
        return F.normalize(bank[index] + 0.1 * unit(2, B, D)), bank, index
    if kind == "many large terms":
        bank[1000:1700] = bank[0]
        return bank[:1].repeat(B, 1), bank, index
    return unit(2, B, D), bank, index  # "random"


def reference(v, bank, index, t):
    v = v.double().requires_grad_()
    loss = F.cross_entropy(v @ bank.double().T / t, index)
    return loss.detach(), torch.autograd.grad(loss, v)[0]


def measured(v, bank, index, t, precision):
    v = v.clone().requires_grad_()
    loss = instance_softmax(v, bank, index, temperature=t, precision=precision)
    return loss.detach().double(), torch.autograd.grad(loss, v)[0].double()


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("t", [0.07, 0.01, 1.0])
@pytest.mark.parametrize("kind", ["random", "trained", "many large terms"])
def test_rounded_products_stay_within_the_bound_and_near_the_exact_loss(kind, t, copy):
    v, bank, index = problem(kind)
    loss, gradient = reference(v, bank, index, t)
    found, found_gradient = measured(v, SearchableBank(bank, copy=copy), index, t, "bfloat16")
    e = (2**-8 + 2**-9 + 2**-16) / t
    norm = (gradient * B).norm(dim=1) * t  # of the mean row less the own one
    error = ((found_gradient - gradient) * B).norm(dim=1) * t
    assert abs(found - loss) <= e + 2**-9
    assert (error <= 2 * math.expm1(2 * e) + 2**-7).all()
    assert abs(found - loss) <= 5e-4 + 2e-4 / t
    assert (error <= 3e-4 + 1e-3 * norm).all()


def test_large_terms_are_computed_in_float32():
    v, bank, index = problem("trained")
    loss, _ = reference(v, bank, index, 0.02)
    found, _ = measured(v, SearchableBank(bank), index, 0.02, "bfloat16")
    rounded = (v / 0.02).bfloat16() @ bank.bfloat16().T
    own = (v * bank[index]).sum(dim=1).double() / 0.02
    plain = (rounded.double().logsumexp(dim=1) - own).mean()
    assert abs(plain - loss) > 0.01  # what the case would lose
    assert abs(found - loss) < 1e-3


def test_the_number_of_threads_and_tiles_does_not_matter():
    v, bank, index = problem("trained")
    found = []
    for products, threads in ((300 * B, 1), (300 * B, 3), (N * B, 2)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with SETTINGS.changed(tile_products=products):
                found.append(measured(v, bank, index, 0.07, "bfloat16")[0].item())
        finally:
            torch.set_num_threads(before)
    assert found == pytest.approx([found[0]] * 3, abs=1e-6)


def test_the_same_call_gives_the_same_bits():
    v, bank, index = problem("random")
    first, *others = (measured(v, bank, index, 0.07, "bfloat16") for _ in range(20))
    for other in others:
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])


def test_nan_is_not_hidden():
    v, bank, index = problem("random")
    v[3, 4] = float("nan")
    assert measured(v, bank, index, 0.07, "bfloat16")[0].isnan()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_banks_stay_exact(dtype):
    v, bank, index = problem("random")
    bank = bank.to(dtype)
    exact, found = (measured(v, bank, index, 0.07, each) for each in ("float32", "bfloat16"))
    assert torch.equal(exact[0], found[0])
    assert torch.equal(exact[1], found[1])
    assert not search.rounded_softmax_backend(SearchableBank(bank))


def test_the_default_is_exact():
    v, bank, index = problem("trained")
    found = instance_softmax(v, bank, index)
    assert torch.equal(found, instance_softmax(v, bank, index, precision="float32"))
    assert not torch.equal(found, instance_softmax(v, bank, index, precision="bfloat16"))
