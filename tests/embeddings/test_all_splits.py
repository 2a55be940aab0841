"""Tables of all splits: rows, names and labels of each, and paths that lead to the files."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from expect import user_error

from embeddings import save_small_encoder, stacked_rows
from localagg.data.sources.open import open_images
from localagg.embeddings.all_splits import open_splits
from localagg.embeddings.table import EmbeddingTable
from localagg.embeddings.tables.write_table import write_embeddings


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_small_encoder(tmp_path_factory.mktemp("weights") / "small.safetensors")


def test_all_splits_follow_one_another_and_rows_equal_those_of_each(weights, pictures, tmp_path):
    result = write_embeddings(weights[0], pictures, tmp_path / "all.parquet")
    assert result["splits"] == {"train": 48, "val": 12}
    assert (result["rows"], result["split"]) == (60, "all")
    whole = pq.read_table(tmp_path / "all.parquet").to_pydict()
    assert whole["split"] == ["train"] * 48 + ["val"] * 12
    assert whole["index"] == list(range(60))
    for split, rows in (("train", slice(0, 48)), ("val", slice(48, 60))):
        source = open_images(pictures, split)
        names = [f"{split}/{source.name(i)}" for i in range(len(source))]
        assert whole["path"][rows] == names
        assert whole["label"][rows] == [source.classes[i] for i in source.labels]
        write_embeddings(weights[0], pictures, tmp_path / "one.parquet", split=split)
        one = pq.read_table(tmp_path / "one.parquet")
        assert one["path"].to_pylist() == names
        np.testing.assert_allclose(stacked_rows(one), whole["embedding"][rows], atol=1e-6)


def test_paths_lead_to_the_files_also_after_both_moved(weights, pictures, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(pictures, home / "photos")
    write_embeddings(weights[0], home / "photos", home / "e.parquet")
    for _ in range(2):
        table = EmbeddingTable(home / "e.parquet")
        assert table.image_file(0).read_bytes() == (pictures / "train/flower/00.png").read_bytes()
        assert table.image_file(59).read_bytes() == (pictures / "val/temple/05.jpg").read_bytes()
        home = home.rename(tmp_path / "moved")
    shutil.rmtree(home / "photos")
    assert EmbeddingTable(home / "e.parquet").image_file(0) is None


def test_a_listing_has_the_root_of_its_files(weights, flat, tmp_path):
    listing = tmp_path / "train_list.csv"
    listing.write_text("flower-00.png 0\ntemple-01.jpg 1\n")
    write_embeddings(weights[0], f"{listing}:{flat}", tmp_path / "e.parquet")
    table = EmbeddingTable(tmp_path / "e.parquet")
    assert table.facts["root"] == str(flat)
    assert table.image_file(1) == flat / "temple-01.jpg"


def test_records_without_files_have_no_root(weights, tmp_path):
    assert write_embeddings(weights[0], "digits", tmp_path / "e.parquet")["rows"] == 1797
    table = EmbeddingTable(tmp_path / "e.parquet")
    assert table.facts["root"] is None
    assert table.image_file(0) is None


def test_classes_are_joined_by_name(pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "p")
    shutil.rmtree(tmp_path / "p/train/flower")
    (tmp_path / "p/train/arch").mkdir()
    shutil.copy(tmp_path / "p/train/temple/00.png", tmp_path / "p/train/arch")
    joined = open_splits(str(tmp_path / "p"), "all")
    names = [joined.classes[i] for i in joined.labels]
    assert names == ["arch"] + ["temple"] * 24 + ["flower"] * 6 + ["temple"] * 6
    assert [joined[i].label for i in (0, 25, 36)] == joined.labels[[0, 25, 36]].tolist()


def test_a_missing_split_raises(flat):
    with user_error("not-found", "val"):
        open_splits(str(flat), "val")
