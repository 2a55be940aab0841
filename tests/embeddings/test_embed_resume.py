"""Embedding through kills, Ctrl-C and damage: the same bytes in the end."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from embeddings import clean, small, stop_after
from localagg.embeddings.embed import write_embeddings
from localagg.embeddings.table import TableWriter
from localagg.errors import Interrupted, UserError


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return small(tmp_path_factory.mktemp("weights") / "small.safetensors")


def _write_digits(weights: Path, out: Path) -> None:
    torch.set_num_threads(1)
    told = write_embeddings(weights, "digits", out, batch=32)
    out.with_suffix(".resumed").write_text(str(told["resumed"]))


def test_runs_killed_at_random_moments_end_in_the_same_bytes(weights, tmp_path):
    whole, out = tmp_path / "whole.parquet", tmp_path / "e.parquet"
    _write_digits(weights[0], whole)
    parts = tmp_path / ".e.parquet.parts"
    draws, forks = random.Random(0), multiprocessing.get_context("fork")
    kills, aim, there = 0, 0, 0
    for _ in range(40):
        process = forks.Process(target=_write_digits, args=(weights[0], out))
        process.start()
        aim = there + draws.randint(1, 8)  # 44 parts in all
        while process.is_alive() and len(list(parts.glob("0*.parquet"))) < aim:
            time.sleep(0.001)
        time.sleep(draws.uniform(0, 0.02))
        if process.is_alive():
            assert process.pid
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills, before = kills + 1, there
        there = len(list(parts.glob("0*.parquet")))
        assert there >= before
        assert not out.exists()
    assert kills >= 4
    assert out.with_suffix(".resumed").read_text() == str(min(there * 32, 1400))
    assert out.read_bytes() == whole.read_bytes()
    assert clean(tmp_path)


def test_ctrl_c_keeps_what_was_computed(weights, pictures, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole.parquet", tmp_path / "e.parquet"
    write_embeddings(weights[0], str(pictures), whole, batch=8)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted, match="after 2 of 6 batches; the same command goes on"):
            write_embeddings(weights[0], str(pictures), out, batch=8)
    with monkeypatch.context() as patch:  # and while the parts are brought together
        patch.setattr(TableWriter, "_groups", _interrupt)
        with pytest.raises(Interrupted, match="after 6 of 6"):
            write_embeddings(weights[0], str(pictures), out, batch=8)
    assert not out.exists()
    told = write_embeddings(weights[0], str(pictures), out, batch=8)
    assert told["resumed"] == told["rows"] == 48
    assert out.read_bytes() == whole.read_bytes()
    assert clean(tmp_path)


def _interrupt(self):
    raise KeyboardInterrupt


@pytest.mark.parametrize("change", ["weights", "data", "dtype", "layer", "batch"])
def test_parts_of_something_else_are_not_gone_on_with(
    weights, flat, tmp_path, monkeypatch, capsys, change
):
    job = {"weights": weights[0], "data": str(flat), "batch": 4, "dtype": "float32", "layer": None}
    out, fresh = tmp_path / "e.parquet", tmp_path / "fresh.parquet"
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Interrupted):
            write_embeddings(out=out, **job)
    if change == "weights":
        job["weights"] = small(tmp_path / "other.safetensors", seed=1)[0]
    elif change == "data":
        shutil.copy(flat / "flower-01.jpg", flat / "zz.jpg")
    else:
        job[change] = {"dtype": "float16", "layer": "1", "batch": 3}[change]
    told = write_embeddings(out=out, **job)
    assert told["resumed"] == 0
    assert "starting anew" in capsys.readouterr().err
    write_embeddings(out=fresh, **job)
    assert out.read_bytes() == fresh.read_bytes()


def test_the_same_weights_elsewhere_go_on(weights, flat, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Interrupted):
            write_embeddings(weights[0], str(flat), tmp_path / "e.parquet", batch=4)
    moved = shutil.copy(weights[0], tmp_path / "moved.safetensors")
    assert write_embeddings(moved, str(flat), tmp_path / "e.parquet", batch=4)["resumed"] == 4


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_parts_are_computed_again(weights, flat, tmp_path, monkeypatch, damage):
    whole, out = tmp_path / "whole.parquet", tmp_path / "e.parquet"
    write_embeddings(weights[0], str(flat), whole, batch=4)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted):
            write_embeddings(weights[0], str(flat), out, batch=4)
    part = tmp_path / ".e.parquet.parts" / "000000001.parquet"
    data = bytearray(part.read_bytes())
    if damage == "flipped":
        page = pq.read_metadata(part).row_group(0).column(0).data_page_offset
        data[page + 40] ^= 1
        part.write_bytes(data)
        with pytest.raises(UserError, match=r"damaged on the disk .*computes it again"):
            write_embeddings(weights[0], str(flat), out, batch=4)
    else:
        part.write_bytes(data[:-9] if damage == "cut" else b"")
    assert write_embeddings(weights[0], str(flat), out, batch=4)["resumed"] == 4
    assert out.read_bytes() == whole.read_bytes()
