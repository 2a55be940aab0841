"""Nearest images of a table: against a float64 search, and against damage."""

import random
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import localagg.embeddings.search as module
from localagg.checkpoint import save_weights
from localagg.config import ViewConfig
from localagg.embeddings.embed import write_embeddings
from localagg.embeddings.search import search
from localagg.embeddings.table import EmbeddingTable
from localagg.errors import UserError
from localagg.models import create_encoder

VIEWS = ViewConfig(image_size=16, eval_crop=0.8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_weights(path, create_encoder("resnet18_small", dim=12, width=8, seed=0), VIEWS)
    return path


@pytest.fixture(scope="module")
def table(weights, pictures, tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "e.parquet"
    write_embeddings(weights, str(pictures), path)
    return path


def cosines(path) -> np.ndarray:
    """float64 [N, N], by numpy alone."""
    rows = np.stack(pq.read_table(path)["embedding"].to_numpy()).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


def assert_nearest(neighbors, similarity, own, k):
    """The k best of float64, without the row itself, in order."""
    expected = np.delete(similarity, own)
    best = np.sort(expected)[::-1][:k]
    np.testing.assert_allclose([n["similarity"] for n in neighbors], best, atol=1e-5)
    found = [n["index"] for n in neighbors]
    assert own not in found
    assert len(set(found)) == len(found) == k
    np.testing.assert_allclose(similarity[found], best, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}, {"layer": "2"}])
def test_rows_find_what_a_float64_search_finds(weights, pictures, tmp_path, options):
    path = tmp_path / "e.parquet"
    write_embeddings(weights, str(pictures), path, batch=10, **options)
    similarity, names = cosines(path), pq.read_table(path)["path"].to_pylist()
    found = search(path, list(range(48)), k=7)
    assert (found["rows"], found["exact"]) == (48, True)
    for own, query in enumerate(found["queries"]):
        assert query["index"] == own
        assert_nearest(query["neighbors"], similarity[own], own, 7)
        for neighbor in query["neighbors"]:
            assert neighbor["path"] == names[neighbor["index"]]
            assert neighbor["label"] == neighbor["path"].split("/")[0]


def test_an_image_may_be_a_row_a_path_or_a_file(table, pictures):
    name = "temple/05.jpg"
    own = pq.read_table(table)["path"].to_pylist().index(name)
    file = pictures / "train" / name
    found = search(table, [own, str(own), name, str(file), file], k=5)["queries"]
    for query in found[1:3]:
        assert query["neighbors"] == found[0]["neighbors"]
        assert query["index"] == own
    for query in found[3:]:  # a file is looked for among all, and finds itself
        assert query["index"] is None
        assert query["neighbors"][0]["path"] == name
        assert query["neighbors"][0]["similarity"] > 0.999
        others = [n["index"] for n in query["neighbors"][1:]]
        assert others == [n["index"] for n in found[0]["neighbors"][:4]]


def test_files_are_seen_as_the_table_was(weights, pictures, tmp_path):
    path = tmp_path / "e.parquet"
    write_embeddings(weights, str(pictures), path, layer="1")
    for name in ("flower/00.png", "temple/07.jpg"):
        best = search(path, [pictures / "train" / name], k=1)["queries"][0]["neighbors"][0]
        assert best["path"] == name
        assert best["similarity"] > 0.9999


def test_k_is_at_most_what_there_is(table):
    assert len(search(table, [0], k=500)["queries"][0]["neighbors"]) == 47
    with pytest.raises(UserError, match="--k is 0"):
        search(table, [0], k=0)
    with pytest.raises(UserError, match="at least one image"):
        search(table, [])


def test_a_large_table_is_searched_approximately(weights, tmp_path, monkeypatch):
    path = tmp_path / "e.parquet"
    write_embeddings(weights, "digits", path)
    asked = list(range(0, 1400, 14))
    exact = search(path, asked, k=10)
    monkeypatch.setattr(module, "EXACT_ROWS", 1400)
    near = search(path, asked, k=10)
    assert exact["engine"] == "every row compared (IndexFlatIP)"
    assert near["engine"] == "approximate: 8 of 37 lists looked into (IndexIVFFlat)"
    assert (exact["exact"], near["exact"]) == (True, False)
    hits = 0
    for one, other in zip(exact["queries"], near["queries"], strict=True):
        known = {n["index"]: n["similarity"] for n in one["neighbors"]}
        for neighbor in other["neighbors"]:
            assert neighbor["index"] != one["index"]
            if neighbor["index"] in known:
                hits += 1
                assert neighbor["similarity"] == pytest.approx(known[neighbor["index"]], abs=1e-5)
    assert hits / 1000 > 0.9


