"""TFRecords made by the definition of their format, and damage of every kind."""

import json
import os
import pickle
import struct

import fuzz
import numpy as np
import pytest
from expect import user_error
from make_tfrecords import example, framed, record, write_tfrecords
from safetensors import safe_open
from safetensors.numpy import save

from localagg.data import open_evaluation, open_images
from localagg.data.sources.source import ImageRecord
from localagg.data.sources.tfrecords import tfrecord_index
from localagg.data.sources.tfrecords.tfrecord import write_tfrecord


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
    assert contents(pickle.loads(pickle.dumps(source))) == contents(source)
    assert [source[i].index for i in range(3)] == [0, 1, 2]
    assert source.labels.tolist() == [0, 4, 1]
    assert source.classes == ["0", "1", "2", "3", "4"]
    assert source.name(2) == "train-00000-of-00003 at byte 0"
    assert open_evaluation(folder) is None
    with pytest.raises(IndexError):
        source[3]


def test_places_has_one_more_file_than_its_names_say(tmp_path):
    write(tmp_path / "train-00000-00001", example(b"a", 0, 0))
    write(tmp_path / "train-00001-00001", example(b"b", 1, 1))
    write(tmp_path / "validation-00000-00001", example(b"c", 1, 0))
    assert contents(open_images(tmp_path)) == [(b"a", 0), (b"b", 1)]
    assert contents(open_evaluation(tmp_path)) == [(b"c", 1)]


@pytest.mark.parametrize("label", [None, -1])
def test_without_labels_and_index_the_order_is_that_of_the_records(tmp_path, label):
    write(tmp_path / "train-00000-of-00001", example(b"a", label), example(b"b", label))
    source = open_images(tmp_path)
    assert contents(source) == [(b"a", None), (b"b", None)]
    assert (source.labels, source.classes) == (None, None)


def test_many_records_in_many_files_are_put_in_order(tmp_path):
    order = np.random.RandomState(0).permutation(500)
    for number, part in enumerate(np.array_split(order, 7)):
        write(
            tmp_path / f"train-{number:05d}-of-00007",
            *(example(f"image {i}".encode(), int(i) % 11, int(i)) for i in part),
        )
    expected = [(f"image {i}".encode(), i % 11) for i in range(500)]
    assert contents(open_images(tmp_path)) == expected


def test_the_fingerprint_covers_all_content_but_not_its_layout(folder, tmp_path):
    first = open_images(folder).fingerprint()
    moved = tmp_path / "moved"
    moved.mkdir()
    records = [example(b"zero", 0, 0), example(b"one" * 99, 4, 1), example(b"two", 1, 2)]
    write(moved / "train-00000-of-00001", *records)
    assert open_images(moved).fingerprint() == first
    write(moved / "train-00000-of-00001", *records[:2], example(b"twO", 1, 2))
    assert open_images(moved).fingerprint() != first


# --- Damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [3, 8, 20, -1], ids=["length", "its checksum", "data", "theirs"])
def test_a_flipped_byte_is_reported_with_file_and_offset(folder, place):
    path = folder / "train-00000-of-00003"
    whole = bytearray(path.read_bytes())
    start = 16 + len(example(b"two", 1, 2))  # of the second record
    whole[place if place < 0 else start + place] ^= 0x40
    path.write_bytes(whole)
    with user_error("damaged", path, f"byte {start}:", "checksum"):
        open_images(folder)


@pytest.mark.parametrize("size", [-1, -5, -30, 7])
def test_a_truncated_file_is_reported(folder, size):
    path = folder / "train-00001-of-00003"
    os.truncate(path, size if size > 0 else path.stat().st_size + size)
    with user_error("damaged", path, "byte 0:"):
        open_images(folder)


def test_damage_after_opening_is_found_on_reading(folder):
    source = open_images(folder)
    path = folder / "train-00001-of-00003"
    whole = bytearray(path.read_bytes())
    whole[40] ^= 1
    path.write_bytes(whole)
    assert source[0].image == b"zero"
    with user_error("damaged", path, "byte 0:"):
        source[1]
    write(path, example(b"one" * 99, 4, 0))
    with user_error("mismatch", path, "index 0", "before 1"):
        source[1]


@pytest.mark.parametrize("length", [2**28 + 1, 2**40, 2**64 - 1])
def test_a_wrong_length_allocates_nothing(tmp_path, length):
    path = tmp_path / "train-00000-of-00001"
    path.write_bytes(record(struct.pack("<Q", length), bytes(99)))
    with user_error("damaged", path, f"{length:,} bytes"):
        open_images(tmp_path)


@pytest.mark.parametrize(
    ("records", "code", "value"),
    [
        ([example(b"a", 0, 0), example(b"b", 0, 0)], "mismatch", "index 0 a second time"),
        ([example(b"a", 0, 0), example(b"b", 0, 2)], "mismatch", "2 but no record stores 1"),
        ([example(b"a", 0, -1), example(b"b", 0, 0)], "mismatch", "-1 but no record stores 0"),
        ([example(b"a", 0, 0), example(b"b", 0)], "damaged", "stores no index"),
        ([example(b"a", 0, 0), example(b"b", -5, 1)], "damaged", "label -5"),
        ([example(b"a", 2**40, 0)], "damaged", "label 1099511627776"),
        ([b"no example"], "unsupported", "byte 0"),
        ([], "no-images", "train"),
    ],
)
def test_invalid_indices_labels_and_records_raise(tmp_path, records, code, value):
    write(tmp_path / "train-00000-of-00001", *records)
    with user_error(code, tmp_path, value):
        open_images(tmp_path)


