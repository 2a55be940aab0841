"""Scores of clusterings against labels, by their written-out definitions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from expect import user_error

from localagg.evaluation.cluster_metrics import best_kmeans, cluster_accuracy, cluster_scores


def blobs(spread: float):
    """300 rows around 4 directions, and which."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 4
    rows = torch.eye(6)[labels] + spread * torch.randn(300, 6, generator=generator)
    return F.normalize(rows, dim=1), labels


def test_separate_classes_score_one_and_names_of_classes_do_not_matter():
    rows, labels = blobs(0.05)
    found = cluster_scores(rows, 10 * labels + 3)  # labels need not be dense
    assert (found["clusters"], found["images"], found["seeds"]) == (4, 300, 5)
    for name in ("nmi", "ari", "accuracy"):
        assert found[name] == {"mean": 1.0, "std": 0.0, "min": 1.0, "max": 1.0}


def test_spread_over_seeds_is_of_independent_clusterings():
    """The numbers are those of scikit-learn's own best of ten, seed by seed, by the definitions."""
    from sklearn.cluster import KMeans

    rows, _ = blobs(1.5)
    labels = torch.randint(0, 7, (300,), generator=torch.Generator().manual_seed(1))
    found = cluster_scores(rows, labels, seeds=3)
    each = [KMeans(7, n_init=10, random_state=seed).fit_predict(rows.numpy()) for seed in range(3)]
    for name, definition in (("nmi", nmi), ("ari", ari), ("accuracy", cluster_accuracy)):
        values = [definition(labels.numpy(), assigned) for assigned in each]
        assert found[name]["mean"] == pytest.approx(np.mean(values))
        assert found[name]["std"] == pytest.approx(np.std(values, ddof=1))
        assert (found[name]["min"], found[name]["max"]) == pytest.approx((min(values), max(values)))
    assert found["nmi"]["std"] > 0
    assert cluster_scores(rows, labels, seeds=1)["nmi"]["std"] == 0


def nmi(labels, clusters):
    """2 I(L; C) / (H(L) + H(C))."""
    size = len(labels)

    def entropy(values):
        shares = [list(values).count(v) / size for v in set(values)]
        return -sum(p * math.log(p) for p in shares)

    together = list(zip(labels.tolist(), clusters.tolist(), strict=True))
    h_l, h_c = entropy(labels.tolist()), entropy(clusters.tolist())
    return 2 * (h_l + h_c - entropy(together)) / (h_l + h_c)


def ari(labels, clusters):
    """Pairs of images that both agree on, less those of chance (Hubert & Arabie 1985)."""
    same_l = labels[:, None] == labels[None]
    same_c = clusters[:, None] == clusters[None]
    pairs = np.triu_indices(len(labels), 1)
    both, in_l, in_c = ((m[pairs]).sum() for m in (same_l & same_c, same_l, same_c))
    chance = in_l * in_c / len(pairs[0])
    return (both - chance) / ((in_l + in_c) / 2 - chance)


def test_a_sample_of_many_rows_chooses_the_start_for_all():
    rows, labels = blobs(0.4)
    x = rows.numpy()
    found = best_kmeans(x, 4, seed=0, sample=30, sample_each=1)
    assert len(found) == 300
    # An end of Lloyd's iterations over all rows: each is nearest to the mean of its own cluster.
    means = np.stack([x[found == c].mean(axis=0) for c in range(4)])
    distance = ((x[:, None] - means) ** 2).sum(axis=2)
    assert (distance.argmin(axis=1) == found).mean() > 0.99
    whole = best_kmeans(x, 4, seed=0)
    assert cluster_accuracy(whole, found) > 0.98
    assert cluster_accuracy(labels.numpy(), found) > 0.8


def test_two_images_are_two_clusters():
    found = cluster_scores(torch.eye(2), torch.tensor([0, 1]))
    assert found["accuracy"]["mean"] == 1


def test_one_class_and_infinite_values_are_reported():
    rows, labels = blobs(0.1)
    with user_error("no-labels", 300):
        cluster_scores(rows, torch.zeros_like(labels))
    with user_error("not-finite"):
        cluster_scores(rows.clone().fill_(torch.nan), labels)
