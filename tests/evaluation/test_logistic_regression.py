"""Logistic regression: scikit-learn's solution, exact gradients, choices within the rows alone."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from localagg.evaluation.logistic_regression import (
    DEFAULT_L2,
    GRID,
    Rows,
    _loss_and_gradient,
    fit,
    quick_head,
    stratified_folds,
)

CPU = torch.device("cpu")


def digit_rows(count=900, **options) -> tuple[Rows, np.ndarray, np.ndarray]:
    """Rows of digits of uneven scale, and the same as float64 arrays."""
    raw = load_digits()
    x = raw.data[:count] * np.linspace(0.01, 30, 64) + 5  # six pixels are constant
    table, labels = torch.from_numpy(x).float(), torch.from_numpy(raw.target[:count]).long()
    index = torch.arange(count)
    return Rows(lambda part: table[part], index, labels, CPU, **options), x, raw.target[:count]


def objective(theta, x, y, l2):
    """Penalized mean cross-entropy in float64, by hand."""
    table = theta.reshape(-1, x.shape[1] + 1)
    logits = x @ table[:, :-1].T + table[:, -1]
    top = logits.max(axis=1)
    log_sum = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top
    return (log_sum - logits[np.arange(len(y)), y]).mean() + l2 / 2 * (table[:, :-1] ** 2).sum()


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_the_solution_is_scikit_learns(l2):
    rows, x, y = digit_rows()
    x = StandardScaler().fit_transform(x)
    theirs = LogisticRegression(C=1 / (len(y) * l2), tol=1e-8, max_iter=5000).fit(x, y)
    found = fit(rows, 10, l2)
    flat = np.hstack([theirs.coef_, theirs.intercept_[:, None]]).ravel()
    assert objective(found, x, y, l2) == pytest.approx(objective(flat, x, y, l2), rel=1e-5)
    weight = found.reshape(10, -1)[:, :-1]
    assert np.abs(weight - theirs.coef_).max() < 0.01 * np.abs(theirs.coef_).max()


def test_loss_and_gradient_are_those_of_float64():
    rows, x, y = digit_rows(300)
    used = torch.arange(300) % 3 != 0
    x = StandardScaler().fit_transform(x)[used]
    y = y[used]
    draws = np.random.RandomState(0)
    theta = draws.normal(size=10 * 65) * 0.3
    table = torch.from_numpy(theta).view(10, 65)
    loss, slope = _loss_and_gradient(rows, used, table[:, :-1], table[:, -1])
    assert loss == pytest.approx(objective(theta, x, y, 0.0), rel=1e-6)
    for k in draws.choice(10 * 65, 40, replace=False):
        step = np.zeros_like(theta)
        step[k] = 1e-5
        rise = objective(theta + step, x, y, 0.0) - objective(theta - step, x, y, 0.0)
        assert slope.flatten()[k].item() == pytest.approx(rise / 2e-5, abs=2e-6)


def test_rows_that_are_not_held_give_the_same(monkeypatch):
    from localagg.evaluation import logistic_regression as logistic

    held, _, _ = digit_rows(300)
    monkeypatch.setattr(logistic, "_CHUNK", 4 * 64 * 77)  # 77 rows a chunk
    read, _, _ = digit_rows(300, hold_gb=0.0)
    assert held.held is not None
    assert read.held is None
    assert [len(y) for _, y, _ in read] == [77, 77, 77, 69]
    one, other = (fit(rows, 10, 1e-2) for rows in (held, read))
    assert np.abs(one - other).max() < 1e-3 * np.abs(one).max()


def test_a_head_acts_on_the_features_as_they_are():
    rows, x, y = digit_rows()
    head = quick_head(rows, 10)
    theta = fit(rows, 10, head.l2).reshape(10, -1)
    expected = StandardScaler().fit_transform(x) @ theta[:, :-1].T + theta[:, -1]
    found = x @ head.weight.double().numpy().T + head.bias.double().numpy()
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).all()
    assert head.chosen
    assert (found.argmax(axis=1) == y).mean() > 0.97


def test_the_strength_is_that_of_the_best_folds():
    """Against scikit-learn on the same folds: features of mere noise need a strong penalty."""
    draws = np.random.RandomState(1)
    y = np.arange(200) % 4
    x = draws.normal(size=(200, 60))
    x[:, 0] += 2 * y
    table = torch.from_numpy(x).float()
    rows = Rows(lambda part: table[part], torch.arange(200), torch.from_numpy(y), CPU)
    head = quick_head(rows, 4, seed=5)
    _, place, _ = stratified_folds(rows.labels, rows.index, 5, "folds")
    scaled = StandardScaler().fit_transform(x)
    losses = {}
    for l2 in GRID[:5]:
        losses[l2] = 0
        for fold in range(5):
            asked = (place % 5 == fold).numpy()
            model = LogisticRegression(C=1 / ((~asked).sum() * l2), max_iter=1000)
            model.fit(scaled[~asked], y[~asked])
            p = model.predict_proba(scaled[asked])
            losses[l2] -= np.log(p[np.arange(asked.sum()), y[asked]]).sum()
    assert head.l2 == min(losses, key=losses.get)
    assert head.l2 not in (GRID[0], GRID[-1])


def test_folds_are_dealt_by_class_and_do_not_depend_on_order():
    labels = torch.tensor([0] * 12 + [1] * 5 + [3])
    index = torch.arange(18) * 7
    order, place, count = stratified_folds(labels, index, 3, "x")
    assert sorted(order.tolist()) == list(range(18))
    assert labels[order].tolist() == sorted(labels.tolist())
    assert count.tolist() == [12] * 12 + [5] * 5 + [1]
    assert sorted(place[:12].tolist()) == list(range(12))
    assert sorted(place[12:17].tolist()) == list(range(5))
    mixed = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    _, again, _ = stratified_folds(labels[mixed], index[mixed], 3, "x")
    assert torch.equal(again, place[mixed])
    for seed, what in ((4, "x"), (3, "y")):
        assert not torch.equal(stratified_folds(labels, index, seed, what)[1], place)


def test_nothing_to_choose_by_and_absent_classes():
    table = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    rows = Rows(lambda part: table[part], torch.arange(2), torch.tensor([0, 2]), CPU)
    head = quick_head(rows, 4)
    assert (head.l2, head.chosen) == (DEFAULT_L2, False)
    logits = table @ head.weight.T + head.bias
    assert logits.argmax(dim=1).tolist() == [0, 2]