def test_missing_and_mixed_files_are_named(folder):
    (folder / "train-00001-of-00003").rename(folder / "kept")
    with user_error("not-found", folder, "number 1"):
        open_images(folder)
    (folder / "kept").rename(folder / "train-00001-00002")
    with user_error("mismatch", folder, "train-00000-of-00003"):
        open_images(folder)


def test_changed_files_are_read_correctly_or_raise():
    tally = fuzz.fuzz(fuzz.TARGETS["tfrecords"](), range(1000), seed=1)
    assert tally.findings == []
    # The test is worth its time only if all three happen often.
    assert tally.outcomes["right"] > 5
    assert tally.outcomes["refused"] > 300
    assert tally.outcomes["other values"] > 5


# --- The cached index -----------------------------------------------------------------------------


@pytest.fixture
def built(monkeypatch):
    """Names of the splits whose index was built, one by one."""
    real, calls = tfrecord_index.build_index, []

    def build(folder, files):
        calls.append(files[0])
        return real(folder, files)

    monkeypatch.setattr(tfrecord_index, "build_index", build)
    return calls


def test_the_index_is_built_once_and_again_when_a_file_changes(folder, built, home):
    first, again = open_images(folder), open_images(folder)
    assert len(built) == 1
    assert contents(again) == contents(first)
    assert again.fingerprint() == first.fingerprint()
    write(folder / "train-00001-of-00003", example(b"another", 4, 1))
    assert open_images(folder)[1].image == b"another"
    path = folder / "train-00001-of-00003"
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    open_images(folder)
    assert len(built) == 3
    assert not home.exists()


def test_a_read_only_folder_stays_unchanged(folder, built, home):
    folder.chmod(0o555)
    before = sorted(path.name for path in folder.iterdir())
    try:
        assert contents(open_images(folder)) == contents(open_images(folder))
        assert sorted(path.name for path in folder.iterdir()) == before
    finally:
        folder.chmod(0o755)
    assert len(built) == 1
    assert len(list(home.rglob("*.safetensors"))) == 1


def test_without_a_writable_folder_the_index_is_built_each_time(folder, built, monkeypatch, capsys):
    def fail(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "replace", fail)
    assert contents(open_images(folder)) == contents(open_images(folder))
    assert len(built) == 2
    assert str(folder) in "".join(capsys.readouterr().err.split())
    assert not list(folder.glob(".localagg*"))


@pytest.mark.parametrize("damage", ["empty", "junk", "cut", "column", "dtype", "file", "offset"])
def test_a_damaged_cache_is_built_again(folder, built, damage):
    expected = contents(open_images(folder))
    cache = folder / ".localagg-index-train.safetensors"
    content = {"empty": b"", "junk": b"junk" * 50, "cut": cache.read_bytes()[:-9]}
    if damage in content:
        cache.write_bytes(content[damage])
    else:
        with safe_open(cache, "np") as stored:
            columns, key = {n: stored.get_tensor(n) for n in stored.keys()}, stored.metadata()  # noqa: SIM118
        columns["file" if damage == "file" else "offset"] += 99
        if damage == "dtype":
            columns["offset"] = columns["offset"].astype("int32")
        if damage == "column":
            del columns["length"]
        cache.write_bytes(save(columns, key))
    assert contents(open_images(folder)) == expected
    assert len(built) == 2


# --- Writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [1, 3, 4, 20])
def test_written_files_read_back_and_follow_the_format(pictures, tmp_path, files):
    folder = open_images(pictures, "val")
    names = write_tfrecords(folder, tmp_path, split="val", files=files)
    assert names == [f"validation-{i:05d}-of-{files:05d}" for i in range(files)]
    assert contents(open_images(tmp_path, "val")) == contents(folder)
    records = [example(image, label, i) for i, (image, label) in enumerate(contents(folder))]
    each = -(-12 // files)
    for number, name in enumerate(names):
        due = framed(*records[number * each : (number + 1) * each])
        assert (tmp_path / name).read_bytes() == due


def test_an_image_over_the_limit_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("localagg.data.sources.tfrecords.tfrecord.RECORD_LIMIT", 20)
    with user_error("too-large", "large.png", "21"):
        write_tfrecord(tmp_path / "t", [ImageRecord(0, "large.png", bytes(21), None)])


def test_class_names_must_cover_the_labels(folder):
    names = folder / "classes-train.json"
    names.write_text(json.dumps(["a", "b", "c", "d", "e"]))
    assert open_images(folder).classes == ["a", "b", "c", "d", "e"]
    names.write_text(json.dumps(["only one"]))
    with user_error("mismatch", names, "1 classes"):
        open_images(folder)
    for content in ('{"a": 1}', "[" * 100_000):
        names.write_text(content)
        with user_error("damaged", names):
            open_images(folder)
