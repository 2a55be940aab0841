"""A table that grows equals one embedded anew, and only missing images are embedded."""

import shutil

import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
from expect import user_error

from embeddings import interrupt_after, save_small_encoder, stacked_rows
from localagg.embeddings.duplicates import find_duplicates
from localagg.embeddings.search import search
from localagg.embeddings.table import EmbeddingTable
from localagg.embeddings.tables.write_table import write_embeddings
from localagg.errors import Interrupted


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_small_encoder(tmp_path_factory.mktemp("weights") / "w.safetensors")[0]


@pytest.fixture
def grown(pictures, weights, tmp_path):
    """A folder, its table, and changes: four files come, one goes, moves, and changes each."""
    folder, out = tmp_path / "photos", tmp_path / "t.parquet"
    shutil.copytree(pictures / "train", folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    later = [(path, path.read_bytes()) for path in files[:4]]
    for path, _ in later:
        path.unlink()
    write_embeddings(weights, folder, out, append=True)  # makes the table
    files[4].unlink()
    files[5].rename(files[5].with_name("a-new-name" + files[5].suffix))
    files[6].write_bytes(later[0][1])
    for path, data in later[1:]:
        path.write_bytes(data)
    return folder, out


def test_a_grown_table_equals_one_embedded_anew(grown, weights, tmp_path):
    folder, out = grown
    result = write_embeddings(weights, folder, out, append=True)
    assert result["embedded"] == 4  # three came, one changed; the one that moved is known
    write_embeddings(weights, folder, tmp_path / "anew.parquet")
    grew, anew = pq.read_table(out), pq.read_table(tmp_path / "anew.parquet")
    assert result["rows"] == len(anew)
    assert grew.schema.equals(anew.schema, check_metadata=True)
    assert grew.drop(["embedding"]).equals(anew.drop(["embedding"]))
    np.testing.assert_allclose(stacked_rows(grew), stacked_rows(anew), atol=1e-6)
    assert write_embeddings(weights, folder, out, append=True)["embedded"] == 0
    assert pq.read_table(out).equals(grew)


def test_a_table_without_rows_is_neither_written_nor_read(grown, weights, tmp_path):
    folder, out = grown
    before, empty = out.read_bytes(), tmp_path / "empty.parquet"
    for path in folder.rglob("*.*"):
        path.write_bytes(b"nothing")
    with user_error("unreadable-images", folder):
        write_embeddings(weights, folder, out, append=True)
    assert out.read_bytes() == before
    pq.write_table(pq.read_table(out).slice(0, 0), empty)
    with user_error("unsupported", empty):
        EmbeddingTable(empty)


def test_growth_resumes_after_ctrl_c(grown, weights, monkeypatch):
    folder, out = grown
    before = out.read_bytes()
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(Interrupted):
            write_embeddings(weights, folder, out, append=True, batch=1)
    assert out.read_bytes() == before
    assert write_embeddings(weights, folder, out, append=True, batch=1)["resumed"] == 2


def test_another_folder_joins_and_its_images_are_found(pictures, weights, tmp_path):
    out = tmp_path / "t.parquet"
    write_embeddings(weights, pictures / "train", out)
    first = pq.read_table(out)
    shutil.copytree(pictures / "val", tmp_path / "more")
    added = write_embeddings(weights, tmp_path / "more", out, append=True)
    table = pq.read_table(out)
    assert (added["rows"], table["index"].to_pylist()) == (len(table), [*range(len(table))])
    assert table["embedding"].slice(0, len(first)).equals(first["embedding"])
    photo = next((tmp_path / "more" / "temple").iterdir())
    (query,) = search(out, [photo], k=1)["queries"]  # a row of the table, found by its file
    assert table["path"][query["index"]].as_py().endswith(f"more/temple/{photo.name}")
    assert find_duplicates(out)["images"] == len(table)
    assert write_embeddings(weights, tmp_path / "more", out, append=True)["embedded"] == 0
    assert len(pq.read_table(out)) == len(table)


def test_other_settings_and_formats_are_refused_and_the_table_stays(pictures, weights, tmp_path):
    out, data = tmp_path / "t.parquet", pictures / "val"
    write_embeddings(weights, data, out)
    before = out.read_bytes()
    other, _ = save_small_encoder(tmp_path / "other.safetensors", seed=1)
    with user_error("mismatch", out, "weights"):
        write_embeddings(other, data, out, append=True)
    with user_error("mismatch", out, "layer"):
        write_embeddings(weights, data, out, append=True, layer="1")
    with user_error("option-conflict", "--append", "t.csv"):
        write_embeddings(weights, data, tmp_path / "t.csv", append=True)
    with user_error("unsupported", out, "digits"):
        write_embeddings(weights, "digits", out, append=True)
    assert out.read_bytes() == before


def test_images_of_a_table_merged_by_pandas_are_found_beside_it(
    pictures, weights, tmp_path, monkeypatch
):
    write_embeddings(weights, pictures, tmp_path / "t.parquet")
    rows = pandas.read_parquet(tmp_path / "t.parquet")
    pandas.concat([rows, rows[:2]]).to_parquet(tmp_path / "merged.parquet")
    with user_error("not-found", "merged.parquet", rows["path"][0]):
        find_duplicates(tmp_path / "merged.parquet")
    monkeypatch.chdir(pictures)
    groups = find_duplicates(tmp_path / "merged.parquet", above=0.999)["groups"]
    assert {tuple(sorted(each["index"] for each in group)) for group in groups} >= {
        (0, len(rows)), (1, len(rows) + 1),
    }  # fmt: skip
