"""TFRecords: Google's protobuf as the independent reader and writer, and damage of every kind."""

import json
import os
import pickle
import struct

import fuzz
import numpy as np
import pytest
import torch
from make_tfrecords import Example, by_protobuf, example, framed, record

from localagg.data import open_evaluation, open_images
from localagg.data.loading.workers import iterate_in_workers
from localagg.data.sources.tfrecord import write_tfrecords
from localagg.data.sources.tfrecord_index import frame
from localagg.errors import UserError


def write(path, *payloads):
    path.write_bytes(framed(*payloads))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The user's cache folder, kept out of the real one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path):
    """Three images in two files that do not lie in the order of their index, and an empty file."""
    folder = tmp_path / "tfrs"
    folder.mkdir()
    write(folder / "train-00000-of-00003", example(b"two", 1, 2), example(b"zero", 0, 0))
    write(folder / "train-00001-of-00003", example(b"one" * 99, 4, 1))
    write(folder / "train-00002-of-00003")
    return folder


def contents(source):
    return [(sample.image, sample.label) for sample in (source[i] for i in range(len(source)))]


# --- Reading --------------------------------------------------------------------------------------


def test_the_stored_index_is_the_order(folder):
    source = open_images(folder)
    assert contents(source) == [(b"zero", 0), (b"one" * 99, 4), (b"two", 1)]
    assert [source[i].index for i in range(3)] == [0, 1, 2]
    assert source.labels.tolist() == [0, 4, 1]
    assert source.classes == ["0", "1", "2", "3", "4"]
    assert source.name(2) == "train-00000-of-00003 at byte 0"
    assert open_evaluation(folder) is None


def test_a_record_is_parsed_when_it_is_indexed_and_not_when_it_is_read(folder, monkeypatch):
    source, due = open_images(folder), contents(open_images(folder))
    index = source._index
    assert [bool(start) for start in index.start] == [True] * 3
    monkeypatch.setattr(source, "_index", index._replace(start=index.start * 0 - 1))
    assert contents(source) == due  # as where an image lies in pieces

    def parsed(data, path, offset):
        raise AssertionError("parsed again")

    monkeypatch.setattr("localagg.data.sources.tfrecord.read_example", parsed)
    monkeypatch.setattr(source, "_index", index)
    assert contents(source) == due


def test_places_names_have_one_more_file_and_the_validation_is_apart(tmp_path):
    write(tmp_path / "train-00000-00001", example(b"a", 0, 0))
    write(tmp_path / "train-00001-00001", example(b"b", 1, 1))
    write(tmp_path / "validation-00000-00001", example(b"c", 1, 0))
    assert contents(open_images(tmp_path)) == [(b"a", 0), (b"b", 1)]
    assert contents(open_evaluation(tmp_path)) == [(b"c", 1)]


@pytest.mark.parametrize("label", [None, -1])
def test_without_labels_and_index_the_records_order_counts(tmp_path, label):
    write(tmp_path / "train-00000-of-00001", example(b"a", label), example(b"b", label))
    source = open_images(tmp_path)
    assert contents(source) == [(b"a", None), (b"b", None)]
    assert (source.labels, source.classes) == (None, None)


def test_many_records_over_many_files_are_put_in_order(tmp_path):
    order = np.random.RandomState(0).permutation(500)
    for number, part in enumerate(np.array_split(order, 7)):
        write(
            tmp_path / f"train-{number:05d}-of-00007",
            *(example(f"image {i}".encode(), int(i) % 11, int(i)) for i in part),
        )
    expected = [(f"image {i}".encode(), i % 11) for i in range(500)]
    assert contents(open_images(tmp_path)) == expected


class Items(torch.utils.data.Dataset):
    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.source[index].image, os.getpid()


def test_worker_processes_and_copies_read_the_same(folder):
    source = open_images(folder)
    assert contents(pickle.loads(pickle.dumps(source))) == contents(source)
    read = list(iterate_in_workers(Items(source), 2))
    assert [image for image, _ in read] == [image for image, _ in contents(source)]
    assert os.getpid() not in {process for _, process in read}


def test_the_fingerprint_is_of_all_content_and_not_of_its_layout(folder, tmp_path):
    first = open_images(folder).fingerprint()
    moved = tmp_path / "moved"
    moved.mkdir()
    records = [example(b"zero", 0, 0), example(b"one" * 99, 4, 1), example(b"two", 1, 2)]
    write(moved / "train-00000-of-00001", *records)
    assert open_images(moved).fingerprint() == first
    write(moved / "train-00000-of-00001", *records[:2], example(b"twO", 1, 2))
    assert open_images(moved).fingerprint() != first


