"""Clusters of a table: against scikit-learn, and planted ones are found."""

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from expect import user_error
from sklearn.metrics import adjusted_rand_score, silhouette_samples

from embeddings import blobs, save_table
from localagg.embeddings.clusters import cluster_images, measure_fit

SIZES = [40, 25, 60, 10]
TRUTH = np.repeat(range(4), SIZES)


@pytest.fixture
def table(tmp_path):
    return save_table(tmp_path / "e.parquet", blobs(SIZES), [f"kind{n}" for n in TRUTH])


def test_fit_equals_scikit_learn_and_float64():
    rows, labels = blobs([30, 20, 40], spread=0.4), np.repeat([2, 0, 1], [30, 20, 40])
    labels[[0, 35, 60]] = 3, 1, 0  # one image alone, two misplaced
    fit = measure_fit(torch.from_numpy(rows), torch.from_numpy(labels), 4)
    expected = silhouette_samples(rows.astype(np.float64), labels, metric="cosine")
    np.testing.assert_allclose(fit.silhouette, expected, atol=1e-5)
    for cluster in range(4):
        own = rows[labels == cluster].astype(np.float64)
        center = own.mean(0) / np.linalg.norm(own.mean(0))
        np.testing.assert_allclose(fit.distance[labels == cluster], 1 - own @ center, atol=1e-5)
        pairs = (own @ own.T)[~np.eye(len(own), dtype=bool)]
        expected = pairs.mean() if len(pairs) else np.nan
        np.testing.assert_allclose(fit.tightness[cluster], expected, atol=1e-5)


def test_planted_clusters_are_found_and_described(table, tmp_path):
    found = cluster_images(table, 4, out=tmp_path / "c.csv")
    with open(tmp_path / "c.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    labels = np.array([int(row["cluster"]) for row in rows])
    assert adjusted_rand_score(TRUTH, labels) == 1
    assert [row["path"] for row in rows] == [f"{n}.jpg" for n in range(135)]
    assert (found["images"], found["k"]) == (135, 4)
    tightness = [each["tightness"] for each in found["clusters"]]
    assert tightness == sorted(tightness, reverse=True)
    for each in found["clusters"]:
        own = labels == each["cluster"]
        assert each["size"] == own.sum()
        assert each["label"] == f"kind{TRUTH[own][0]}"
        assert each["purity"] == 1
        distances = [float(row["distance"]) for row, mine in zip(rows, own, strict=True) if mine]
        nearest = [example["distance"] for example in each["exemplars"]]
        np.testing.assert_allclose(nearest, np.sort(distances)[: len(nearest)], atol=1e-6)
    assert found == cluster_images(table, 4)


def test_formats_of_the_result_hold_the_same_rows(table, tmp_path):
    for suffix in ("csv", "parquet", "json"):
        cluster_images(table, 3, out=tmp_path / f"c.{suffix}")
    parquet = pq.read_table(tmp_path / "c.parquet").to_pylist()
    assert json.loads((tmp_path / "c.json").read_text()) == parquet
    with open(tmp_path / "c.csv", newline="") as file:
        lines = [{**row, "index": int(row["index"])} for row in csv.DictReader(file)]
    for line, row in zip(lines, parquet, strict=True):
        assert (line["path"], line["index"], line["label"]) == (
            row["path"], row["index"], row["label"],
        )  # fmt: skip
        assert float(line["silhouette"]) == pytest.approx(row["silhouette"], abs=1e-6)


def test_identical_images_are_one_cluster(tmp_path):
    rows = np.repeat(np.eye(2, 5, dtype=np.float32), 10, axis=0)
    found = cluster_images(save_table(tmp_path / "e.parquet", rows), 6)
    assert [each["size"] for each in found["clusters"]] == [10, 10]


def test_one_image_is_a_cluster(tmp_path):
    found = cluster_images(save_table(tmp_path / "e.parquet", np.eye(1, 5)), 1)
    assert found["clusters"][0]["tightness"] is None
    json.dumps(found, allow_nan=False)


def test_invalid_options_raise(table, tmp_path):
    for k in (0, 136):
        with user_error("option-invalid", "--k", k):
            cluster_images(table, k)
    with user_error("option-invalid", "c.xlsx", ".parquet"):
        cluster_images(table, 2, out=tmp_path / "c.xlsx")
    with user_error("not-found", "none"):
        cluster_images(table, 2, out=tmp_path / "none" / "c.csv")
