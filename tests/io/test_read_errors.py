import errno
import os

import pyarrow as pa
import pytest
import torch
from expect import user_error

from localagg.io.read_errors import convert_damage, read_failure
from localagg.io.sharded_tensors import find_shards, read_shards, shard_path
from localagg.io.tensor_files import save_tensors


@pytest.fixture
def shards(tmp_path):
    files = [shard_path(tmp_path, "bank", rank, 2) for rank in range(2)]
    for file in files:
        save_tensors(file, {"rows": torch.zeros(3, 4)})
    return files


@pytest.mark.parametrize(
    ("harm", "problem"), [("missing", "missing"), ("cut", "damaged"), ("folder", "folder")]
)
def test_the_damaged_file_is_named_among_those_of_all_ranks(shards, harm, problem, tmp_path):
    data = shards[1].read_bytes()
    shards[1].unlink()
    if harm == "cut":
        shards[1].write_bytes(data[:20])
    elif harm == "folder":
        shards[1].mkdir()
    with user_error("damaged", f"'{shards[1]}'", problem), convert_damage(tmp_path / "bank-*"):
        read_shards(find_shards(tmp_path, "bank"), "rows")


@pytest.mark.parametrize(
    ("error", "way"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory"),
        (pa.ArrowMemoryError("malloc of size 99999999999 failed"), "memory"),
        (pa.ArrowException("Failed to launch worker thread: Resource ..."), "ulimit -u"),
    ],
)
def test_a_whole_file_is_not_called_damaged_where_the_system_fails(error, way, shards):
    failure = read_failure(shards[0], error, "train again")
    assert failure.code == "environment"
    assert str(shards[0]) in str(failure)
    assert way in str(failure)


def test_a_file_that_may_not_be_read_is_not_called_missing(shards, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("builtins.open", refuse)  # root reads everything
    with user_error("environment", f"'{shards[0]}'", "permissions"), convert_damage(shards[0]):
        raise FileNotFoundError("No such file or directory")  # as safetensors says
