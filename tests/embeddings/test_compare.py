"""Neighborhoods of two tables: against naive sets, and planted changes come first."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from expect import user_error

from embeddings import blobs, save_table
from localagg.embeddings.compare import compare_tables, shared_neighbors

ROWS = blobs([40, 40, 40], spread=0.2)


@pytest.fixture
def tables(tmp_path):
    """The same images; five move to another cluster, the others a little."""
    moved = ROWS + blobs([120], spread=1.0, seed=5) * 0.02
    moved[:5] = ROWS[80:85] + 0.01
    return [save_table(tmp_path / f"{n}.parquet", each) for n, each in enumerate((ROWS, moved))]


def test_overlap_equals_naive_sets_and_moved_images_come_first(tables, tmp_path):
    found = compare_tables(*tables, k=6, top=5, out=tmp_path / "c.json")
    near = []
    for table in tables:
        rows = np.stack(pq.read_table(table)["embedding"].to_numpy()).astype(np.float64)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        cosine = rows @ rows.T
        np.fill_diagonal(cosine, -2)
        near.append(np.argsort(-cosine, axis=1)[:, :6])
    overlap = [len({*one} & {*other}) / 6 for one, other in zip(*near, strict=True)]
    assert found["overlap"] == pytest.approx(np.mean(overlap))
    assert (found["images"], found["only"], found["k"]) == (120, [0, 0], 6)
    assert found["chance"] == pytest.approx(6 / 119)
    assert {each["index"] for each in found["changed"]} == {*range(5)}
    rows = json.loads((tmp_path / "c.json").read_text())
    assert sorted(row["index"] for row in rows) == [*range(120)]
    for row in rows:
        assert row["overlap"] == pytest.approx(overlap[row["index"]])
    first = found["changed"][0]
    assert [each["index"] for each in first["before"]] == near[0][first["index"]][:5].tolist()
    assert [each["index"] for each in first["after"]] == near[1][first["index"]][:5].tolist()


def test_a_table_agrees_with_itself_and_with_its_part(tables, tmp_path):
    assert compare_tables(tables[0], tables[0])["overlap"] == 1
    part = save_table(tmp_path / "part.parquet", ROWS[:50])
    found = compare_tables(tables[0], part, k=500)
    assert (found["images"], found["only"], found["k"]) == (50, [70, 0], 49)
    assert found["overlap"] == 1


def test_shared_neighbors_count_common_numbers():
    first, second = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[3, 1, 9], [7, 8, 9]])
    assert shared_neighbors(first, second).tolist() == [2, 0]


def test_tables_of_other_images_and_invalid_options_raise(tables, tmp_path):
    other = save_table(tmp_path / "other.parquet", ROWS[:1])
    with user_error("mismatch", other, "0.jpg"):
        compare_tables(tables[0], other)
    for name in ("k", "top"):
        with user_error("option-invalid", f"--{name}", 0):
            compare_tables(*tables, **{name: 0})
