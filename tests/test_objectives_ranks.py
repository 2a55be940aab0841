"""The losses over ranks against loops in float64 and against one process; what goes over the wire.

Threads stand in for ranks where there are many cases; gloo processes run the same in earnest.
"""

import sys

import naive
import numpy as np
import pytest
import sharded_cases as cases
import torch
import torch.nn.functional as F
from expect import user_error
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Pool, in_threads
from search_cases import BACKENDS, use_backend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from localagg import objectives
from localagg.bank import MemoryBank
from localagg.distributed.collectives import World, share
from localagg.engine import SETTINGS
from localagg.evaluation import knn, sharded_knn


@st.composite
def problems(draw, exact=None):
    """A batch, a bank with repeated rows, labels. "exact" ones are small integers, whose products
    no order of summation changes, so that ties are ties."""
    B, N, D = draw(st.integers(1, 6)), draw(st.integers(1, 24)), draw(st.integers(2, 5))
    rng = np.random.RandomState(draw(st.integers(0, 2**31)))
    exact = draw(st.booleans()) if exact is None else exact
    if exact:
        bank, embedding = rng.randint(-1, 2, (N, D)), rng.randint(-1, 2, (B, D))
        bank, embedding = torch.from_numpy(bank).double(), torch.from_numpy(embedding).double()
    else:
        bank = F.normalize(torch.from_numpy(rng.randn(N, D)), dim=1)
        embedding = F.normalize(torch.from_numpy(rng.randn(B, D)), dim=1)
    labels = rng.randint(0, draw(st.integers(1, N)), (draw(st.integers(1, 3)), N))
    return {
        "embedding": embedding,
        "bank": bank,
        "labels": torch.from_numpy(labels.astype(np.int32)),
        "index": torch.from_numpy(rng.randint(0, N, B)),  # with repeats
        "noise": torch.from_numpy(rng.randint(0, N, (B, draw(st.integers(1, 6))))),
        "K": draw(st.integers(1, N + 2)),
        "t": draw(st.sampled_from([0.07, 0.3, 1.0])) if not exact else 1.0,
        "instance_share": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "ranks": draw(st.integers(1, 5)),
        "sampled_from": draw(st.sampled_from([2, 4, 8, 4096])),
        "deviations": draw(st.sampled_from([0, 0.5, 4])),  # 0: guesses mislead half of the time
    }


WHOLE = {"sampled_from": 4096, "deviations": 4}  # as it comes


def over_ranks(p, loss):
    """(loss, gradient [B, D], notes) of ``cases.score`` with the problem's ranks as threads."""
    found = in_threads(p["ranks"], lambda world: cases.score(world, p, loss))
    for scored in found[1:]:
        assert torch.equal(scored.loss, found[0].loss)
        assert all(torch.equal(scored.notes[name], found[0].notes[name]) for name in scored.notes)
    return found[0].loss, torch.cat([scored.gradient for scored in found]), found[0].notes


def agree(found, loss, gradient):
    assert found[0].item() == pytest.approx(loss, rel=1e-10, abs=1e-10)
    np.testing.assert_allclose(found[1], gradient, rtol=1e-10, atol=1e-10)


@settings(max_examples=400)
@given(problems())
def test_local_aggregation(p):
    found = over_ranks(p, "local_aggregation")
    wanted = [
        naive.local_aggregation(
            p["embedding"], p["bank"], labels, p["index"].tolist(), p["K"], p["t"]
        )
        for labels in (p["labels"].tolist(), [list(range(len(p["bank"])))])  # alone in its cluster
    ]
    share = p["instance_share"]
    agree(found, *((1 - share) * la + share * ir for la, ir in zip(*wanted, strict=True)))
    alone = []
    for i, sim in enumerate(naive.similarities(p["embedding"], p["bank"])):
        own = int(p["index"][i])
        around = naive.background(sim, p["K"])
        alone.append(not any(naive.close(p["labels"].tolist(), own, j) for j in around))
    assert found[2]["without_close"].item() == pytest.approx(np.mean(alone))


@settings(max_examples=150)
@given(problems())
def test_instance_softmax(p):
    expected = naive.instance_softmax(p["embedding"], p["bank"], p["index"].tolist(), p["t"])
    agree(over_ranks(p, "instance_softmax"), *expected)


@settings(max_examples=150)
@given(problems())
def test_instance_nce(p):
    found = over_ranks(p, "instance_nce")
    arguments = p["embedding"], p["bank"], p["index"].tolist(), p["noise"].tolist()
    data, noise, gradient = naive.instance_nce(*arguments, p["t"])
    agree(found, data + noise, gradient)
    assert found[2]["data_term"].item() == pytest.approx(data, rel=1e-10)
    assert found[2]["noise_term"].item() == pytest.approx(noise, rel=1e-10)


