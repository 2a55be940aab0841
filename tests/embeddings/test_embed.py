"""Embeddings of real images, in memory and as Parquet."""

import json
import os

import datasets
import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
import torch
from expect import user_error

from embeddings import VIEWS, hidden_files, save_small_encoder, stacked_rows
from localagg import __version__
from localagg.checkpoint import load_views, save_weights, weights_digest
from localagg.cli.main import main
from localagg.config import PretrainConfig, ViewConfig, to_dict
from localagg.data.loading.cropping import evaluation_batches
from localagg.data.sources.open import open_images
from localagg.embeddings import all_splits
from localagg.embeddings.embed import embed
from localagg.embeddings.tables.table_writer import open_writer
from localagg.embeddings.tables.write_table import write_embeddings
from localagg.models import create_encoder
from localagg.recipes.derived_settings import resolve_defaults


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_small_encoder(tmp_path_factory.mktemp("weights") / "small.safetensors")


def test_a_source_without_readable_images_raises(weights, tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"nothing")
    with user_error("unreadable-images", tmp_path, "2 images"):
        embed(weights[1], open_images(str(tmp_path)), VIEWS)


def test_rows_equal_those_of_single_images(weights, pictures):
    _, encoder = weights
    source = open_images(str(pictures), "val")
    found = embed(encoder, source, VIEWS, batch=5)
    assert found.index.tolist() == list(range(12))
    for i in (0, 7, 11):
        alone = embed(encoder, source, VIEWS, batch=1).rows[i]
        torch.testing.assert_close(found.rows[i], alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.rows.norm(dim=1), torch.ones(12))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_network_is_restored_also_after_an_error(pictures, training):
    encoder = create_encoder("resnet18_small", dim=12, width=8, blocks=(1,)).train(training)
    embed(encoder, pictures, VIEWS, batch=20)
    assert encoder.training is training

    def fail(done, of):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        embed(encoder, pictures, VIEWS, on_progress=fail)
    assert encoder.training is training
    assert all(module.training is training for module in encoder.modules())


def test_wrong_arguments_of_embed_raise(weights, pictures):
    for options, *named in (
        ({"source": "no/such"}, "no/such"),
        ({"views": None}, "views", "None"),
        ({"batch": 0}, "batch is", 0),
        ({"workers": 1.5}, "workers is", 1.5),
    ):
        arguments = {"source": pictures, "views": VIEWS} | options
        code = "not-found" if "source" in options else "option-invalid"
        with user_error(code, *named):
            embed(weights[1], **arguments)
    assert len(embed(weights[1], pictures, ViewConfig()).rows) == 48  # sizes are derived


def test_the_table_holds_embeddings_names_labels_and_facts(weights, pictures, tmp_path):
    path, encoder = weights
    out = tmp_path / "e.parquet"
    words = ["embed", str(path), "--data", str(pictures), "--out", str(out), "--split", "val"]
    assert main([*words, "--workers", "0", "--json", str(tmp_path / "j.json")]) == 0
    assert json.loads((tmp_path / "j.json").read_text())["rows"] == 12
    table = pq.read_table(out)
    assert table.column_names == [
        "path", "split", "index", "label", "content", "embedding",
    ]  # fmt: skip
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[12]"
    source = open_images(str(pictures), "val")
    rows = stacked_rows(table)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, embed(encoder, source, VIEWS).rows, atol=1e-6)
    assert table["path"].to_pylist() == [f"val/{source.name(i)}" for i in range(12)]
    assert table["split"].to_pylist() == ["val"] * 12
    assert table["index"].to_pylist() == list(range(12))
    assert table["label"].to_pylist() == [source.classes[i] for i in source.labels]
    assert not hidden_files(tmp_path)
    facts = json.loads(table.schema.metadata[b"localagg"])
    expected = {
        "version": __version__,
        "weights": str(path),
        "weights_digest": weights_digest(encoder),
        "layer": None,
        "views": json.loads(json.dumps(to_dict(VIEWS))),
        "data": str(pictures),
        "split": "val",
        "fingerprint": source.fingerprint(),
        "images": 12,
        "precision": "32-true",
        "root": str(pictures),
    }
    assert {name: facts[name] for name in expected} == expected


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_layer_is_the_read_out_feature(weights, flat, tmp_path, dtype):
    path, encoder = weights
    layer = encoder.layers[0]
    out = tmp_path / "e.parquet"
    result = write_embeddings(path, str(flat), out, layer=layer, dtype=dtype, batch=5)
    _, images = next(evaluation_batches(open_images(str(flat)), VIEWS, batch=12))
    with torch.no_grad():
        expected = encoder.features(images, [layer])[layer]
    rows = stacked_rows(pq.read_table(out))
    assert result["dim"] == rows.shape[1] == expected.shape[1] > 100
    assert rows.dtype == np.dtype(dtype)
    difference = np.abs(rows - expected.numpy()).max() / expected.max().item()
    assert difference < (1e-5 if dtype == "float32" else 1e-3)
    with user_error("option-unknown", "conv9", layer):
        write_embeddings(path, str(flat), out, layer="conv9")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("reader", ["pandas", "datasets"])
