"""Logistic regression: a minimum by hand-written gradients, and choices within the rows alone."""

import numpy as np
import pytest
import torch
from expect import user_error
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from localagg.evaluation.readouts.logistic_regression import (
    DEFAULT_L2,
    L2_GRID,
    MOST_FITS,
    fit_logistic_head,
    shuffle_within_classes,
)


@pytest.mark.parametrize(("classes", "rows"), [(2, 900), (10, 900), (2, 30), (10, 60)])
def test_head_minimizes_the_penalized_cross_entropy_of_standardized_features(classes, rows):
    raw = load_digits()
    used = raw.target < classes
    x, y = raw.data[used][:rows] * np.linspace(0.01, 30, 64) + 5, raw.target[used][:rows]
    features = torch.from_numpy(x).float()
    before = features.clone()
    head = fit_logistic_head(features, torch.from_numpy(y).long(), torch.arange(len(y)), classes)
    assert torch.equal(features, before)
    assert head.chosen
    logits = x @ head.weight.double().numpy().T + head.bias.double().numpy()
    assert (logits.argmax(axis=1) == y).mean() > 0.97
    # The gradient by hand, in float64, on standardized features and their weights.
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    error = (p - np.eye(classes)[y]) / len(y)
    weight = head.weight.double().numpy() * x.std(axis=0)
    slope = error.T @ StandardScaler().fit_transform(x) + head.l2 * weight
    assert np.abs(slope).max() < 2e-5
    assert np.abs(error.sum(axis=0)).max() < 2e-5


def test_strength_has_the_least_loss_over_the_folds():
    """Features of mere noise need a strong penalty."""
    draws = np.random.RandomState(1)
    y = np.arange(200) % 4
    x = draws.normal(size=(200, 60))
    x[:, 0] += 2 * y
    labels, index = torch.from_numpy(y), torch.arange(200)
    head = fit_logistic_head(torch.from_numpy(x), labels, index, 4, seed=5)
    place, _ = shuffle_within_classes(labels, index, 5, "folds")
    scaled = StandardScaler().fit_transform(x)
    losses = {}
    for l2 in L2_GRID[:5]:
        losses[l2] = 0
        for fold in range(5):
            scored = (place % 5 == fold).numpy()
            model = LogisticRegression(C=1 / ((~scored).sum() * l2), max_iter=1000)
            model.fit(scaled[~scored], y[~scored])
            p = model.predict_proba(scaled[scored])
            losses[l2] -= np.log(p[np.arange(scored.sum()), y[scored]]).sum()
    assert head.l2 == min(losses, key=losses.get)
    assert head.l2 not in (L2_GRID[0], L2_GRID[-1])


def test_each_fit_of_a_head_is_reported_before_it_begins():
    random = torch.Generator().manual_seed(0)
    features = torch.randn(60, 5, generator=random)
    fits: list[int] = []
    fit_logistic_head(
        features, (features[:, 0] > 0).long(), torch.arange(60), 2, on_fit=fits.append
    )
    assert fits[:3] == [0, 1, 2]
    assert fits == sorted(set(fits))
    assert fits[-1] == MOST_FITS - 1


def test_shuffles_are_within_classes_and_do_not_depend_on_order():
    labels = torch.tensor([0] * 12 + [1] * 5 + [3])
    index = torch.arange(18) * 7
    place, count = shuffle_within_classes(labels, index, 3, "x")
    assert count.tolist() == [12] * 12 + [5] * 5 + [1]
    assert sorted(place[:12].tolist()) == list(range(12))
    assert sorted(place[12:17].tolist()) == list(range(5))
    mixed = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    again, _ = shuffle_within_classes(labels[mixed], index[mixed], 3, "x")
    assert torch.equal(again, place[mixed])
    for seed, purpose in ((4, "x"), (3, "y")):
        assert not torch.equal(shuffle_within_classes(labels, index, seed, purpose)[0], place)


def test_single_rows_take_the_default_strength_and_absent_classes_never_win():
    features = torch.tensor([[0.0, 1.0, 7.0], [1.0, 0.0, 7.0], [2.0, 0.0, 7.0]])  # one is constant
    labels = torch.tensor([0, 2, 4])
    head = fit_logistic_head(features, labels, torch.arange(3), 6)
    assert (head.l2, head.chosen) == (DEFAULT_L2, False)
    logits = features @ head.weight.T + head.bias
    assert logits.argmax(dim=1).tolist() == [0, 2, 4]
    assert logits[:, [1, 3, 5]].max() < logits[:, [0, 2, 4]].min()


def test_features_that_are_not_finite_are_refused():
    features = torch.zeros(4, 3)
    features[2, 1] = torch.nan
    with user_error("not-finite"):
        fit_logistic_head(features, torch.tensor([0, 1, 0, 1]), torch.arange(4), 2)