@settings(max_examples=150)
@given(problems(), st.booleans())
def test_nearest_rows(p, leave_out):
    N = len(p["bank"]) - leave_out
    k = min(p["K"], N)
    exclude = p["index"] if leave_out else None
    if k < 1:
        return
    found = in_threads(
        p["ranks"],
        lambda world: sharded_knn.nearest_rows(
            world, p["embedding"], cases.bank_of(world, p["bank"]), k, exclude=exclude
        ),
    )
    for i, sim in enumerate(naive.similarities(p["embedding"], p["bank"])):
        if leave_out:
            sim[int(p["index"][i])] = -np.inf
        for rows, similarity in found:
            assert rows[i].tolist() == naive.background(sim, k)
            np.testing.assert_allclose(similarity[i], np.sort(sim)[::-1][:k], rtol=0, atol=1e-12)


def test_more_neighbors_than_rows_of_all_ranks_are_refused():
    with user_error("option-invalid", "k is 6", "1-5"):
        in_threads(
            2,
            lambda world: sharded_knn.nearest_rows(
                world, torch.eye(3), cases.bank_of(world, torch.ones(5, 3)), 6
            ),
        )


@settings(max_examples=100)
@given(problems(exact=False), st.sampled_from([0.0, 0.5]))
def test_rows_of_the_bank_follow_the_last_of_repeated_samples(p, momentum):
    def call(world):
        bank = cases.bank_of(world, p["bank"])
        bank.update(p["index"], p["embedding"], momentum=momentum)
        return bank.rows

    whole = MemoryBank(*p["bank"].shape, dtype=torch.float64)
    whole.rows.copy_(p["bank"])
    whole.update(p["index"], p["embedding"], momentum=momentum)
    assert torch.equal(torch.cat(in_threads(p["ranks"], call)), whole.rows)


