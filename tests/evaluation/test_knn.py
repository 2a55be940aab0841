import naive
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from expect import user_error
from hypothesis import given
from hypothesis import strategies as st

from localagg.evaluation.knn import knn_accuracy, knn_vote, nearest_rows, retrieval_scores


def unit(generator, *shape):
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=1)


@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 25), st.sampled_from([0.07, 1.0]))
def test_the_vote_is_the_papers(seed, size, k, temperature):
    generator = torch.Generator().manual_seed(seed)
    bank, queries = unit(generator, size, 4), unit(generator, 6, 4)
    labels = torch.randint(0, 3, (size,), generator=generator)
    asked = torch.randint(0, 3, (6,), generator=generator)
    found = knn_accuracy(queries, asked, bank, labels, k=(1, k), temperature=temperature)
    for count in (1, k):
        expected = naive.knn_accuracy(queries, asked, bank, labels, count, temperature)
        assert found[f"knn{count}"] == pytest.approx(expected)


def test_votes_in_float32_equal_naive_votes_in_float64():
    generator = torch.Generator().manual_seed(0)
    centers = unit(generator, 5, 16)
    labels = torch.randint(0, 5, (4200,), generator=generator)
    bank = F.normalize(centers[labels] + 1.5 * unit(generator, 4200, 16), dim=1).float()
    queries = F.normalize(centers[torch.arange(40) % 5] + 1.5 * unit(generator, 40, 16), dim=1)
    queries = queries.float()
    counts = (200, 1, 20, 10, 100)  # in any order
    found = knn_vote(queries, bank, labels, k=counts)
    assert sorted(found) == sorted(counts)
    for i in range(40):
        for count in counts:
            voted = int(found[count][i])
            sim = (bank.double() @ queries[i].double()).tolist()
            votes = [0.0] * 5
            for j in naive.background(sim, count):
                votes[labels[j]] += np.exp(sim[j] / 0.07)
            assert voted == int(np.argmax(votes))


def test_nearest_rows_are_in_order_and_never_the_excluded_one():
    generator = torch.Generator().manual_seed(0)
    bank = unit(generator, 40, 4)
    rows, similarity = nearest_rows(bank, bank, 5)
    assert rows[:, 0].tolist() == list(range(40))
    assert (similarity.diff(dim=1) <= 0).all()
    others, _ = nearest_rows(bank, bank, 4, exclude=torch.arange(40))
    assert torch.equal(others, rows[:, 1:])


@pytest.mark.parametrize("size", [10, 5000])
def test_the_excluded_one_may_be_anywhere_among_equals(size):
    bank = F.normalize(torch.ones(size, 4), dim=1)
    exclude = torch.tensor([0, 2, size - 1])
    rows, _ = nearest_rows(bank[:3], bank, 3, exclude=exclude)
    assert rows.tolist() == [[1, 2, 3], [0, 1, 3], [0, 1, 2]]


@pytest.mark.parametrize("size", [30, 5000])
def test_batches_of_queries_find_what_single_ones_find(size):
    generator = torch.Generator().manual_seed(0)
    bank, queries = unit(generator, size, 4).float(), unit(generator, 600, 4).float()
    rows, _ = nearest_rows(queries, bank, 3, batch=200)
    assert torch.equal(rows[500:510], nearest_rows(queries[500:510], bank, 3)[0])
    assert nearest_rows(queries[:0], bank, 3)[0].shape == (0, 3)


def test_more_neighbors_than_rows_all_vote():
    generator = torch.Generator().manual_seed(0)
    bank, queries = unit(generator, 9, 4), unit(generator, 5, 4)
    labels = torch.arange(9) % 3
    found = knn_vote(queries, bank, labels, k=(9, 200))
    assert torch.equal(found[9], found[200])


@given(st.integers(0, 2**31), st.integers(2, 40), st.booleans())
def test_retrieval_scores_are_those_of_scikit_learn(seed, size, ties):
    from sklearn.metrics import average_precision_score

    generator = torch.Generator().manual_seed(seed)
    bank, queries = unit(generator, size, 3), unit(generator, 5, 3)
    if ties:
        bank = bank[torch.randint(0, 1 + size // 3, (size,), generator=generator)].round()
        queries = queries.round()
    labels = torch.randint(0, 3, (size,), generator=generator)
    asked = torch.randint(0, 4, (5,), generator=generator)  # of class 3 there is none
    found = retrieval_scores(queries, asked, bank, labels, k=(1, 4, 50))
    right = (asked.unsqueeze(1) == labels).numpy()
    sim = (queries @ bank.T).numpy()
    counted = right.any(axis=1)
    assert found["map_left_out"] == (~counted).sum()
    each = [
        average_precision_score(r, s) for r, s in zip(right[counted], sim[counted], strict=True)
    ]
    assert found["map"] == (pytest.approx(np.mean(each)) if each else None)
    for k in (1, 4, 50):
        order = np.array([naive.background(line, k) for line in sim.tolist()])
        expected = np.take_along_axis(right, order, axis=1).mean()
        assert found[f"precision{k}"] == pytest.approx(expected)


def test_retrieval_excludes_the_query_itself():
    from sklearn.metrics import average_precision_score

    generator = torch.Generator().manual_seed(1)
    bank, labels = unit(generator, 30, 4), torch.arange(30) % 4
    labels[0] = 4  # alone in its class: right is nobody
    found = retrieval_scores(bank, labels, bank, labels, k=(3,), exclude=torch.arange(30))
    each, hits = [], 0.0
    for i in range(30):
        others = np.delete(np.arange(30), i)
        sim, right = (bank @ bank[i]).numpy()[others], (labels == labels[i]).numpy()[others]
        hits += right[np.argsort(-sim)[:3]].mean()
        if right.any():
            each.append(average_precision_score(right, sim))
    assert found["map"] == pytest.approx(np.mean(each))
    assert found["map_left_out"] == 1
    assert found["precision3"] == pytest.approx(hits / 30)


def test_a_collapsed_embedding_has_the_precision_of_chance():
    bank, labels = torch.ones(40, 4) / 2, torch.arange(40) // 10  # ordered by class
    found = retrieval_scores(bank[:5], labels[:5], bank, labels, k=(1,))
    assert found["map"] == pytest.approx(0.25)


def test_invalid_inputs_are_reported():
    bank = F.normalize(torch.randn(4, 3), dim=1)
    labels = torch.arange(4)
    with user_error("option-invalid", "k is 4", "1-3"):
        nearest_rows(bank, bank, 4, exclude=torch.arange(4))
    with user_error("not-finite"):
        nearest_rows(bank, bank.clone().fill_(torch.nan), 1)
    for call in (knn_accuracy, retrieval_scores):
        with user_error("no-images"):
            call(bank[:1], labels[:1], bank[:1], labels[:1], exclude=labels[:1])
        with user_error("option-invalid", "0, 1"):
            call(bank, labels, bank, labels, k=(0, 1))
        with user_error("no-labels", -1):
            call(bank, labels, bank, labels - 1)
