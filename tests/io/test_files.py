import os

import pytest
from expect import user_error

from localagg.io.files import atomic_write, check_writable, write_synced


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_keeps_the_old_file_and_removes_the_temporary_one(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail():
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert getattr(error, "filename", str(path)) == str(path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("window", [1, 7, 10, 1000])
def test_bytes_are_synced_one_window_at_a_time(tmp_path, monkeypatch, window):
    synced, fsync = [], os.fsync

    def record(handle):
        synced.append(os.fstat(handle).st_size)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", record)
    write_synced(tmp_path / "x", [b"0123456", b"", memoryview(b"789")], window=window)
    assert (tmp_path / "x").read_bytes() == b"0123456789"
    assert synced == [*range(window, 11, window), 10]


def test_an_unwritable_place_is_one_sentence_and_nothing_is_made(tmp_path):
    check_writable(tmp_path / "new" / "folder" / "file.csv")
    with user_error("environment", "too long", "shorter"):
        check_writable(tmp_path / ("n" * 300))
    with user_error("option-invalid", "name"):
        check_writable(tmp_path / "a\0b")
    (tmp_path / "file").touch()
    check_writable(tmp_path / "file" / "below")  # the command itself says that it is no folder
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
