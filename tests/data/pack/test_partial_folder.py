"""A pack that fails, is stopped or reads back other bytes loses nothing and leaves nothing."""

import errno
import os
import re
from multiprocessing import get_context

import pytest
from expect import user_error
from packed_folder import contents

from localagg.data import open_images
from localagg.data.pack import process_images
from localagg.data.pack.pack_dataset import pack
from localagg.data.pack.partial_folder import PartialFolder
from localagg.data.pack.process_images import process_image
from localagg.data.sources.image_folder import ImageFolder
from localagg.errors import Interrupted, UserError

FORMATS = ("arrow", "tfrecord", "webdataset")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt()])
def test_a_failed_pack_continues_after_its_finished_files(
    pictures, tmp_path, monkeypatch, format, error, capsys
):
    """The first fails at image 30 of 48, after one file of three. The second packs the rest."""
    calls = []

    def count(source, index, shrink, fail_at=0):
        calls.append(index)
        if len(calls) == fail_at:
            raise error
        return process_image(source, index, shrink)

    uri, folder = str(pictures / "train"), tmp_path / "packed"
    options = {"format": format, "shard_bytes": 60_000 if format == "webdataset" else 25_000}
    whole = pack(uri, tmp_path / "whole", **options)
    assert 48 // len(whole["splits"]["train"]["files"]) < 30
    monkeypatch.setattr(process_images, "process_image", lambda *a, **k: count(*a, **k, fail_at=30))
    if isinstance(error, OSError):
        with user_error("environment", uri, "disk full", folder.with_suffix(".partial")):
            pack(uri, folder, **options)
    else:
        with pytest.raises(Interrupted, match=r"packed\.partial"):
            pack(uri, folder, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["packed.partial", "whole"]
    with user_error("mismatch", "packed.partial"):
        pack(uri, folder, format=format, shard_bytes=10_000)
    calls.clear()
    monkeypatch.setattr(process_images, "process_image", count)
    pack(uri, folder, **options)
    assert 18 <= len(calls) < 48
    assert re.search(r"\d+ files? finished", " ".join(capsys.readouterr().err.split()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["packed", "whole"]
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_pack_without_finished_files_leaves_nothing(pictures, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(process_images, "process_image", stop)
    with pytest.raises(Interrupted):
        pack(str(pictures), tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []


def test_lost_images_are_read_again_by_the_next_pack(pictures, tmp_path, monkeypatch):
    real = ImageFolder.__getitem__

    def lose(self, index):
        if index == 2:
            raise OSError(errno.EIO, "Input/output error")
        return real(self, index)

    uri, folder = str(pictures / "val"), tmp_path / "packed"
    monkeypatch.setattr(ImageFolder, "fingerprint", lambda self: "the same")
    with monkeypatch.context() as patch:
        patch.setattr(ImageFolder, "__getitem__", lose)
        patch.setattr(PartialFolder, "finish", lambda self: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            pack(uri, folder)
    assert pack(uri, folder)["splits"]["train"]["unreadable"] == []
    assert open_images(folder)[2].image == open_images(uri)[2].image


@pytest.mark.parametrize("format", FORMATS)
def test_the_bytes_do_not_depend_on_the_workers(pictures, tmp_path, format):
    options = {"format": format, "shard_bytes": 20_000, "size": 40, "verify": True}
    for workers in (0, 1, 3):
        pack(str(pictures), tmp_path / str(workers), **options, workers=workers)
    alone = contents(tmp_path / "0")
    assert len(alone) > 4
    assert contents(tmp_path / "1") == contents(tmp_path / "3") == alone


def test_two_processes_do_not_pack_into_one_folder(pictures, tmp_path):
    def hold(ready, go):
        partial = PartialFolder(tmp_path / "packed", {"data": "", "format": "", "shrink": None})
        with partial.open():
            partial.finished.add("something")
            ready.set()
            go.wait(60)

    fork = get_context("fork")
    ready, go = fork.Event(), fork.Event()
    other = fork.Process(target=hold, args=(ready, go))
    other.start()
    assert ready.wait(60)
    key = tmp_path / "packed.partial" / "state" / "key.json"
    key.write_text('{"data": "", "format": "", "shrink": null, "splits": {}}')
    with pytest.raises(UserError, match=str(other.pid)):
        pack(str(pictures), tmp_path / "packed")
    go.set()
    other.join()
    assert (tmp_path / "packed.partial" / "data").is_dir()


@pytest.mark.parametrize(
    "name", ["photo.jpg", "data/photo.jpg", "state/key.json", "lock", ".lock", "state/er"]
)
@pytest.mark.parametrize("packed_before", [False, True])
def test_a_folder_that_no_pack_made_stays_untouched(pictures, tmp_path, name, packed_before):
    """It has the name that the unfinished pack would have."""
    uri, destination = str(pictures / "val"), tmp_path / "packed"
    if packed_before:
        pack(uri, destination)
    mine = tmp_path / "packed.partial" / name
    mine.parent.mkdir(parents=True)
    mine.write_text('{"data": "mine"}')
    with user_error("exists", "packed" if packed_before else "packed.partial"):
        pack(uri, destination)
    assert mine.read_text() == '{"data": "mine"}'
    assert [path.name for path in mine.parent.iterdir()] == [mine.name]
    assert packed_before == destination.exists()


def test_files_put_beside_a_pack_at_work_stay(pictures, tmp_path, monkeypatch):
    mine, real = tmp_path / "packed.partial" / "notes.txt", PartialFolder.add

    def put(self, *arguments):
        mine.write_text("mine")
        real(self, *arguments)

    monkeypatch.setattr(PartialFolder, "add", put)
    pack(str(pictures / "val"), tmp_path / "packed")
    assert list(mine.parent.iterdir()) == [mine]


@pytest.mark.parametrize("killed_before", [0, 3, 4, 5])  # of six files
def test_a_folder_left_by_a_kill_during_removal_is_removed(
    pictures, tmp_path, monkeypatch, killed_before
):
    """In whichever order the files are removed, the rest is still recognized as a pack's."""
    uri, calls, real = str(pictures), [], os.unlink

    def unlink(path, *arguments, **options):
        if len(calls) >= killed_before:
            raise KeyboardInterrupt
        calls.append(path)
        real(path, *arguments, **options)

    def finish(self):
        os.rename(self.folder, self.destination)
        monkeypatch.setattr(os, "unlink", unlink)

    monkeypatch.setattr(PartialFolder, "finish", finish)
    with pytest.raises(Interrupted):
        pack(uri, tmp_path / "packed")
    monkeypatch.undo()
    assert (tmp_path / "packed.partial").exists()
    with user_error("exists", tmp_path / "packed"):
        pack(uri, tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_a_pack_of_the_version_before_continues(pictures, tmp_path, monkeypatch):
    """Its lock had another name."""
    uri, folder = str(pictures / "train"), tmp_path / "packed"
    with monkeypatch.context() as patch:
        patch.setattr(PartialFolder, "finish", lambda self: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            pack(uri, folder)
    partial = tmp_path / "packed.partial"
    (partial / ".lock").unlink()
    (partial / "lock").touch()
    assert pack(uri, folder)["images"] == 48
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


@pytest.mark.parametrize("format", FORMATS)
def test_verify_finds_changed_images_and_packs_their_file_again(
    pictures, tmp_path, monkeypatch, format
):
    """A bit of an image is flipped on the disk behind the back of the writer."""
    source, real = open_images(pictures), PartialFolder.add

    def damage(self, name, facts, digests):
        path = self.folder / name
        data = bytearray(path.read_bytes())
        if (at := data.find(source[7].image)) >= 0:
            data[at + 100] ^= 1
            path.write_bytes(data)
        real(self, name, facts, digests)

    options = {"format": format, "shard_bytes": 20_000}
    uri = str(pictures / "train")
    monkeypatch.setattr(PartialFolder, "add", damage)
    if format == "tfrecord":  # its checksums are verified in any case
        with user_error("damaged", "train-0000"):
            pack(uri, tmp_path / "packed", **options)
    else:
        pack(uri, tmp_path / "unverified", **options)
        with user_error("damaged", "flower/07.jpg"):
            pack(uri, tmp_path / "packed", **options, verify=True)
        assert not (tmp_path / "packed").exists()
    monkeypatch.setattr(PartialFolder, "add", real)
    assert pack(uri, tmp_path / "packed", **options, verify=True)["verified"]
    assert open_images(tmp_path / "packed")[7].image == source[7].image