def test_other_libraries_read_the_table(weights, pictures, tmp_path, reader, dtype):
    out = tmp_path / "e.parquet"
    write_embeddings(weights[0], str(pictures), out, split="val", dtype=dtype)
    if reader == "pandas":
        found = pandas.read_parquet(out).to_dict("list")
    else:
        found = datasets.Dataset.from_parquet(str(out), cache_dir=str(tmp_path / "cache"))[:]
    table = pq.read_table(out)
    assert list(found) == table.column_names
    for name in ("path", "index", "label"):
        assert list(found[name]) == table[name].to_pylist()
    np.testing.assert_array_equal(np.stack(found["embedding"]), stacked_rows(table))


def test_workers_and_batches_change_no_row(weights, pictures, tmp_path):
    first, second, third = (tmp_path / name for name in ("1.parquet", "2.parquet", "3.parquet"))
    write_embeddings(weights[0], str(pictures), first, batch=16)
    result = write_embeddings(weights[0], str(pictures), second, batch=16, workers=2)
    assert (result["rows"], result["resumed"]) == (60, 0)
    assert first.read_bytes() == second.read_bytes()
    write_embeddings(weights[0], str(pictures), third, batch=7)
    one, other = pq.read_table(first), pq.read_table(third)
    assert one["path"] == other["path"]
    np.testing.assert_allclose(stacked_rows(one), stacked_rows(other), atol=1e-6)


def test_large_tables_have_several_row_groups(weights, tmp_path, monkeypatch):
    one, many = tmp_path / "one.parquet", tmp_path / "many.parquet"
    write_embeddings(weights[0], "digits", one, batch=100, split="train")
    monkeypatch.setattr("localagg.embeddings.tables.table_writer.GROUP_ROWS", 256)
    write_embeddings(weights[0], "digits", many, batch=100, split="train")
    sizes = [pq.ParquetFile(many).metadata.row_group(g).num_rows for g in range(7)]
    assert sizes == [200] * 7
    assert pq.read_table(many).equals(pq.read_table(one))


def test_unreadable_images_are_skipped_and_counted(weights, flat, tmp_path):
    for name in ("flower-01.jpg", "flower-02.jpg", "flower-03.jpg", "temple-05.jpg"):
        (flat / name).write_bytes(b"\xff\xd8\xff")
    (flat / "zz.jpg").write_bytes(b"")
    result = write_embeddings(weights[0], str(flat), tmp_path / "e.parquet", batch=1)
    assert (result["rows"], result["unreadable"], result["dim"]) == (8, 5, 12)
    table = pq.read_table(tmp_path / "e.parquet")
    assert table.column_names == [
        "path",
        "split",
        "index",
        "content",
        "embedding",
    ]  # no labels, no such column
    assert table["index"].to_pylist() == [0, 4, 5, 6, 7, 8, 9, 10]
    names = [open_images(str(flat)).name(i) for i in table["index"].to_pylist()]
    assert table["path"].to_pylist() == names


