"""Nearest images of a table: against a float64 search, and against damage."""

import os
import random
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from expect import user_error

from embeddings import save_small_encoder, stacked_rows
from localagg.embeddings.search import search
from localagg.embeddings.table import EmbeddingTable, path_name, path_text
from localagg.embeddings.tables.write_table import write_embeddings
from localagg.errors import UserError


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_small_encoder(tmp_path_factory.mktemp("weights") / "small.safetensors")[0]


@pytest.fixture(scope="module")
def table(weights, pictures, tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "e.parquet"
    write_embeddings(weights, str(pictures), path, split="train")
    return path


def cosines(path) -> np.ndarray:
    """float64 [N, N], by numpy alone."""
    rows = stacked_rows(pq.read_table(path)).astype(np.float64)
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


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}, {"layer": "1"}])
def test_results_equal_those_of_a_float64_search(weights, pictures, tmp_path, options):
    path = tmp_path / "e.parquet"
    write_embeddings(weights, str(pictures), path, batch=10, split="train", **options)
    similarity, names = cosines(path), pq.read_table(path)["path"].to_pylist()
    found = search(path, list(range(48)), k=7)
    assert (found["rows"], found["exact"]) == (48, True)
    for own, query in enumerate(found["queries"]):
        assert query["index"] == own
        assert_nearest(query["neighbors"], similarity[own], own, 7)
        for neighbor in query["neighbors"]:
            assert neighbor["path"] == names[neighbor["index"]]
            assert neighbor["label"] == neighbor["path"].split("/")[1]


def test_an_image_is_named_by_row_path_or_file(table, pictures, tmp_path):
    name = "train/temple/05.jpg"
    own = pq.read_table(table)["path"].to_pylist().index(name)
    file = pictures / name
    found = search(table, [own, str(own), name, str(file), file], k=5)["queries"]
    for query in found[1:]:
        assert query["neighbors"] == found[0]["neighbors"]
        assert query["index"] == own
    link = tmp_path / "linked"
    link.symlink_to(pictures)
    (linked,) = search(table, [link / name], k=5)["queries"]
    assert linked["index"] == own


NAMES = [b"a\xff.png", b"a\xfe.png", rb"a\xff.png", rb"a\x5cxff.png", rb"a\b.png", "ä".encode()]


@pytest.mark.skipif(sys.platform != "linux", reason="names are text there")
def test_names_that_are_not_text_stay_apart_and_find_their_files(weights, pictures, tmp_path):
    folder, file = tmp_path / "odd", tmp_path / "e.parquet"
    folder.mkdir()
    names = [os.fsdecode(name) for name in [*NAMES[:-1], NAMES[-1] + b".png"]]
    for name, image in zip(names, sorted(pictures.rglob("*.png")), strict=False):
        shutil.copy(image, folder / name)
    assert [path_name(path_text(name)) for name in names] == names
    write_embeddings(weights, str(folder), file)
    opened = EmbeddingTable(file)
    paths = opened.images["path"].to_pylist()
    assert {r"a\b.png", "ä.png", r"a\xff.png"} < set(paths)
    assert {path_name(path) for path in paths} == set(names)
    for row, path in enumerate(paths):
        image = folder / path_name(path)
        assert opened.image_file(row) == image
        found = search(file, [image, path])["queries"]
        assert {query["index"] for query in found} == {opened.rows([row])[0]["index"]}
    write_embeddings(weights, str(folder), file, append=True)
    assert EmbeddingTable(file).images["path"].to_pylist() == paths


def test_a_folder_stands_for_its_readable_images(table, pictures, tmp_path):
    folder = tmp_path / "queries"
    shutil.copytree(pictures / "val", folder)
    (folder / "broken.jpg").write_bytes(b"no image")
    found = search(table, [folder, 0], k=2)
    assert found["unreadable"] == 1
    names = [query["image"] for query in found["queries"]]
    files = sorted(str(path) for path in (pictures / "val").rglob("*.*"))
    assert names == [name.replace(str(pictures / "val"), str(folder)) for name in files] + ["0"]
    assert all(query["index"] is None for query in found["queries"][:-1])
    (folder / "empty").mkdir()
    (folder / "empty" / "broken.jpg").write_bytes(b"")
    with user_error("no-images", folder / "empty"):
        search(table, [folder / "empty"])