# --- Wrong use, and damage ------------------------------------------------------------------------


def test_images_that_are_not_there_are_refused(table, pictures, tmp_path):
    with pytest.raises(UserError, match=r"no image 'temple/5.jpg'.*Did you mean 'temple/"):
        search(table, ["temple/5.jpg"])
    with pytest.raises(UserError, match="no image 48: it holds 48 of the images 0 to 47"):
        search(table, ["48"])
    with pytest.raises(UserError, match="no image"):
        search(table, [-1])
    with pytest.raises(UserError, match="is a folder"):
        search(table, [pictures])
    broken = tmp_path / "broken.jpg"
    broken.write_bytes((pictures / "train" / "temple" / "05.jpg").read_bytes()[:-200])
    with pytest.raises(UserError, match=r"broken.jpg' cannot be read: "):
        search(table, [broken])


def test_weights_must_be_those_that_made_the_table(pictures, tmp_path):
    weights, path = tmp_path / "w.safetensors", tmp_path / "e.parquet"
    save_weights(weights, create_encoder("resnet18_small", dim=12, width=8, seed=0), VIEWS)
    write_embeddings(weights, str(pictures), path, split="val")
    file = pictures / "val" / "temple" / "05.jpg"
    moved = shutil.move(weights, tmp_path / "moved.safetensors")
    with pytest.raises(UserError, match=r"are no longer at .*w.safetensors.*--run,"):
        search(path, [file])
    assert search(path, ["temple/05.jpg"])["queries"]  # needs no weights
    assert search(path, [file], moved)["queries"][0]["neighbors"][0]["path"] == "temple/05.jpg"
    save_weights(weights, create_encoder("resnet18_small", dim=12, width=8, seed=1), VIEWS)
    with pytest.raises(UserError, match=r"are not the weights that made .* with --run,"):
        search(path, [file])
    with pytest.raises(UserError, match="There is no run folder or weights file"):
        search(path, [file], tmp_path / "none")


def test_other_tables_are_refused(table, tmp_path):
    path = tmp_path / "t.parquet"
    with pytest.raises(UserError, match="There is no file"):
        search(path, [0])
    path.write_bytes(b"PAR1 but no table PAR1")
    with pytest.raises(UserError, match="cannot be read as a table"):
        search(path, [0])
    pq.write_table(pa.table({"embedding": [[1.0, 2.0]]}), path)
    with pytest.raises(UserError, match="was not written by localagg embed"):
        search(path, [0])
    whole = pq.read_table(table)
    pq.write_table(whole.drop_columns(["index"]), path)
    with pytest.raises(UserError, match="was not written by localagg embed"):
        search(path, [0])
    rows = np.stack(whole["embedding"].to_numpy()).copy()
    rows[40, 3] = np.inf
    values = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), 12)
    pq.write_table(whole.set_column(3, whole.schema.field("embedding"), values), path)
    with pytest.raises(UserError, match=r"Row 40 of .* is not finite"):
        search(path, [0])
    missing = pa.array([None, *rows[1:].tolist()], whole.schema.field("embedding").type)
    pq.write_table(whole.set_column(3, whole.schema.field("embedding"), missing), path)
    with pytest.raises(UserError, match="rows without an embedding"):
        search(path, [0])


@pytest.mark.parametrize("damage", ["cut", "pages", "footer"])
def test_damaged_tables_are_right_or_refused(table, tmp_path, damage):
    data, path = table.read_bytes(), tmp_path / "t.parquet"
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    draws, expected, wrong, refused = random.Random(0), _all(table), 0, 0
    for _ in range(200):
        changed = bytearray(data)
        if damage == "cut":
            del changed[draws.randrange(len(data)) :]
        else:
            first, last = (0, footer) if damage == "pages" else (footer, len(data))
            changed[draws.randrange(first, last)] ^= 1 << draws.randrange(8)
        path.write_bytes(changed)
        try:
            found = _all(path)
        except UserError:
            refused += 1
            continue
        wrong += not (torch.equal(found[0], expected[0]) and found[1] == expected[1])
    # The format has checksums of its pages, none of its footer.
    assert wrong <= (4 if damage == "footer" else 0)
    assert refused >= {"cut": 200, "pages": 150, "footer": 50}[damage]


def _all(path):
    opened = EmbeddingTable(path)
    return torch.cat(list(opened.embeddings())), opened.facts_of(range(len(opened)))