def test_an_example_of_something_else_names_its_features(tmp_path):
    made = Example()
    made.features.feature["image/encoded"].bytes_list.value.append(b"x")
    write(tmp_path / "train-00000-of-00001", made.SerializeToString())
    with pytest.raises(UserError, match=r"at byte 0 .* other features: 'image/encoded'"):
        open_images(tmp_path)


# --- Damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "what"),
    [
        (3, "length is wrong"),  # the length
        (8, "length is wrong"),  # its checksum
        (20, "data is wrong"),  # the data
        (-1, "data is wrong"),  # its checksum
    ],
)
def test_a_flipped_byte_is_found_at_its_file_and_offset(folder, place, what):
    path = folder / "train-00000-of-00003"
    whole = bytearray(path.read_bytes())
    start = 16 + len(example(b"two", 1, 2))  # of the second record
    whole[place if place < 0 else start + place] ^= 0x40
    path.write_bytes(whole)
    with pytest.raises(
        UserError, match=f"'{path}' is damaged at byte {start}: the checksum of the record's {what}"
    ):
        open_images(folder)


@pytest.mark.parametrize("cut", [1, 5, 13, 30])
def test_a_truncated_file_is_found(folder, cut):
    path = folder / "train-00001-of-00003"
    size = path.stat().st_size
    os.truncate(path, size - cut if cut != 13 else 7)
    with pytest.raises(
        UserError, match=r"train-00001-of-00003' is damaged at byte 0: the file end"
    ):
        open_images(folder)


def test_damage_after_opening_is_found_when_it_is_read(folder):
    source = open_images(folder)
    path = folder / "train-00001-of-00003"
    whole = bytearray(path.read_bytes())
    whole[40] ^= 1
    path.write_bytes(whole)
    assert source[0].image == b"zero"
    with pytest.raises(UserError, match=r"train-00001-of-00003' is damaged at byte 0: .* data"):
        source[1]


def test_a_record_replaced_after_opening_is_found(folder):
    source = open_images(folder)
    write(folder / "train-00001-of-00003", example(b"one" * 99, 4, 0))
    with pytest.raises(UserError, match="the index 0, but 1 when it was opened"):
        source[1]


@pytest.mark.parametrize("length", [2**28 + 1, 2**40, 2**64 - 1])
def test_a_lying_length_allocates_nothing(tmp_path, length):
    (tmp_path / "train-00000-of-00001").write_bytes(record(struct.pack("<Q", length), bytes(99)))
    with pytest.raises(UserError, match=f"a record of {length:,} bytes is no image"):
        open_images(tmp_path)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([example(b"a", 0, 0), example(b"b", 0, 0)], "stores the index 0 a second time"),
        ([example(b"a", 0, 0), example(b"b", 0, 2)], "the index 2 but no record stores 1"),
        ([example(b"a", 0, -1), example(b"b", 0, 0)], "the index -1 but no record stores 0"),
        ([example(b"a", 0, 0), example(b"b", 0)], "stores no index, but other records do"),
        ([example(b"a", 0, 0), example(b"b", None, 1)], "stores no label, but other records do"),
        ([example(b"a", 0, 0), example(b"b", -5, 1)], "stores the label -5; labels are"),
        ([example(b"a", 2**40, 0)], "stores the label 1099511627776; labels are"),
        ([], "hold no records"),
    ],
)
def test_indices_and_labels_that_cannot_be_are_refused(tmp_path, records, message):
    write(tmp_path / "train-00000-of-00001", *records)
    with pytest.raises(UserError, match=message):
        open_images(tmp_path)


def test_missing_and_mixed_files_are_refused_by_name(folder):
    (folder / "train-00001-of-00003").rename(folder / "kept")
    with pytest.raises(UserError, match="lacks number 1 of its train files"):
        open_images(folder)
    (folder / "kept").rename(folder / "train-00001-00002")
    with pytest.raises(UserError, match="train files of two packings"):
        open_images(folder)


def test_a_compressed_file_is_called_no_plain_one(folder):
    import gzip

    path = folder / "train-00001-of-00003"
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(UserError, match="no plain TFRecord file"):
        open_images(folder)


# --- The cached index -----------------------------------------------------------------------------


@pytest.fixture
def built(monkeypatch):
    """Names of the splits whose index was built, one by one."""
    from localagg.data.sources import tfrecord_index

    real, calls = tfrecord_index.build_index, []

    def build(folder, files):
        calls.append(files[0])
        return real(folder, files)

    monkeypatch.setattr(tfrecord_index, "build_index", build)
    return calls


