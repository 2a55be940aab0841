"""Embeddings of real images, in memory and as Parquet, through kills and damage."""

import json
import os
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from embeddings import VIEWS, clean, rows_of, small
from localagg import __version__, cli
from localagg.checkpoint import load_views, save_weights
from localagg.config import PretrainConfig, to_dict
from localagg.data.loading.cropping import evaluation_batches
from localagg.data.sources.open import open_images
from localagg.embeddings.embed import embed, weights_digest, write_embeddings
from localagg.embeddings.table import TableWriter
from localagg.errors import UserError
from localagg.models import create_encoder
from localagg.recipes.defaults import resolve_defaults


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return small(tmp_path_factory.mktemp("weights") / "small.safetensors")


def test_a_source_of_which_nothing_can_be_read_is_one_sentence(weights, tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(UserError, match="None of the 2 images"):
        embed(weights[1], open_images(str(tmp_path)), VIEWS)


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
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[12]"
    source = open_images(str(pictures), "val")
    expected = embed(encoder, source, VIEWS).rows
    rows = rows_of(table)
    assert rows.dtype == np.float32
    # bf16 arithmetic where the processor has it
    np.testing.assert_allclose(rows, expected, atol=0.02)
    assert table["path"].to_pylist() == [source.name(i) for i in range(12)]
    assert table["index"].to_pylist() == list(range(12))
    assert table["label"].to_pylist() == [source.classes[i] for i in source.labels]
    assert clean(tmp_path)


def test_the_file_says_what_made_it(weights, pictures, tmp_path):
    path, encoder = weights
    write_embeddings(path, str(pictures), tmp_path / "e.parquet", split="val")
    facts = json.loads(pq.read_schema(tmp_path / "e.parquet").metadata[b"localagg"])
    source = open_images(str(pictures), "val")
    expected = {
        "version": __version__,
        "weights": str(path),
        "weights_digest": weights_digest(encoder),
        "layer": None,
        "views": to_dict(VIEWS),
        "data": str(pictures),
        "split": "val",
        "fingerprint": source.fingerprint(),
        "images": 12,
    }
    assert {name: facts[name] for name in expected} == json.loads(json.dumps(expected))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_layer_is_the_read_out_feature(weights, flat, tmp_path, dtype):
    path, encoder = weights
    layer = encoder.layers[0]
    out = tmp_path / "e.parquet"
    told = write_embeddings(path, str(flat), out, layer=layer, dtype=dtype, batch=5)
    _, images = next(evaluation_batches(open_images(str(flat)), VIEWS, batch=12))
    with torch.no_grad():
        expected = encoder.features(images, [layer])[layer]
    rows = rows_of(pq.read_table(out))
    assert told["dim"] == rows.shape[1] == expected.shape[1] > 100
    assert rows.dtype == np.dtype(dtype)
    difference = np.abs(rows - expected.numpy()).max() / expected.max().item()
    assert difference < 0.03  # bf16 arithmetic where the processor has it
    with pytest.raises(UserError, match="has no layer 'conv9'; it has"):
        write_embeddings(path, str(flat), out, layer="conv9")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("reader", ["pandas", "polars", "duckdb", "datasets"])
def test_others_read_the_file_as_it_stands(weights, pictures, tmp_path, reader, dtype):
    library = pytest.importorskip(reader)
    out = tmp_path / "e.parquet"
    write_embeddings(weights[0], str(pictures), out, split="val", dtype=dtype)
    if reader == "pandas":
        frame = library.read_parquet(out)
        found = {name: frame[name].tolist() for name in frame.columns}
    elif reader == "polars":
        found = library.read_parquet(out).to_dict(as_series=False)
    elif reader == "duckdb":
        relation = library.sql(f"select * from '{out}'")
        found = dict(zip(relation.columns, zip(*relation.fetchall(), strict=True), strict=True))
    else:
        found = library.Dataset.from_parquet(str(out), cache_dir=str(tmp_path / "cache"))[:]
    table = pq.read_table(out)
    assert list(found) == table.column_names
    for name in ("path", "index", "label"):
        assert list(found[name]) == table[name].to_pylist()
    np.testing.assert_array_equal(
        np.array([list(row) for row in found["embedding"]]), rows_of(table)
    )


def test_workers_and_batches_change_no_row(weights, pictures, tmp_path):
    first, second, third = (tmp_path / name for name in ("1.parquet", "2.parquet", "3.parquet"))
    write_embeddings(weights[0], str(pictures), first, batch=16)
    told = write_embeddings(weights[0], str(pictures), second, batch=16, workers=2)
    assert (told["rows"], told["resumed"]) == (48, 0)
    assert first.read_bytes() == second.read_bytes()
    write_embeddings(weights[0], str(pictures), third, batch=7)
    one, other = pq.read_table(first), pq.read_table(third)
    assert one["path"] == other["path"]
    np.testing.assert_allclose(rows_of(one), rows_of(other), atol=0.02)


def test_without_labels_there_is_no_such_column_and_the_unreadable_are_counted(
    weights, flat, tmp_path
):
    (flat / "zz.jpg").write_bytes(b"nothing")
    told = write_embeddings(weights[0], str(flat), tmp_path / "e.parquet")
    assert (told["rows"], told["unreadable"], told["dim"]) == (12, 1, 12)
    assert pq.read_table(tmp_path / "e.parquet").column_names == ["path", "index", "embedding"]


def test_batches_without_a_readable_image_leave_nothing(weights, flat, tmp_path):
    for name in ("flower-01.jpg", "flower-02.jpg", "flower-03.jpg", "temple-05.jpg"):
        (flat / name).write_bytes(b"\xff\xd8\xff")
    (flat / "zz.jpg").write_bytes(b"")
    told = write_embeddings(weights[0], str(flat), tmp_path / "e.parquet", batch=1)
    assert (told["rows"], told["unreadable"]) == (8, 5)
    table = pq.read_table(tmp_path / "e.parquet")
    assert table["index"].to_pylist() == [0, 4, 5, 6, 7, 8, 9, 10]
    names = [open_images(str(flat)).name(i) for i in table["index"].to_pylist()]
    assert table["path"].to_pylist() == names


def test_images_of_which_none_is_whole_give_no_file(weights, flat, tmp_path):
    for image in flat.iterdir():
        image.write_bytes(image.read_bytes()[:400])  # a header alone
    with pytest.raises(UserError, match="None of the 12 images"):
        write_embeddings(weights[0], str(flat), tmp_path / "e.parquet")
    assert not (tmp_path / "e.parquet").exists()
    assert clean(tmp_path)


def test_two_images_missing_labels_and_odd_names_will_do(weights, flat, tmp_path, monkeypatch):
    for image in sorted(flat.iterdir())[2:]:
        image.unlink()
    os.rename(os.fsencode(flat / "flower-00.png"), os.fsencode(flat) + b"/\xff.png")
    source = open_images(str(flat))
    source.labels, source.classes = torch.tensor([-1, 0]), ["only"]
    # the name localagg.embed is the function
    monkeypatch.setattr(
        sys.modules["localagg.embeddings.embed"], "open_images", lambda data, split: source
    )
    told = write_embeddings(weights[0], str(flat), tmp_path / "e.parquet")
    assert told["rows"] == 2
    table = pq.read_table(tmp_path / "e.parquet")
    assert table["label"].to_pylist() == [None, "only"]
    assert "\\xff.png" in table["path"].to_pylist()


# --- Wrong use ------------------------------------------------------------------------------------


def test_wrong_use_is_refused(weights, pictures, tmp_path):
    out = tmp_path / "e.parquet"
    with pytest.raises(UserError, match="--out"):
        write_embeddings(weights[0], str(pictures), tmp_path / "no" / "e.parquet")
    with pytest.raises(UserError, match="There is no run folder or weights file"):
        write_embeddings(tmp_path / "none", str(pictures), out)
    with pytest.raises(UserError, match="--dtype is 'int8'; it must be float32 or float16"):
        write_embeddings(weights[0], str(pictures), out, dtype="int8")
    with pytest.raises(UserError, match="--batch is 0"):
        write_embeddings(weights[0], str(pictures), out, batch=0)
    with pytest.raises(UserError, match="--workers is -1"):
        write_embeddings(weights[0], str(pictures), out, workers=-1)
    assert not list(tmp_path.iterdir())


def test_a_file_that_another_process_writes_is_left_to_it(weights, flat, tmp_path):
    facts = {"dim": 3, "dtype": "float32"}
    with (
        TableWriter(tmp_path / "e.parquet", facts, labels=False, batches=1),
        pytest.raises(UserError, match="Another process is writing"),
    ):
        write_embeddings(weights[0], str(flat), tmp_path / "e.parquet")


def test_a_full_disk_is_one_sentence_and_the_rest_is_kept(weights, flat, tmp_path, monkeypatch):
    real, count = pq.write_table, [0]

    def full(*arguments, **options):
        count[0] += 1
        if count[0] == 2:
            raise OSError(28, "No space left on device")
        real(*arguments, **options)

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(UserError, match=r"No space left on device.*make room"):
        write_embeddings(weights[0], str(flat), tmp_path / "e.parquet", batch=4)
    assert write_embeddings(weights[0], str(flat), tmp_path / "e.parquet", batch=4)["resumed"] == 4


def test_values_that_the_file_cannot_hold_are_refused(flat, tmp_path):
    path, encoder = small(tmp_path / "large.safetensors")
    with torch.no_grad():
        encoder.head.weight.fill_(float("nan"))
    save_weights(path, encoder, VIEWS)
    with pytest.raises(UserError, match=r"embedding of flower-00.png is not finite.*large"):
        write_embeddings(path, str(flat), tmp_path / "e.parquet")
    with torch.no_grad():
        encoder.mean.fill_(-1e7)
    save_weights(path, encoder, VIEWS)
    with pytest.raises(UserError, match=r"layer 1 of flower-00.png has values beyond float16"):
        write_embeddings(path, str(flat), tmp_path / "e.parquet", layer="1", dtype="float16")
    assert not list(tmp_path.glob("*.parquet"))
    assert clean(tmp_path)


def test_views_travel_with_the_weights(weights, tmp_path):
    assert load_views(weights[0]) == VIEWS
    encoder = create_encoder("resnet18_small", width=8, seed=0)
    save_weights(tmp_path / "plain.safetensors", encoder)
    assert load_views(tmp_path / "plain.safetensors") is None
    assert resolve_defaults(PretrainConfig(views=VIEWS), 50, 300).views == VIEWS
