"""Columns for viewers: their documented form, exact neighbors, and a table that still searches."""

import io

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from expect import user_error
from PIL import Image

from embeddings import save_small_encoder, stacked_rows
from localagg.cli.main import main
from localagg.embeddings.search import search
from localagg.embeddings.tables.viewer_columns import add_viewer_columns
from localagg.embeddings.tables.write_table import write_embeddings


@pytest.fixture
def table(pictures, tmp_path):
    weights, _ = save_small_encoder(tmp_path / "small.safetensors")
    write_embeddings(weights, pictures, tmp_path / "e.parquet", batch=16)
    return tmp_path / "e.parquet"


def test_columns_are_as_viewers_document_them(table, pictures):
    before = pq.read_table(table)
    found = search(table, [3], k=4)["queries"]
    add_viewer_columns(table, map=True, images=True)
    frame = pd.read_parquet(table)
    assert np.isfinite(frame[["x", "y"]].to_numpy()).all()
    assert frame["x"].std() > 0
    ids = np.stack([np.array(each["ids"]) for each in frame["neighbors"]])
    distances = np.stack([np.array(each["distances"]) for each in frame["neighbors"]])
    cosine = stacked_rows(before).astype(np.float64) @ stacked_rows(before).T
    np.fill_diagonal(cosine, -2)
    best = np.sort(cosine, axis=1)[:, ::-1][:, :15]
    np.testing.assert_allclose(1 - distances, best, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(cosine, ids, 1), best, atol=1e-5)
    for path, image in zip(frame["path"], frame["image"], strict=True):
        thumbnail = Image.open(io.BytesIO(image["bytes"]))
        assert thumbnail.size == Image.open(pictures / path).size
        assert image["path"] == path
    assert pq.read_table(table, columns=before.column_names).equals(before)
    assert search(table, [3], k=4)["queries"] == found
    add_viewer_columns(table, map=False, images=True)  # replaces its own column
    assert sorted(pq.read_schema(table).names) == sorted(frame.columns)


def test_a_table_of_layers_takes_pictures_and_no_map(pictures, tmp_path, capsys):
    weights, _ = save_small_encoder(tmp_path / "small.safetensors")
    out = tmp_path / "e.parquet"
    command = ["embed", str(weights), "--data", str(pictures), "--out", str(out), "--layer", "0"]
    assert main([*command, "1", "--map"]) == 2
    assert "--map" in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "1", "--images"]) == 0
    assert {"layer_0", "layer_1", "image"} <= {*pq.read_schema(out).names}


def test_other_formats_and_changed_images_raise(table, pictures, tmp_path):
    with user_error("option-conflict", "e.csv"):
        add_viewer_columns(tmp_path / "e.csv", map=True, images=False)
