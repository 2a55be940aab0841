"""Floors: values against numpy and scikit-learn, what few images permit of, the verdict."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import silhouette_score
from sklearn.neighbors import KNeighborsClassifier

from localagg.evaluation.floors import (
    RAW_PIXELS,
    STARTING,
    TRAINED,
    ViewPairs,
    floor_protocol,
    measure_floors,
    pixel_rows,
    verdict,
)


def blobs(classes: int, each: int, noise: float) -> tuple[ViewPairs, torch.Tensor]:
    """Unit rows around one center a class, and other views near them."""
    torch.manual_seed(0)
    labels = torch.arange(classes).repeat_interleave(each)
    rows = F.one_hot(labels, 16) + noise * torch.randn(len(labels), 16)
    other = rows + 0.3 * noise * torch.randn_like(rows)
    pairs = ViewPairs(torch.arange(len(rows)), F.normalize(rows, dim=1), F.normalize(other, dim=1))
    return pairs, labels


def test_values_are_those_of_numpy_and_scikit_learn():
    pairs, labels = blobs(5, 30, noise=0.5)
    found = measure_floors(pairs, labels)
    x, y = pairs.center.double().numpy(), labels.numpy()
    sims = x @ x.T
    np.fill_diagonal(sims, -np.inf)
    assert found["knn1"] == pytest.approx((y[sims.argmax(axis=1)] == y).mean())
    votes = []
    for i in range(len(x)):
        others = np.arange(len(x)) != i
        weights = lambda away: np.exp((1 - away**2 / 2) / 0.07)  # noqa: E731
        vote = KNeighborsClassifier(30, weights=weights).fit(x[others], y[others])
        votes.append(vote.predict(x[i : i + 1])[0] == y[i])
    assert floor_protocol(150, labels).neighbors == 30  # the mean size of a class
    assert found["knn200"] == pytest.approx(np.mean(votes))
    nearest = (pairs.other.double().numpy() @ x.T).argmax(axis=1)
    assert found["view_retrieval"] == pytest.approx((nearest == np.arange(150)).mean())
    sigma = np.linalg.svd(x, compute_uv=False)
    shares = sigma / sigma.sum()
    assert found["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_clear_clusters_agree_with_classes_and_seeds_and_noise_with_neither():
    pairs, labels = blobs(5, 30, noise=0.02)
    clear = measure_floors(pairs, labels)
    assert silhouette_score(pairs.center, labels) > 0.8
    names = ("nmi", "ari", "cluster_accuracy", "cluster_stability")
    assert min(clear[name] for name in names) > 0.75
    blurred = measure_floors(*blobs(5, 30, noise=5.0))
    assert max(blurred[name] for name in names) < 0.5


def test_a_collapsed_embedding_finds_one_view_and_has_rank_1():
    rows = F.normalize(torch.ones(50, 8), dim=1)
    found = measure_floors(ViewPairs(torch.arange(50), rows, rows), None)
    assert found["view_retrieval"] == pytest.approx(1 / 50)
    assert found["effective_rank"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_few_images_are_measured_by_what_they_permit(size):
    pairs, labels = blobs(1, size, noise=0.5)
    found = measure_floors(pairs, labels)  # one class: as good as none
    expected = {"effective_rank"} | ({"view_retrieval"} if size > 1 else set())
    assert found.keys() == expected | ({"cluster_stability"} if size > 3 else set())
    values = dict.fromkeys((RAW_PIXELS, STARTING, TRAINED), found)
    assert str(size) in verdict(values, size)


def test_images_without_a_label_or_alone_in_their_class_ask_nothing():
    pairs, labels = blobs(4, 10, noise=0.05)
    assert measure_floors(pairs, labels)["knn1"] == 1
    labels[0], labels[1], labels[10:20] = -1, 9, -1  # 9: alone, and nobody's nearest neighbor
    pairs.center[1] = F.one_hot(torch.tensor(15), 16)
    labels[2:10] = 3  # a class of two blobs
    found = measure_floors(pairs, labels)
    assert found["knn1"] == 1
    assert floor_protocol(40, labels) == (40, 29 // 3, 3)
    assert "knn1" not in measure_floors(pairs, torch.full((40,), -1))


def test_pixels_are_means_of_at_most_16_by_16():
    images = torch.rand(2, 3, 32, 32)
    expected = images.view(2, 3, 16, 2, 16, 2).mean(dim=(3, 5)).flatten(1)
    torch.testing.assert_close(pixel_rows(images), expected)
    assert pixel_rows(torch.rand(2, 3, 8, 8)).shape == (2, 192)


@pytest.mark.parametrize(
    ("raw", "starting", "trained", "expected"),
    [
        (0.38, 0.30, 0.26, ["Below", "raw pixels", "26.0%", "38.0%", "pretrained"]),
        (0.30, 0.75, 0.55, ["Below", "starting network", "55.0%", "75.0%", "--learning-rate"]),
        (0.38, 0.30, 0.39, ["No better", "raw pixels", "39.0%", "38.0%"]),
        (0.38, 0.30, 0.70, ["Better", "70.0%", "38.0% and 30.0%"]),
    ],
)
@pytest.mark.parametrize("metric", ["knn200", "view_retrieval"])
def test_the_verdict_names_the_floors_and_their_numbers(raw, starting, trained, expected, metric):
    names = (RAW_PIXELS, STARTING, TRAINED)
    values = {n: {metric: v} for n, v in zip(names, (raw, starting, trained), strict=True)}
    sentence = verdict(values, 1000)
    assert [words for words in expected if words not in sentence] == []
    assert sentence.count(". ") == 0


def test_the_verdict_names_clusters_that_became_worse_and_knows_runs_without_a_start():
    values = {RAW_PIXELS: {"knn200": 0.3, "nmi": 0.4}, TRAINED: {"knn200": 0.6, "nmi": 0.2}}
    assert all(words in verdict(values, 1000) for words in ("Better", "0.20", "0.40"))
    values[TRAINED]["nmi"] = 0.5
    assert "NMI" not in verdict(values, 1000)


def test_the_verdict_is_of_many_neighbors_and_of_clusters_where_these_are_level():
    starting = {"knn1": 0.604, "knn200": 0.68, "nmi": 0.368}  # CIFAR-10 by the recipe adapt
    trained = {"knn1": 0.612, "knn200": 0.707, "nmi": 0.43}
    values = {RAW_PIXELS: {"knn1": 0.3, "knn200": 0.33, "nmi": 0.09}, STARTING: starting}
    assert verdict(values | {TRAINED: trained}, 2000).startswith("Better than")
    level = verdict(values | {TRAINED: {**trained, "knn200": 0.69}}, 2000)
    assert all(words in level for words in ("Better by clusters", "0.43", "0.37", "69.0%"))
    worse = verdict(values | {TRAINED: {**trained, "knn200": 0.69, "nmi": 0.3}}, 2000)
    assert worse.startswith("No better")


def test_the_verdict_of_a_pretrained_network_does_not_advise_to_start_from_one():
    values = {name: {"view_retrieval": 0.4} for name in (RAW_PIXELS, STARTING, TRAINED)}
    assert "adapt" in verdict(values, 1000)
    assert "adapt" not in verdict(values, 1000, pretrained=True)
    assert "keep the starting network" in verdict(values, 1000, pretrained=True)
    values[STARTING] = {"view_retrieval": 0.1}
    assert "keep" not in verdict(values, 1000, pretrained=True)