def test_no_readable_image_gives_no_file(weights, flat, tmp_path):
    for image in flat.iterdir():
        image.write_bytes(image.read_bytes()[:400])  # a header alone
    with user_error("unreadable-images", flat, "12"):
        write_embeddings(weights[0], str(flat), tmp_path / "e.parquet")
    assert not (tmp_path / "e.parquet").exists()
    assert not hidden_files(tmp_path)


def test_missing_labels_are_null_and_odd_names_escaped(weights, flat, tmp_path, monkeypatch):
    for image in sorted(flat.iterdir())[2:]:
        image.unlink()
    os.rename(os.fsencode(flat / "flower-00.png"), os.fsencode(flat) + b"/\xff.png")
    source = open_images(str(flat))
    source.labels, source.classes = torch.tensor([-1, 0]), ["only"]
    monkeypatch.setattr(all_splits, "open_images", lambda data, split: source)
    assert write_embeddings(weights[0], str(flat), tmp_path / "e.parquet")["rows"] == 2
    table = pq.read_table(tmp_path / "e.parquet")
    assert table["label"].to_pylist() == [None, "only"]
    assert "\\xff.png" in table["path"].to_pylist()


@pytest.mark.parametrize(
    ("changed", "code", "value"),
    [
        ({"out": "no/e.parquet"}, "not-found", "--out"),
        ({"weights": "none"}, "not-found", "none"),
        ({"dtype": "int8"}, "option-invalid", "int8"),
        ({"batch": 0}, "option-invalid", "--batch-size"),
        ({"device": "gpu"}, "option-invalid", "gpu"),
        ({"precision": "half"}, "option-invalid", "half"),
        ({"split": "trian"}, "not-found", "trian"),
        ({"out": "e.txt"}, "unsupported", "e.txt"),
        ({"workers": -1}, "option-invalid", "--workers"),
    ],
)
def test_wrong_options_raise(weights, pictures, tmp_path, changed, code, value):
    options = {"weights": weights[0], "data": str(pictures), "out": "e.parquet"} | changed
    for name in ("weights", "out"):
        options[name] = tmp_path / options[name]
    with user_error(code, value):
        write_embeddings(**options)
    assert not list(tmp_path.iterdir())


def test_a_table_that_another_process_writes_raises(weights, flat, tmp_path):
    facts = {"dim": 3, "dtype": "float32", "labels": None, "images": 1, "batch": 1}
    with (
        open_writer(tmp_path / "e.parquet", facts),
        user_error("busy", "e.parquet"),
    ):
        write_embeddings(weights[0], str(flat), tmp_path / "e.parquet")


def test_values_that_the_table_cannot_hold_raise(flat, tmp_path):
    path, encoder = save_small_encoder(tmp_path / "large.safetensors")
    with torch.no_grad():
        encoder.head.weight.fill_(float("nan"))
    save_weights(path, encoder, VIEWS)
    with user_error("not-finite", "embedding", "flower-00.png", path):
        write_embeddings(path, str(flat), tmp_path / "e.parquet")
    with torch.no_grad():
        encoder.mean.fill_(-1e7)
    save_weights(path, encoder, VIEWS)
    with user_error("not-finite", "layer 1", "flower-00.png", "float16"):
        write_embeddings(path, str(flat), tmp_path / "e.parquet", layer="1", dtype="float16")
    assert not list(tmp_path.glob("*.parquet"))
    assert not hidden_files(tmp_path)


def test_views_travel_with_the_weights(weights, tmp_path):
    assert load_views(weights[0]) == VIEWS
    encoder = create_encoder("resnet18_small", width=8, seed=0)
    save_weights(tmp_path / "plain.safetensors", encoder)
    assert load_views(tmp_path / "plain.safetensors") is None
    assert resolve_defaults(PretrainConfig(views=VIEWS), 50, 300).views == VIEWS
