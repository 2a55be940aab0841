"""Tables that pandas merged are searched, for their own rows and, with the weights, for files."""

import pandas
import pytest
from expect import user_error

from embeddings import save_small_encoder
from localagg.embeddings.search import search
from localagg.embeddings.tables.write_table import write_embeddings


def test_rows_merged_by_pandas_are_searched(pictures, tmp_path):
    weights, _ = save_small_encoder(tmp_path / "w.safetensors")
    parts = []
    for split in ("train", "val"):
        write_embeddings(weights, str(pictures), tmp_path / f"{split}.parquet", split=split)
        parts.append(pandas.read_parquet(tmp_path / f"{split}.parquet"))
    merged = tmp_path / "merged.parquet"
    pandas.concat(parts, ignore_index=True).to_parquet(merged)
    name = parts[1]["path"][0]
    found = search(merged, [name], k=3)
    assert (found["rows"], len(found["queries"][0]["neighbors"])) == (60, 3)
    photo = pictures / name
    (query,) = search(merged, [photo], weights, k=1)["queries"]
    assert query["neighbors"][0]["path"] == name
    assert query["neighbors"][0]["similarity"] == pytest.approx(1, abs=1e-5)
    with user_error("option-missing", merged, "--run"):
        search(merged, [photo])