def test_files_are_embedded_like_the_table(weights, pictures, tmp_path):
    path = tmp_path / "e.parquet"
    write_embeddings(weights, str(pictures), path, layer="1", split="train")
    for name in ("train/flower/00.png", "train/temple/07.jpg"):
        copy = shutil.copy(pictures / name, tmp_path / "copy")
        best = search(path, [copy], k=1)["queries"][0]["neighbors"][0]
        assert best["path"] == name
        assert best["similarity"] > 0.9999


def test_k_is_capped_at_the_other_rows(table):
    assert len(search(table, [0], k=500)["queries"][0]["neighbors"]) == 47


def replace_embeddings(table, path, rows):
    """Write a table with other embeddings."""
    whole = pq.read_table(table)
    column, field = whole.schema.get_field_index("embedding"), whole.schema.field("embedding")
    pq.write_table(whole.set_column(column, field, pa.array(rows, field.type)), path)


def test_equal_similarities_are_sorted_by_row(table, tmp_path):
    path, rows = tmp_path / "t.parquet", stacked_rows(pq.read_table(table)).copy()
    rows[[3, 9, 20, 31, 45]] = rows[3]
    replace_embeddings(table, path, rows.tolist())
    for own, others in ((3, [9, 20, 31, 45]), (20, [3, 9, 31, 45]), (45, [3, 9, 20, 31])):
        neighbors = search(path, [own], k=4)["queries"][0]["neighbors"]
        assert [neighbor["index"] for neighbor in neighbors] == others


# --- Wrong use, and damage ------------------------------------------------------------------------


def test_missing_and_unreadable_images_raise(table, pictures, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes((pictures / "train" / "temple" / "05.jpg").read_bytes()[:-200])
    for image, code, *values in (
        ("train/temple/5.jpg", "not-found", "'train/temple/5.jpg'", "'train/temple/15.jpg'"),
        ("48", "not-found", "'48'"),
        (-1, "not-found", "-1"),
        (broken, "unreadable-images", broken),
    ):
        with user_error(code, *values):
            search(table, [image])
    with user_error("option-invalid", "--k", "0"):
        search(table, [0], k=0)
    with user_error("option-missing"):
        search(table, [])


def test_weights_must_be_those_of_the_table(pictures, tmp_path):
    path = tmp_path / "e.parquet"
    weights, _ = save_small_encoder(tmp_path / "w.safetensors")
    write_embeddings(weights, str(pictures), path, split="val")
    file = shutil.copy(pictures / "val" / "temple" / "05.jpg", tmp_path / "copy.jpg")
    moved = shutil.move(weights, tmp_path / "moved.safetensors")
    with user_error("not-found", weights, "--run"):
        search(path, [file])
    assert search(path, ["val/temple/05.jpg"])["queries"]  # needs no weights
    assert search(path, [file], moved)["queries"][0]["neighbors"][0]["path"] == "val/temple/05.jpg"
    save_small_encoder(weights, seed=1)
    with user_error("mismatch", weights, path, "--run"):
        search(path, [file])
    with user_error("not-found", tmp_path / "none"):
        search(path, [file], tmp_path / "none")


def test_other_tables_raise(table, tmp_path):
    path, whole = tmp_path / "t.parquet", pq.read_table(table)
    with user_error("not-found", path):
        search(path, [0])
    path.write_bytes(b"PAR1 but no table PAR1")
    with user_error("damaged", path):
        search(path, [0])
    for other in (pa.table({"embedding": [[1.0, 2.0]]}), whole.drop_columns(["index"])):
        pq.write_table(other, path)
        with user_error("unsupported", path):
            search(path, [0])
    rows = stacked_rows(whole).copy()
    replace_embeddings(table, path, [None, *rows[1:].tolist()])
    with user_error("damaged", path):
        search(path, [0])
    rows[40, 3] = np.inf
    replace_embeddings(table, path, rows.tolist())
    with user_error("not-finite", path, "Row 40"):
        search(path, [0])


@pytest.mark.parametrize("damage", ["cut", "pages", "footer"])
def test_damaged_tables_are_read_correctly_or_raise(table, tmp_path, damage):
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
    assert refused >= {"cut": 200, "pages": 130, "footer": 50}[damage]


def _all(path):
    opened = EmbeddingTable(path)
    return opened.unit_embeddings(), opened.rows(range(len(opened)))
