"""Odd images: single ones and planted threes come first, also where densities differ."""

import json

import numpy as np
import pytest
import torch
from expect import user_error

from embeddings import blobs, save_table
from localagg.embeddings.neighbors import nearest_others
from localagg.embeddings.outliers import find_outliers, outlier_scores

PLANTED = [*range(600, 613)]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A dense and a loose cluster; four threes of odd images, and one alone."""
    usual = [blobs([400], dim=32, spread=0.05), blobs([200], dim=32, spread=0.12, seed=1)]
    odd = blobs([3, 3, 3, 3, 1], dim=32, spread=0.02, seed=2)
    return save_table(tmp_path_factory.mktemp("odd") / "e.parquet", np.concatenate([*usual, odd]))


def test_planted_threes_and_a_single_image_come_first(table, tmp_path):
    found = find_outliers(table, top=13, out=tmp_path / "o.json")
    assert {each["index"] for each in found["outliers"]} == {*PLANTED}
    groups = {each["index"]: set(each["group"]) for each in found["outliers"]}
    assert groups[600] >= {"601.jpg", "602.jpg"}
    rows = json.loads((tmp_path / "o.json").read_text())
    assert [row["index"] for row in rows[:13]] == [each["index"] for each in found["outliers"]]
    assert [row["rank"] for row in rows] == [*range(1, 614)]
    scores = [row["score"] for row in rows]
    assert scores == sorted(scores, reverse=True)


def test_fewer_neighbors_than_companions_miss_the_threes(table):
    found = find_outliers(table, top=13, neighbors=2)
    assert len({each["index"] for each in found["outliers"]} & {*PLANTED}) < 5


def test_scores_equal_naive_loops():
    rows = blobs([50, 30], spread=0.3)
    score, density, isolation = outlier_scores(*nearest_others(torch.from_numpy(rows), 6))
    cosine = rows.astype(np.float64) @ rows.T
    np.fill_diagonal(cosine, -2)
    near = np.argsort(-cosine, axis=1)[:, :6]
    away = np.array([1 - cosine[i, near[i, 5]] for i in range(80)])
    np.testing.assert_allclose(density, 1 - away, atol=1e-5)
    around = np.array([np.sort(away[near[i]])[2] for i in range(80)])  # the lower median
    np.testing.assert_allclose(isolation, away / around, rtol=1e-3)
    np.testing.assert_allclose(score, away * (away / around) ** 0.25, rtol=1e-3)


def test_few_images_and_invalid_options(tmp_path):
    one = save_table(tmp_path / "one.parquet", np.eye(1, 4))
    assert [each["score"] for each in find_outliers(one)["outliers"]] == [0]
    same = save_table(tmp_path / "same.parquet", np.ones((5, 4)))
    assert [each["score"] for each in find_outliers(same)["outliers"]] == [0] * 5
    with user_error("option-invalid", "--top", 0):
        find_outliers(one, top=0)
    with user_error("option-invalid", "--neighbors", 0):
        find_outliers(one, neighbors=0)
