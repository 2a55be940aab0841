import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import naive
from localagg.config import UserError
from localagg.knn import knn_accuracy, nearest_rows


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


def test_nearest_come_in_order_and_never_the_excluded_one():
    generator = torch.Generator().manual_seed(0)
    bank = unit(generator, 40, 4)
    rows, similarity = nearest_rows(bank, bank, 5)
    assert rows[:, 0].tolist() == list(range(40))
    assert (similarity.diff(dim=1) <= 0).all()
    others, _ = nearest_rows(bank, bank, 4, exclude=torch.arange(40))
    assert torch.equal(others, rows[:, 1:])


def test_many_queries_are_answered_as_few():
    generator = torch.Generator().manual_seed(0)
    bank, queries = unit(generator, 30, 4), unit(generator, 600, 4)
    rows, _ = nearest_rows(queries, bank, 3)
    assert torch.equal(rows[500:510], nearest_rows(queries[500:510], bank, 3)[0])


def test_too_many_neighbors_are_refused():
    bank = F.normalize(torch.randn(4, 3), dim=1)
    with pytest.raises(UserError, match="4 neighbors of 3 images"):
        nearest_rows(bank, bank, 4, exclude=torch.arange(4))
