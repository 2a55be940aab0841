"""The reference's own TFRecords, listing and class folders, record by record."""

import hashlib
import json

import pytest
from expect import user_error
from make_tfrecords import write_tfrecords

from localagg.cli.main import main
from localagg.data import open_images
from localagg.data.images.decode import decode
from localagg.data.pack.pack_dataset import pack
from localagg.data.sources.open import stored_splits

pytestmark = pytest.mark.reference
SPLITS = [(data, split) for data in ("imagenet", "places") for split in ("train", "val")]
PREFIX = {"train": "train", "val": "validation"}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def folder(fixtures):
    return fixtures / "tfrecords"


@pytest.fixture
def expected(folder):
    return json.loads((folder / "expected.json").read_text())


def records(expected, data, split):
    """What was written, in the order of its index, with its file."""
    found = [
        {**record, "file": file}
        for file, held in expected[data].items()
        if file.startswith(PREFIX[split])
        for record in held
    ]
    return sorted(found, key=lambda record: record["index"])


@pytest.mark.parametrize(("data", "split"), SPLITS)
def test_every_record_is_exact(folder, expected, data, split):
    source = open_images(folder / data, split)
    due = records(expected, data, split)
    assert len(source) == len(due) > 3
    for i, record in enumerate(due):
        sample = source[i]
        assert (sample.index, sample.label) == (record["index"], record["label"])
        assert int(source.labels[i]) == record["label"]
        assert hashlib.sha256(sample.image).hexdigest() == record["sha256"]
        assert len(sample.image) == record["bytes"]
        assert source.name(i).startswith(record["file"] + " at byte ")


def test_empty_and_extra_files_are_among_them(folder, expected):
    assert expected["imagenet"]["validation-00003-of-00004"] == []
    assert len(expected["places"]["train-00003-00003"]) > 0
    assert stored_splits(folder / "imagenet") == ["train", "val"]


def test_what_we_write_is_what_the_reference_wrote(folder, tmp_path):
    """The whole files, byte for byte: framing, checksums, and the order of the features."""
    for split in ("train", "val"):
        source = open_images(folder / "imagenet", split)
        for name in write_tfrecords(source, tmp_path / "ours", split=split, files=4):
            ours = (tmp_path / "ours" / name).read_bytes()
            assert ours == (folder / "imagenet" / name).read_bytes()


def test_places_listing_is_what_was_packed_from_it(folder, expected, capsys):
    root = folder / "source_places"
    for split in ("train", "val"):
        source = open_images(f"{root / 'csv'}:{root}", split)
        due = {record["source"]: record for record in records(expected, "places", split)}
        assert len(source) == len(due)
        for i in range(len(source)):
            path = (source.root / source.name(i)).relative_to(folder)
            record = due.pop(str(path))
            assert source[i].label == record["label"]
            assert hashlib.sha256(source[i].image).hexdigest() == record["sha256"]
        assert due == {}
        assert source.malformed == ([6] if split == "train" else [])
    assert "lines 6 " in " ".join(capsys.readouterr().err.split())
    single = open_images(f"{root / 'csv' / 'train_places205.csv'}:{root}")
    assert single.fingerprint() == open_images(f"{root / 'csv'}:{root}").fingerprint()


def test_imagenet_class_folders_have_the_references_labels(folder, expected):
    for split in ("train", "val"):
        source = open_images(folder / "source_imagenet", split)
        due = {record["source"]: record for record in records(expected, "imagenet", split)}
        assert source.classes == sorted(source.classes)
        assert len(source) == len(due)
        for i in range(len(source)):
            record = due[str((source.root / source.name(i)).relative_to(folder))]
            assert source[i].label == record["label"]
            same = hashlib.sha256(source[i].image).hexdigest() == record["sha256"]
            assert same != record["source_reencoded"]


@pytest.mark.parametrize("kind", ["source_imagenet", "source_places/csv", "imagenet", "places"])
@pytest.mark.parametrize("format", ["arrow", "tfrecord"])
def test_packing_the_references_data_keeps_it(folder, tmp_path, kind, format):
    uri = str(folder / kind)
    if kind.endswith("csv"):
        uri += f":{folder / 'source_places'}"
    pack(uri, tmp_path / "packed", format=format, shard_bytes=9_000, verify=True)
    for split in ("train", "val"):
        source, packed = open_images(uri, split), open_images(tmp_path / "packed", split)
        assert [packed[i] for i in range(len(packed))] == [source[i] for i in range(len(source))]


@pytest.mark.parametrize(
    ("source", "written", "files"),
    [("source_imagenet", "imagenet", ("4", "4")), ("source_places", "places", ("3", "2"))],
)
def test_pack_like_reference_writes_its_records(
    folder, expected, tmp_path, capsys, source, written, files
):
    """File by file, in order: index, label, bytes. Only the CMYK image is encoded otherwise."""
    uri = str(folder / source)
    if source == "source_places":
        uri = f"{folder / source / 'csv'}:{folder / source}"
    words = ["pack", uri, str(tmp_path / "ours"), "--like", "reference"]
    assert main([*words, "--files", *files]) == 0
    unlike = []
    for split in ("train", "val"):
        ours = open_images(tmp_path / "ours", split)
        theirs = open_images(folder / written, split)
        due = records(expected, written, split)
        assert len(ours) == len(due)
        for i, record in enumerate(due):
            sample = ours[i]
            assert (sample.index, sample.label) == (record["index"], record["label"])
            assert ours.name(i).startswith(record["file"])
            if hashlib.sha256(sample.image).hexdigest() != record["sha256"]:
                unlike.append(record["source"])
                gap = decode(sample.image).int() - decode(theirs[i].image).int()
                assert gap.abs().max() <= 6
    assert [name.rpartition("/")[2] for name in unlike] in ([], ["n01739381_1309.JPEG"])
    names = {path.name for path in (tmp_path / "ours").iterdir()}
    assert set(expected[written]) <= names


def test_the_default_numbers_of_files_keep_the_order(folder, expected, tmp_path):
    uri = f"{folder / 'source_places' / 'csv'}:{folder / 'source_places'}"
    pack(uri, tmp_path / "ours", like="reference")
    ours = open_images(tmp_path / "ours", "train")
    due = records(expected, "places", "train")
    found = [hashlib.sha256(ours[i].image).hexdigest() for i in range(len(ours))]
    assert found == [record["sha256"] for record in due]


def test_pack_like_reference_refuses_what_it_cannot_keep(folder, tmp_path):
    uri, out = str(folder / "source_imagenet"), tmp_path / "x"
    for code, value, options in (
        ("option-conflict", "--format arrow", {"like": "reference", "format": "arrow"}),
        ("option-conflict", "--size", {"like": "reference", "size": 8}),
        ("option-conflict", "--seed", {"seed": 3}),
        ("option-conflict", "--files", {"files": (1, 1)}),
        ("option-invalid", "(0, 1)", {"like": "reference", "files": (0, 1)}),
    ):
        with user_error(code, value):
            pack(uri, out, **options)
    with user_error("unsupported", "imagenet"):
        pack(folder / "imagenet", out, like="reference")
    assert not out.exists()