def test_parts_of_a_bank_start_as_the_rows_of_the_whole():
    whole = MemoryBank(23, 6, seed=2).rows
    parts = [MemoryBank(23, 6, seed=2, part=share(23, rank, 4)).rows for rank in range(4)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("loss", ["local_aggregation", "instance_softmax", "instance_nce"])
def test_similarities_at_the_limits_of_the_exponential(loss):
    p = cases.problem(size=40, batch=6, seed=3, dtype=torch.float64) | {"t": 1e-3}
    if loss == "instance_nce":
        p["t"] = 0.01  # its constant Z leaves exp(v.M/t) as it is
    whole = cases.score(World(), p, loss)
    assert whole.loss.isfinite()
    for ranks in (2, 3):
        found = over_ranks(p | {"ranks": ranks} | WHOLE, loss)
        agree(found, whole.loss.item(), whole.gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_agrees_with_one_process(dtype):
    p = cases.problem(size=300, batch=12, seed=1, dtype=dtype)
    leaf = p["embedding"].clone().requires_grad_()
    loss = objectives.local_aggregation(
        leaf, p["bank"], p["labels"], p["index"], neighbors=p["K"], temperature=p["t"]
    )
    loss.backward()
    found = over_ranks(p | {"ranks": 3} | WHOLE, "local_aggregation")
    assert found[0].dtype == torch.float32
    assert found[1].dtype == dtype
    assert found[0].item() == pytest.approx(loss.item(), rel=1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-8
    assert (found[1] - leaf.grad).abs().max() <= tolerance * leaf.grad.abs().max()


def test_banks_that_are_sampled_and_searched_by_compiled_loops_agree_with_float64():
    p = cases.problem(size=20_000, batch=24, seed=4, dtype=torch.float32, dim=32, K=300)
    leaf = p["embedding"].double().requires_grad_()
    loss = objectives.local_aggregation(
        leaf, p["bank"].double(), p["labels"], p["index"], neighbors=300, temperature=p["t"]
    )
    loss.backward()
    for ranks in (1, 2, 3):
        found = over_ranks(p | {"ranks": ranks} | WHOLE, "local_aggregation")
        assert found[0].item() == pytest.approx(loss.item(), rel=1e-5)
        assert (found[1] - leaf.grad).abs().max() <= 1e-4 * leaf.grad.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=60)
@given(p=problems(exact=True))
def test_each_engine_agrees_with_float64_where_ranks_have_few_neighbors_or_none(name, dtype, p):
    """Small integers are numbers of each type, so that ties are ties."""
    whole = cases.score(World(), p, "local_aggregation")
    p |= {"bank": p["bank"].to(dtype), "embedding": p["embedding"].float()}
    with use_backend(name):
        found = over_ranks(p, "local_aggregation")
    assert found[0].item() == pytest.approx(whole.loss.item(), rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(found[1], whole.gradient, rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """The most bytes that any new tensor has had. Views of what was there are not new."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        old = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if torch.is_tensor(t)}
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in old:
                self.most = max(self.most, tensor.nbytes)
        return out


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_memory_of_a_rank_falls_as_one_over_the_ranks(ranks):
    """N = 64,000 rows: the bank's part and its labels, and nothing as long as N in a step."""
    N, D, H, B = 64_000, 8, 2, 16
    p = cases.problem(size=N, batch=B, seed=0, dtype=torch.float32, dim=D, clusterings=H, K=32)

    def call(world):
        bank, batch = cases.bank_of(world, p["bank"]), cases.gathered(world, p)
        labels = p["labels"][:, bank.part.start : bank.part.stop].contiguous()
        coarse = bank.searchable.refresh().rounded  # a bf16 copy, where that is multiplied faster
        assert coarse is not None
        held = {id(t): t.nbytes for t in (bank.rows, coarse, labels)}
        with Largest() as seen:
            v, index = batch.embedding.detach(), batch.index
            objectives.local_aggregation(v, bank.shard(world), labels, index, neighbors=32)
            bank.update(index, v)
        copied = 0 if coarse is bank.rows else coarse.element_size()
        assert sum(held.values()) == N // ranks * (4 * D + copied * D + 4 * H)
        return seen.most

    tiles_of_2048_rows = B * 2048 * 4
    # Without compiled loops, whose arrays are not torch's.
    with SETTINGS.changed(torch_tile_bytes=tiles_of_2048_rows, min_compiled_rows=sys.maxsize):
        found = in_threads(ranks, call)
    tile = B * 2048 * 4  # of similarities; as many rows are sampled
    assert all(0 < most <= tile for most in found)


# --- Real processes over gloo ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool():
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.mark.parametrize("objective", ["local_aggregation", "instance_softmax", "instance_nce"])
def test_training_on_1_to_4_processes_gives_the_same_losses_bank_and_weights(pool, objective):
    """Seven steps of a linear encoder: uneven rows, uneven and smaller last batches, repeats."""
    alone = cases.train(World(), objective)
    assert alone["losses"][-1] != pytest.approx(alone["losses"][0])
    for ranks in (1, 2, 3, 4):
        found = pool(ranks, cases.train, objective)
        rows = torch.cat([one["rows"] for one in found])
        torch.testing.assert_close(rows, alone["rows"], rtol=0, atol=1e-10)
        for one in found:
            np.testing.assert_allclose(one["losses"], alone["losses"], rtol=1e-10)
            torch.testing.assert_close(one["weights"], alone["weights"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_gloo_and_the_naive_loops_agree(pool, ranks):
    for seed, size in enumerate((2, 3, 9, 40)):  # also fewer rows than ranks
        p = cases.problem(size=size, batch=5, seed=seed, dtype=torch.float64)
        found = pool(ranks, cases.score, p, "local_aggregation")
        arguments = p["embedding"], p["bank"], p["labels"].tolist(), p["index"].tolist()
        gradient = torch.cat([one.gradient for one in found])
        agree((found[0].loss, gradient), *naive.local_aggregation(*arguments, p["K"], p["t"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_bytes_over_the_wire_are_those_of_the_formula_whatever_n_and_k(pool, ranks, dtype):
    e, B, D, H = dtype.itemsize, 7, 8, 2
    b = -(-B // ranks)
    for N, K in ((300, 8), (3000, 8), (3000, 500), (20_000, 8)):
        p = cases.problem(
            size=N, batch=B, seed=5, dtype=dtype, dim=D, clusterings=H, K=K, spread=True
        )
        for sent in pool(ranks, cases.traffic, p):
            if ranks == 1:
                assert sent == {"gather": [], "la": [], "softmax": [], "nce": [], "update": []}
                continue
            gradient = ("reduce_scatter", b * ranks * D * e)
            assert sent["gather"] == [("all_gather", b * D * e), ("all_gather", 8 * b)]
            floor = [("all_reduce", e * B), ("all_reduce", 8 * B)] if N == 20_000 else []
            before = [*floor, ("all_reduce", 3 * e * B)]
            assert sent["la"][: len(before)] == before
            histograms = sent["la"][len(before) : -3]
            assert 1 <= len(histograms) <= -(-8 * e // 6)
            assert set(histograms) == {("all_reduce", 256 * B)}
            sums = [("all_reduce", 4 * H * B), ("all_reduce", 16 * B)]
            assert sent["la"][-3:] == [*sums, gradient]
            softmax = [("all_reduce", e * B), ("all_reduce", 2 * e * B), gradient]
            assert sent["softmax"] == softmax
            assert sent["nce"] == [("all_reduce", 2 * e), gradient]
            assert sent["update"] == []


def test_ties_at_the_last_place_cost_one_more_collective(pool):
    p = cases.problem(size=300, batch=7, seed=5, dtype=torch.float32, dim=8)
    p["bank"] = p["bank"][:1].expand(300, 8).clone()  # every row ties with every other
    for sent in pool(2, cases.traffic, p):
        assert [name for name, _ in sent["la"][1:-3]] == ["all_reduce", "all_gather"]
        assert sent["la"][2] == ("all_gather", 8 * 7)


def test_neighbors_vote_over_processes_as_in_one(pool):
    p = cases.problem(size=90, batch=20, seed=2, dtype=torch.float32)
    rows, similarity = knn.nearest_rows(p["embedding"], p["bank"], 7)
    for found_rows, found_similarity in pool(3, cases.nearest, p, 7):
        assert torch.equal(found_rows, rows)
        torch.testing.assert_close(found_similarity, similarity)
