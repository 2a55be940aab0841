"""Every objective against loops in float64, on inputs that are hard on purpose."""

import naive
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from localagg.engine import SETTINGS
from localagg.objectives import (
    background_neighbors,
    close_neighbors,
    instance_nce,
    instance_softmax,
    local_aggregation,
    momentum_update,
    probability,
)


@st.composite
def problems(draw):
    """A batch, a bank with repeated rows, clusters (some of them alone), indices with repeats."""
    B, N, D = draw(st.integers(1, 5)), draw(st.integers(1, 24)), draw(st.integers(2, 6))
    rng = np.random.RandomState(draw(st.integers(0, 2**31)))
    distinct = draw(st.integers(1, N))
    bank = F.normalize(torch.from_numpy(rng.randn(distinct, D)), dim=1)
    bank = bank[torch.from_numpy(rng.randint(0, distinct, N))]
    index = torch.from_numpy(rng.randint(0, N, B))
    embedding = F.normalize(torch.from_numpy(rng.randn(B, D)), dim=1)
    if draw(st.booleans()):  # exactly on a row of the bank, as in the first epoch
        embedding = bank[torch.from_numpy(rng.randint(0, N, B))].clone()
    labels = torch.from_numpy(rng.randint(0, draw(st.integers(1, N)), (draw(st.integers(1, 3)), N)))
    return {
        "embedding": embedding,
        "bank": bank,
        "labels": labels,
        "index": index,
        "K": draw(st.integers(1, N + 3)),
        "t": draw(st.sampled_from([0.07, 0.2, 1.0])),
        "tile": draw(st.sampled_from([1, 256, 1 << 20])),
        "noise": torch.from_numpy(rng.randint(0, N, (B, draw(st.integers(1, 6))))),
    }


def value_and_gradient(function, embedding):
    leaf = embedding.detach().requires_grad_()
    loss = function(leaf)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def agree(found, expected, rtol=1e-9):
    torch.testing.assert_close(
        found[0], torch.tensor(expected[0], dtype=torch.float64), rtol=rtol, atol=1e-12
    )
    torch.testing.assert_close(found[1], torch.from_numpy(expected[1]), rtol=rtol, atol=1e-11)


@given(problems())
def test_probability_is_the_softmax_over_the_bank(p):
    found = probability(p["embedding"], p["bank"], temperature=p["t"])
    np.testing.assert_allclose(found, naive.probability(p["embedding"], p["bank"], p["t"]), 1e-9)


@given(problems())
def test_instance_softmax(p):
    with SETTINGS.changed(softmax_tile_bytes=p["tile"]):
        found = value_and_gradient(
            lambda v: instance_softmax(v, p["bank"], p["index"], temperature=p["t"]),
            p["embedding"],
        )
    agree(found, naive.instance_softmax(p["embedding"], p["bank"], p["index"].tolist(), p["t"]))


@given(problems())
def test_instance_nce(p):
    arguments = p["bank"], p["index"], p["noise"]
    loss, data, noise = instance_nce(p["embedding"], *arguments, temperature=p["t"])
    expected_data, expected_noise, gradient = naive.instance_nce(
        p["embedding"], p["bank"], p["index"].tolist(), p["noise"].tolist(), p["t"]
    )
    assert data.item() == pytest.approx(expected_data, rel=1e-9)
    assert noise.item() == pytest.approx(expected_noise, rel=1e-9)
    found = value_and_gradient(
        lambda v: instance_nce(v, *arguments, temperature=p["t"])[0], p["embedding"]
    )
    agree(found, (expected_data + expected_noise, gradient))
    assert loss.item() == pytest.approx(data.item() + noise.item(), rel=1e-12)


