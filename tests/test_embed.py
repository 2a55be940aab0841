"""Embeddings of real images, in memory and as Parquet."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from localagg import cli
from localagg.checkpoint import load_views, save_weights
from localagg.config import PretrainConfig, UserError, ViewConfig
from localagg.data.sources import open_images
from localagg.embed import embed, write_embeddings
from localagg.models import create_encoder
from localagg.sizing import resolve

VIEWS = ViewConfig(image_size=16, eval_crop=0.8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    encoder = create_encoder("resnet18_small", dim=12, width=8, blocks=(1,), seed=0)
    save_weights(path, encoder, VIEWS)
    return path, encoder.eval()


def test_rows_are_those_of_one_image_at_a_time(weights, pictures):
    _, encoder = weights
    source = open_images(str(pictures), "val")
    found = embed(encoder, source, VIEWS, batch=5)
    assert found.index.tolist() == list(range(12))
    for i in (0, 7, 11):
        alone = embed(encoder, source, VIEWS, batch=1).rows[i]
        torch.testing.assert_close(found.rows[i], alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.rows.norm(dim=1), torch.ones(12))


def test_parquet_holds_what_embed_gives_with_the_views_of_the_weights(weights, pictures, tmp_path):
    path, encoder = weights
    out = tmp_path / "e.parquet"
    words = ["embed", str(path), "--data", str(pictures), "--out", str(out), "--split", "val"]
    assert cli.main([*words, "--workers", "0", "--json", str(tmp_path / "j.json")]) == 0
    assert json.loads((tmp_path / "j.json").read_text())["rows"] == 12
    table = pq.read_table(out)
    assert table.column_names == ["path", "index", "label", "embedding"]
    assert str(table.schema.field("embedding").type).startswith("fixed_size_list")
    source = open_images(str(pictures), "val")
    expected = embed(encoder, source, VIEWS).rows
    rows = np.stack(table["embedding"].to_numpy())
    assert rows.dtype == np.float32
    # bf16 arithmetic where the processor has it
    np.testing.assert_allclose(rows, expected, atol=0.02)
    assert table["path"].to_pylist() == [source.name(i) for i in range(12)]
    assert table["index"].to_pylist() == list(range(12))
    assert table["label"].to_pylist() == [source.classes[i] for i in source.labels]
    assert [file.name for file in tmp_path.iterdir() if "tmp" in file.name] == []


def test_without_labels_there_is_no_such_column_and_the_unreadable_are_counted(
    weights, pictures, tmp_path
):
    import shutil

    folder = tmp_path / "flat"
    shutil.copytree(pictures / "val" / "flower", folder)
    (folder / "zz.jpg").write_bytes(b"nothing")
    told = write_embeddings(weights[0], str(folder), tmp_path / "e.parquet")
    assert (told["rows"], told["unreadable"], told["dim"]) == (6, 1, 12)
    assert pq.read_table(tmp_path / "e.parquet").column_names == ["path", "index", "embedding"]


def test_wrong_use_is_refused(weights, pictures, tmp_path):
    with pytest.raises(UserError, match="--out"):
        write_embeddings(weights[0], str(pictures), tmp_path / "no" / "e.parquet")
    with pytest.raises(UserError, match="There is no run folder or weights file"):
        write_embeddings(tmp_path / "none", str(pictures), tmp_path / "e.parquet")
    assert not list(tmp_path.iterdir())


def test_views_travel_with_the_weights(weights, tmp_path):
    assert load_views(weights[0]) == VIEWS
    encoder = create_encoder("resnet18_small", width=8, seed=0)
    save_weights(tmp_path / "plain.safetensors", encoder)
    assert load_views(tmp_path / "plain.safetensors") is None
    assert resolve(PretrainConfig(views=VIEWS), 50, 300).views == VIEWS
