"""The embeddings of a run: computed once, and again after a change."""

import shutil

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from expect import user_error

from localagg import pretrain
from localagg.config import PretrainConfig, override
from localagg.embeddings.open_table import RUN_TABLE, open_table, open_table_images


@pytest.fixture
def run(flat, tmp_path):
    config = override(
        PretrainConfig(),
        model="resnet18_small", width=4, blocks=(1,), image_size=16, epochs=1, ir_epochs=1,
        batch_size=6, workers=0, device="cpu",
    )  # fmt: skip
    pretrain(config, str(flat), tmp_path / "run")
    return tmp_path / "run"


def test_a_run_is_embedded_once_until_its_images_change(run, flat):
    table = open_table(run)
    assert (len(table), table.path) == (12, run / RUN_TABLE)
    before = table.path.stat().st_mtime_ns
    assert open_table(str(run)).path.stat().st_mtime_ns == before
    images = open_table_images(table)
    assert [images.name(row["index"]) for row in table.rows(range(12))] == sorted(
        path.name for path in flat.iterdir()
    )
    shutil.copy(flat / "flower-00.png", flat / "more.png")
    with user_error("mismatch", flat, table.path):
        open_table_images(table)
    assert len(open_table(run)) == 13


def test_a_run_whose_images_moved_uses_its_table(run, flat, tmp_path):
    flat.rename(tmp_path / "moved")
    with user_error("not-found", run, flat, "--resume"):
        open_table(run)
    (tmp_path / "moved").rename(flat)
    open_table(run)
    flat.rename(tmp_path / "moved")
    assert len(open_table(run)) == 12
    (run / RUN_TABLE).write_bytes(b"damaged")
    with user_error("not-found", flat):
        open_table(run)


def test_images_that_became_unreadable_are_counted(run, flat, capsys):
    (flat / "flower-00.png").write_bytes((flat / "flower-00.png").read_bytes()[:100])
    assert len(open_table(run)) == 11
    assert "Left out: 1 unreadable image" in capsys.readouterr().err


def test_images_that_are_gone_since_the_training_are_counted(run, flat, capsys):
    open_table(run)
    assert "changed since" not in capsys.readouterr().err
    (flat / "flower-00.png").unlink()
    assert len(open_table(run)) == 11
    assert "11 now, 12 then" in capsys.readouterr().err


def test_a_run_s_table_that_another_program_wrote_is_kept_and_named(run):
    path = open_table(run).path
    frame = pd.read_parquet(path)
    frame["note"] = 1
    pq.write_table(pa.Table.from_pandas(frame).replace_schema_metadata(), path)
    with user_error("mismatch", path):
        open_table(run)
    assert "note" in pq.read_schema(path).names


def test_missing_tables_and_runs_raise(tmp_path):
    with user_error("not-found", "none"):
        open_table(tmp_path / "none")
    with user_error("not-found", tmp_path):
        open_table(tmp_path)