@given(problems())
def test_local_aggregation(p):
    with SETTINGS.changed(torch_tile_bytes=p["tile"]):
        found = value_and_gradient(
            lambda v: local_aggregation(
                v, p["bank"], p["labels"], p["index"], neighbors=p["K"], temperature=p["t"]
            ),
            p["embedding"],
        )
        rows, *_ = background_neighbors(p["embedding"], p["bank"], p["K"])
    # Equal rows may differ in the last bit of their product, so ties are judged on our products.
    sim = p["embedding"] @ p["bank"].T
    K = min(p["K"], len(p["bank"]))
    for i, chosen in enumerate(rows.tolist()):
        assert len(set(chosen)) == K
        left = set(range(len(p["bank"]))) - set(chosen)
        if left:
            assert min(sim[i, chosen]) >= max(sim[i, j] for j in left) - 1e-12
    boundary = [sorted(row, reverse=True) for row in sim.tolist()]
    if len(p["bank"]) > K and any(abs(s[K - 1] - s[K]) < 1e-12 for s in boundary):
        return  # which of the equal rows is in is tested below, on exact products
    arguments = p["embedding"], p["bank"], p["labels"].tolist(), p["index"].tolist()
    agree(found, naive.local_aggregation(*arguments, p["K"], p["t"]), rtol=1e-8)


@given(st.integers(0, 2**31), st.integers(1, 30), st.sampled_from([1, 64, 1 << 20]))
def test_ties_go_to_the_lowest_rows(seed, K, tile):
    rng = np.random.RandomState(seed)
    bank = torch.from_numpy(rng.randint(-1, 2, (30, 3))).double()  # products are exact integers
    embedding = torch.from_numpy(rng.randint(-1, 2, (4, 3))).double()
    with SETTINGS.changed(torch_tile_bytes=tile):
        rows, similarity, _ = background_neighbors(embedding, bank, K)
    for i, sim in enumerate(naive.similarities(embedding, bank)):
        assert sorted(rows[i].tolist()) == sorted(naive.background(sim, K))
        assert similarity[i].tolist() == [sim[j] for j in rows[i].tolist()]


def test_a_sample_without_close_neighbors_costs_log_eps_and_pulls_nowhere():
    bank = torch.eye(4)
    embedding = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    labels, index = torch.tensor([[0, 1, 1, 1]]), torch.tensor([0])
    loss, gradient = value_and_gradient(
        lambda v: local_aggregation(v, bank, labels, index, neighbors=1, eps=1e-7), embedding
    )
    assert loss.item() == pytest.approx(-np.log(1e-7), rel=1e-6)
    assert not gradient.any()


def test_close_neighbors_join_all_clusterings():
    labels = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]], dtype=torch.int32)
    rows = torch.arange(4).expand(2, 4)
    found = close_neighbors(labels, torch.tensor([0, 3]), rows)
    assert found.tolist() == [[True, True, True, False], [False, True, True, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_near_float64(dtype):
    generator = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(500, 32, generator=generator, dtype=torch.float64), dim=1)
    embedding = F.normalize(torch.randn(16, 32, generator=generator, dtype=torch.float64), dim=1)
    labels = torch.randint(0, 20, (3, 500), generator=generator)
    index = torch.arange(16)
    bank, embedding = bank.to(dtype), embedding.to(dtype)
    exact = bank.double(), labels, index
    reference = value_and_gradient(
        lambda v: local_aggregation(v, *exact, neighbors=64), embedding.double()
    )
    found = value_and_gradient(
        lambda v: local_aggregation(v, bank, labels, index, neighbors=64), embedding
    )
    assert found[0].dtype == torch.float32
    assert found[0].item() == pytest.approx(reference[0].item(), rel=1e-5)
    scale = reference[1].abs().max()
    # A gradient that returns in bf16 is rounded to its 8 bits; the sums before are float32.
    tolerance = 1e-4 if dtype == torch.float32 else 2.0**-8
    assert (found[1].double() - reference[1]).abs().max() / scale < tolerance


@given(problems(), st.sampled_from([0.0, 0.5, 0.9]))
def test_momentum_update_gives_unit_rows_between_old_and_new(p, momentum):
    old = p["bank"][p["index"]]
    found = momentum_update(old, p["embedding"], momentum=momentum)
    for row, m, v in zip(found, old, p["embedding"], strict=True):
        mixed = [momentum * float(a) + (1 - momentum) * float(b) for a, b in zip(m, v, strict=True)]
        length = sum(x * x for x in mixed) ** 0.5
        if length > 1e-9:
            np.testing.assert_allclose(row, np.array(mixed) / length, rtol=1e-9, atol=1e-12)
