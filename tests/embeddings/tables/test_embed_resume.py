"""Embedding through kills, Ctrl-C, full disks and damage ends in the same bytes."""

import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from expect import user_error
from killed_child import run_in_child

from embeddings import hidden_files, interrupt_after, save_small_encoder
from localagg.embeddings.tables import table_writer
from localagg.embeddings.tables.write_table import write_embeddings
from localagg.errors import Interrupted


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_small_encoder(tmp_path_factory.mktemp("weights") / "small.safetensors")


def _write_digits(weights: Path, out: Path) -> None:
    torch.set_num_threads(1)
    result = write_embeddings(weights, "digits", out, batch=32, split="train")
    out.with_suffix(".resumed").write_text(str(result["resumed"]))


RECORD = 24 + 32 * (8 + 4 * 12)  # bytes of a batch of 32
ALL = 44 * 24 + 1400 * (8 + 4 * 12)  # of 43 such batches and one of 24


@pytest.mark.slow
def test_a_job_killed_at_random_moments_writes_the_same_bytes(weights, tmp_path):
    whole, out = tmp_path / "whole.parquet", tmp_path / "e.parquet"
    _write_digits(weights[0], whole)
    records = tmp_path / ".e.parquet.parts" / "batches.bin"
    draws = random.Random(0)
    status, calls = run_in_child(_write_digits, weights[0], tmp_path / "counted.parquet")
    assert status == 0
    written = [0]

    def count() -> int:
        size = records.stat().st_size if records.exists() else 0
        return size // RECORD + (size == ALL)

    for _ in range(8):
        moment = draws.randrange(calls // 6, calls // 3)  # opening is a sixth
        status, _ = run_in_child(_write_digits, weights[0], out, killed_in=moment)
        assert status == -signal.SIGKILL
        assert count() >= written[-1]
        assert not out.exists()
        written.append(count())
    assert len(set(written)) >= 5  # or the moments say little
    assert run_in_child(_write_digits, weights[0], out)[0] == 0
    assert out.with_suffix(".resumed").read_text() == str(min(written[-1] * 32, 1400))
    assert out.read_bytes() == whole.read_bytes()
    assert not hidden_files(tmp_path)


def interrupt(*_):
    raise KeyboardInterrupt


def test_ctrl_c_keeps_finished_batches(weights, pictures, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole.parquet", tmp_path / "e.parquet"
    write_embeddings(weights[0], str(pictures), whole, batch=8)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(Interrupted, match="16 of 60"):
            write_embeddings(weights[0], str(pictures), out, batch=8)
    with monkeypatch.context() as patch:  # while the table is written
        patch.setattr(table_writer, "table_schema", interrupt)
        with pytest.raises(Interrupted, match="60 of 60"):
            write_embeddings(weights[0], str(pictures), out, batch=8)
    assert not out.exists()
    result = write_embeddings(weights[0], str(pictures), out, batch=8)
    assert result["resumed"] == result["rows"] == 60
    assert out.read_bytes() == whole.read_bytes()
    assert not hidden_files(tmp_path)


@pytest.mark.parametrize("change", ["weights", "data", "dtype", "layer", "batch"])
def test_batches_of_another_job_are_not_used(weights, flat, tmp_path, monkeypatch, capsys, change):
    job = {"weights": weights[0], "data": str(flat), "batch": 4, "dtype": "float32", "layer": None}
    out, fresh = tmp_path / "e.parquet", tmp_path / "fresh.parquet"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(Interrupted):
            write_embeddings(out=out, **job)
    if change == "weights":
        job["weights"] = save_small_encoder(tmp_path / "other.safetensors", seed=1)[0]
    elif change == "data":
        shutil.copy(flat / "flower-01.jpg", flat / "zz.jpg")
    else:
        job[change] = {"dtype": "float16", "layer": "1", "batch": 3}[change]
    assert write_embeddings(out=out, **job)["resumed"] == 0
    assert "e.parquet" in capsys.readouterr().err
    write_embeddings(out=fresh, **job)
    assert out.read_bytes() == fresh.read_bytes()


def test_moved_weights_resume(weights, flat, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(Interrupted):
            write_embeddings(weights[0], str(flat), tmp_path / "e.parquet", batch=4)
    moved = shutil.copy(weights[0], tmp_path / "moved.safetensors")
    assert write_embeddings(moved, str(flat), tmp_path / "e.parquet", batch=4)["resumed"] == 4


@pytest.mark.parametrize("damage", ["cut", "values", "number", "count", "empty"])
def test_damaged_batches_are_computed_again(weights, flat, tmp_path, monkeypatch, damage):
    whole, out = tmp_path / "whole.parquet", tmp_path / "e.parquet"
    write_embeddings(weights[0], str(flat), whole, batch=4)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(Interrupted):
            write_embeddings(weights[0], str(flat), out, batch=4)
    records = tmp_path / ".e.parquet.parts" / "batches.bin"
    data = bytearray(records.read_bytes())
    second = len(data) // 3
    if damage in ("cut", "empty"):
        del data[second + 9 if damage == "cut" else 0 :]
    else:
        data[second + {"values": 90, "number": 0, "count": 12}[damage]] ^= 1
    records.write_bytes(data)
    resumed = write_embeddings(weights[0], str(flat), out, batch=4)["resumed"]
    assert resumed == (0 if damage == "empty" else 4)
    assert out.read_bytes() == whole.read_bytes()


def test_damage_while_the_job_runs_raises(weights, flat, tmp_path, monkeypatch):
    out = tmp_path / "e.parquet"

    def damage(facts):
        records = tmp_path / ".e.parquet.parts" / "batches.bin"
        os.truncate(records, records.stat().st_size - 1)
        return table_schema(facts)

    table_schema = table_writer.table_schema
    with monkeypatch.context() as patch:
        patch.setattr(table_writer, "table_schema", damage)
        with user_error("damaged", "batches.bin"):
            write_embeddings(weights[0], str(flat), out, batch=4)
    assert not out.exists()
    assert write_embeddings(weights[0], str(flat), out, batch=4)["resumed"] == 8


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_raises_and_keeps_finished_batches(weights, flat, tmp_path, monkeypatch):
    out = tmp_path / "e.parquet"
    records = tmp_path / ".e.parquet.parts" / "batches.bin"
    write, saved = table_writer.TableWriter.write, tmp_path / "saved"

    def fill_disk(self, batch, *arguments):
        if batch == 1:
            records.rename(saved)
            records.symlink_to("/dev/full")
        write(self, batch, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(table_writer.TableWriter, "write", fill_disk)
        with user_error("environment", out, "No space left on device"):
            write_embeddings(weights[0], str(flat), out, batch=4)
    saved.replace(records)
    assert write_embeddings(weights[0], str(flat), out, batch=4)["resumed"] == 4
