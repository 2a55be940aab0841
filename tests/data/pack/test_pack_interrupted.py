"""pack that fails, is stopped, or does not give back what was put in: nothing is lost or left."""

import errno
import os

import pytest
from packed_folder import contents

from localagg.data import open_images
from localagg.data.images.decode import decode
from localagg.data.pack import process_images
from localagg.data.pack.pack_dataset import pack
from localagg.data.pack.partial_folder import PartialFolder
from localagg.errors import Interrupted, UserError

FORMATS = ("arrow", "tfrecord", "webdataset")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt()])
def test_a_pack_that_fails_goes_on_behind_its_finished_files(
    pictures, tmp_path, monkeypatch, format, error, capsys
):
    """The first packs 15 of 48 images: one file of three is whole. The second decodes the rest."""
    calls = []

    def fail(image):
        calls.append(image)
        if len(calls) == 30:
            raise error
        return decode(image)

    uri = str(pictures / "train")
    how = {"format": format, "shard_bytes": 60_000 if format == "webdataset" else 25_000}
    whole = pack(uri, tmp_path / "whole", **how)
    each = [48 * n // len(whole["splits"]["train"]["files"]) for n in (1, 2)]
    assert each[0] < 30
    monkeypatch.setattr(process_images, "decode", fail)
    expected = UserError if isinstance(error, OSError) else Interrupted
    with pytest.raises(expected, match=r"packed.partial': run the same command to go on"):
        pack(uri, tmp_path / "packed", **how)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["packed.partial", "whole"]
    monkeypatch.setattr(process_images, "decode", decode)
    with pytest.raises(UserError, match="an unfinished pack of other data or with other options"):
        pack(uri, tmp_path / "packed", format=format, shard_bytes=10_000)
    calls.clear()
    monkeypatch.setattr(
        process_images, "decode", lambda image: (calls.append(image), decode(image))[1]
    )
    pack(uri, tmp_path / "packed", **how, verify=False)
    assert 18 <= len(calls) < 48
    assert "Going on behind" in " ".join(capsys.readouterr().err.split())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["packed", "whole"]
    assert contents(tmp_path / "packed") == contents(tmp_path / "whole")


def test_a_pack_that_finished_nothing_leaves_nothing(pictures, tmp_path, monkeypatch):
    def stop(image):
        raise KeyboardInterrupt

    monkeypatch.setattr(process_images, "decode", stop)
    with pytest.raises(Interrupted, match="nothing was finished"):
        pack(str(pictures), tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", FORMATS)
def test_the_bytes_do_not_depend_on_the_workers(pictures, tmp_path, format):
    for workers in (0, 1, 3):
        pack(
            str(pictures),
            tmp_path / str(workers),
            format=format,
            shard_bytes=20_000,
            workers=workers,
            size=40,
            verify=True,
        )
    alone = contents(tmp_path / "0")
    assert len(alone) > 4
    assert contents(tmp_path / "1") == contents(tmp_path / "3") == alone


def test_another_process_is_not_disturbed(pictures, tmp_path):
    from multiprocessing import get_context

    def holds(ready, go):
        key = {"data": "", "format": "", "shrink": None, "splits": {}}
        with PartialFolder(tmp_path / "packed", key) as partial:
            partial.finished.add("something")
            ready.set()
            go.wait(60)

    fork = get_context("fork")
    ready, go = fork.Event(), fork.Event()
    other = fork.Process(target=holds, args=(ready, go))
    other.start()
    assert ready.wait(60)
    with pytest.raises(UserError, match="Another process is packing into"):
        pack(str(pictures), tmp_path / "packed")
    go.set()
    other.join()
    assert (tmp_path / "packed.partial" / "data").is_dir()


@pytest.mark.parametrize(
    "name", ["photo.jpg", "data/photo.jpg", "state/key.json", "lock", "state/er"]
)
@pytest.mark.parametrize("packed_before", [False, True])
def test_a_folder_that_no_pack_has_made_is_left_alone(pictures, tmp_path, name, packed_before):
    """It has the name that the unfinished pack would have."""
    uri, destination = str(pictures / "val"), tmp_path / "packed"
    if packed_before:
        pack(uri, destination)
    mine = tmp_path / "packed.partial" / name
    mine.parent.mkdir(parents=True)
    mine.write_text('{"data": "mine"}')
    told = "exists and is not empty" if packed_before else r"packed\.partial' .*no pack has made it"
    with pytest.raises(UserError, match=told):
        pack(uri, destination)
    assert mine.read_text() == '{"data": "mine"}'
    assert [path.name for path in mine.parent.iterdir()] == [mine.name]
    assert packed_before == destination.exists()


def test_what_was_put_beside_a_pack_at_work_stays(pictures, tmp_path, monkeypatch):
    mine, real = tmp_path / "packed.partial" / "notes.txt", PartialFolder.add

    def put(self, *arguments):
        mine.write_text("mine")
        real(self, *arguments)

    monkeypatch.setattr(PartialFolder, "add", put)
    pack(str(pictures / "val"), tmp_path / "packed")
    assert list(mine.parent.iterdir()) == [mine]


@pytest.mark.parametrize("killed_before", [0, 3, 4, 5])  # of six files
def test_what_a_kill_left_while_it_cleared_up_is_cleared(
    pictures, tmp_path, monkeypatch, killed_before
):
    """In whichever order the files are removed, what is left is still known for a pack's."""
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
    with pytest.raises(KeyboardInterrupt):
        pack(uri, tmp_path / "packed")
    monkeypatch.undo()
    assert (tmp_path / "packed.partial").exists()
    with pytest.raises(UserError, match="exists and is not empty"):
        pack(uri, tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


# --- Verification ---------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_verify_finds_what_came_back_differently_and_packs_that_file_again(
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

    how = {"format": format, "shard_bytes": 20_000}
    uri = str(pictures / "train")
    monkeypatch.setattr(PartialFolder, "add", damage)
    if format == "tfrecord":  # its checksums are verified in any case
        with pytest.raises(UserError, match=r"damaged at byte .* the checksum .* just written"):
            pack(uri, tmp_path / "packed", **how)
    else:
        pack(uri, tmp_path / "unverified", **how)
        with pytest.raises(UserError, match=r"flower/07.jpg was read back differently"):
            pack(uri, tmp_path / "packed", **how, verify=True)
        assert not (tmp_path / "packed").exists()
    monkeypatch.setattr(PartialFolder, "add", real)
    assert pack(uri, tmp_path / "packed", **how, verify=True)["verified"]
    assert open_images(tmp_path / "packed")[7].image == source[7].image