def test_the_index_is_built_once_and_again_when_a_file_changes(folder, built, home):
    first = open_images(folder)
    assert (folder / ".localagg-index-train.safetensors").exists()
    again = open_images(folder)
    assert len(built) == 1
    assert contents(again) == contents(first)
    assert again.fingerprint() == first.fingerprint()
    assert again.labels.tolist() == first.labels.tolist()
    write(folder / "train-00001-of-00003", example(b"another", 4, 1))
    assert open_images(folder)[1].image == b"another"
    path = folder / "train-00001-of-00003"
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    open_images(folder)
    assert len(built) == 3
    assert not home.exists()


def test_a_read_only_folder_stays_untouched(folder, built, home):
    folder.chmod(0o555)
    before = sorted(path.name for path in folder.iterdir())
    try:
        first = contents(open_images(folder))
        assert contents(open_images(folder)) == first
        assert sorted(path.name for path in folder.iterdir()) == before
    finally:
        folder.chmod(0o755)
    assert len(built) == 1
    assert len(list(home.rglob("*.safetensors"))) == 1


def test_where_nothing_can_be_written_the_index_is_built_each_time(
    folder, built, monkeypatch, tmp_path, capsys
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder.chmod(0o555)
    try:
        if os.access(folder, os.W_OK):  # an administrator's writes succeed whatever the mode says
            monkeypatch.setattr(os, "replace", _refuse)
        assert contents(open_images(folder)) == contents(open_images(folder))
    finally:
        folder.chmod(0o755)
    assert len(built) == 2
    assert "it is built each time" in " ".join(capsys.readouterr().err.split())
    assert not list(folder.glob(".localagg*"))


def _refuse(*_):
    raise PermissionError("read-only")


@pytest.mark.parametrize("damage", [b"", b"junk" * 50, None])
def test_a_damaged_cache_is_built_anew(folder, built, damage):
    expected = contents(open_images(folder))
    cache = folder / ".localagg-index-train.safetensors"
    cache.write_bytes(cache.read_bytes()[:-9] if damage is None else damage)
    assert contents(open_images(folder)) == expected
    assert len(built) == 2


# --- Writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [1, 3, 4, 20])
def test_what_is_written_reads_back_and_is_what_protobuf_expects(pictures, tmp_path, files):
    folder = open_images(pictures, "val")
    names = write_tfrecords(folder, tmp_path, split="val", files=files)
    assert names == [f"validation-{i:05d}-of-{files:05d}" for i in range(files)]
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".json") == names
    packed = open_images(tmp_path, "val")
    assert contents(packed) == contents(folder)
    assert packed.classes == folder.classes == ["flower", "temple"]
    assert packed.labels.tolist() == folder.labels.tolist()
    first = (tmp_path / names[0]).read_bytes()
    length = int.from_bytes(first[:8], "little")
    assert by_protobuf(first[12 : 12 + length]) == (folder[0].image, folder[0].label, 0)
    each = -(-12 // files)
    sizes = [(tmp_path / name).stat().st_size for name in names]
    assert [size > 0 for size in sizes] == [i * each < 12 for i in range(files)]


def test_a_failed_write_leaves_no_file_and_a_second_one_is_refused(pictures, tmp_path):
    source = open_images(pictures, "val")
    with pytest.raises(ZeroDivisionError):
        write_tfrecords(
            source, tmp_path, split="train", files=1, on_image=lambda i, _: 1 // (3 - i)
        )
    assert list(tmp_path.iterdir()) == []
    write_tfrecords(source, tmp_path, split="train", files=2)
    with pytest.raises(UserError, match="holds train files already"):
        write_tfrecords(source, tmp_path, split="train", files=2)
    with pytest.raises(UserError, match="no split 'test'"):
        write_tfrecords(source, tmp_path, split="test", files=2)


def test_class_names_must_cover_the_labels(pictures, tmp_path):
    write_tfrecords(open_images(pictures), tmp_path, split="train", files=1)
    names = tmp_path / "classes-train.json"
    names.write_text(json.dumps(["only one"]))
    with pytest.raises(UserError, match="names 1 classes"):
        open_images(tmp_path)
    names.write_text('{"a": 1}')
    with pytest.raises(UserError, match="not a JSON list"):
        open_images(tmp_path)
    names.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"classes-train.json' cannot be read"):
        open_images(tmp_path)


# --- Mutations ------------------------------------------------------------------------------------


def test_changed_files_are_read_right_or_refused():
    tally = fuzz.fuzz(fuzz.TARGETS["tfrecords"](), range(1500), seed=1)
    assert tally.findings == []
    # The test is worth its time only if all three happen often.
    assert tally.outcomes["right"] > 10
    assert tally.outcomes["refused"] > 500
    assert tally.outcomes["other values"] > 10


def test_our_frame_is_the_formats():
    assert frame(b"some data") == framed(b"some data")
