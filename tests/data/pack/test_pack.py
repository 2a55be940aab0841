"""pack: every kind of source to every format and back, byte for byte."""

import errno
import hashlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from make_tfrecords import write_tfrecords
from tables import embedded

from localagg.data import open_images
from localagg.data.images.decode import decode
from localagg.data.pack.pack_dataset import pack, pack_rows
from localagg.data.sources.open import stored_splits
from localagg.errors import UserError

FORMATS = ("arrow", "tfrecord", "webdataset")
KINDS = ("folder", "parquet", "named", "saved", "hub", "tars", "listing", "tfrecord", "digits")


@pytest.fixture(scope="module")
def uris(pictures, tmp_path_factory):
    """The same pictures as every kind of source, each made without pack (but for the TFRecords)."""
    import datasets

    root = tmp_path_factory.mktemp("sources")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(pictures), cache_dir=str(root / "c"))
    for split, name in (("train", "train"), ("validation", "val")):
        (root / "parquet").mkdir(exist_ok=True)
        (root / "named").mkdir(exist_ok=True)
        embedded(loaded[split]).to_parquet(root / "parquet" / f"{name}.parquet")
        bare = loaded[split].cast_column("image", datasets.Image(decode=False))
        bare.to_parquet(root / "named" / f"{name}.parquet")  # paths only, no bytes
        lines = []
        (root / "tars").mkdir(exist_ok=True)
        with tarfile.open(root / "tars" / f"set-{name}-00.tar", "w") as tar:
            for path in sorted((pictures / name).rglob("*.*")):
                inside = path.relative_to(pictures)
                lines.append(f"{inside} {int(inside.parts[1] == 'temple')}\n")
                tar.add(path, str(inside))
                word = tarfile.TarInfo(str(inside.with_suffix(".cls")))
                word.size = len(inside.parts[1])
                tar.addfile(word, io.BytesIO(inside.parts[1].encode()))
        (root / f"{name}_list.csv").write_text("".join(lines))
        write_tfrecords(open_images(pictures, name), root / "tfrecords", split=name, files=3)
    loaded.save_to_disk(root / "saved")
    return {
        "folder": str(pictures),
        "parquet": str(root / "parquet"),
        "named": str(root / "named"),
        "saved": str(root / "saved"),
        "hub": "hf:me/pictures",
        "tars": str(root / "tars"),
        "listing": f"{root}:{pictures}",
        "tfrecord": str(root / "tfrecords"),
        "digits": "digits",
    }


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_keeps_bytes_labels_classes_order_and_splits(
    uris, kind, format, tmp_path, monkeypatch, pictures
):
    import datasets

    load, cache = datasets.load_dataset, str(tmp_path / "cache")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, config: load(str(pictures), config, cache_dir=cache)
    )
    shard = 100_000 if kind == "digits" else 20_000
    report = pack(uris[kind], tmp_path / "packed", format=format, shard_bytes=shard)
    assert stored_splits(tmp_path / "packed") == ["train", "val"]
    for split in ("train", "val"):
        source, packed = open_images(uris[kind], split), open_images(tmp_path / "packed", split)
        assert len(packed) == len(source) == report["splits"][split]["images"]
        assert packed.classes == source.classes
        assert torch.equal(packed.labels, source.labels)
        for i in range(0, len(source), 1 if kind != "digits" else 97):
            (_, image, label), (index, image_packed, label_packed) = source[i], packed[i]
            assert (index, label_packed) == (i, label)
            if kind == "digits":
                assert torch.equal(decode(image_packed), image)
            else:
                assert image_packed == image
        assert len(report["splits"][split]["files"]) > 1
    written = json.loads((tmp_path / "packed" / "pack-report.json").read_text())
    assert {**written, "destination": report["destination"], "seconds": report["seconds"]} == report
    shutil.rmtree(cache, ignore_errors=True)
    assert [p.name for p in tmp_path.iterdir()] == ["packed"]


def test_datasets_reads_what_is_packed_as_it_stands(pictures, tmp_path):
    import datasets
    import numpy as np

    pack(str(pictures), tmp_path / "packed", shard_bytes=30_000)
    loaded = datasets.load_from_disk(str(tmp_path / "packed"))
    assert list(loaded) == ["train", "val"]
    train, folder = loaded["train"], open_images(pictures)
    assert train.features["label"].names == ["flower", "temple"]
    assert train["label"][:] == folder.labels.tolist()
    for i in (0, 30, 47):
        pixels = torch.from_numpy(np.array(train[i]["image"].convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(pixels, decode(folder[i].image))
    assert train.cast_column("image", datasets.Image(decode=False))[30]["image"]["path"] == (
        folder.name(30)
    )
    shards = sorted((tmp_path / "packed" / "train").glob("data-*.arrow"))
    assert len(shards) > 2
    assert {Path(file["filename"]) for file in train.cache_files} == set(shards)  # mapped, no copy


def test_without_labels_and_splits(pictures, tmp_path):
    for format in FORMATS:
        report = pack(str(pictures / "train" / "temple"), tmp_path / format, format=format)
        packed = open_images(tmp_path / format)
        assert (packed.labels, packed.classes, packed[0].label) == (None, None, None)
        assert list(report["splits"]) == stored_splits(tmp_path / format) == ["train"]
        assert packed[5].image == (pictures / "train" / "temple" / "05.jpg").read_bytes()


@pytest.mark.parametrize("format", FORMATS)
def test_some_labels_are_packed_or_refused_before_anything_is_written(pictures, tmp_path, format):
    import datasets

    image = (pictures / "val" / "temple" / "01.jpg").read_bytes()
    kinds = datasets.ClassLabel(names=["a", "b"])
    table = datasets.Dataset.from_list(
        [{"image": {"bytes": image, "path": None}, "label": label} for label in (0, -1, 1)],
        features=datasets.Features({"image": datasets.Image(), "label": kinds}),
    )
    table.save_to_disk(tmp_path / "some")
    uri, folder = str(tmp_path / "some"), tmp_path / "packed"
    if format == "arrow":
        pack(uri, folder, format=format, verify=True)
        assert open_images(folder).labels.tolist() == [0, -1, 1]
        return
    told = (
        f"1 of 3 images in the split train of '.*some' have no label, and in {format} .* as arrow"
    )
    with pytest.raises(UserError, match=told):
        pack(uri, folder, format=format)
    assert [path.name for path in tmp_path.iterdir()] == ["some"]


def test_a_test_split_keeps_its_name_where_the_format_has_one(pictures, tmp_path):
    for name, split in (("train", "train"), ("val", "test")):
        shutil.copytree(pictures / name, tmp_path / "data" / split)
    assert list(pack(str(tmp_path / "data"), tmp_path / "a")["splits"]) == ["train", "test"]
    report = pack(str(tmp_path / "data"), tmp_path / "t", format="tfrecord", verify=True)
    assert list(report["splits"]) == ["train", "val"]
    assert len(open_images(tmp_path / "t", "val")) == 12
    shutil.copytree(pictures / "val", tmp_path / "data" / "val")
    assert list(pack(str(tmp_path / "data"), tmp_path / "b")["splits"]) == ["train", "val", "test"]
    assert pack(str(tmp_path / "data"), tmp_path / "w", format="webdataset")["images"] == 72
    assert stored_splits(tmp_path / "w") == ["train", "val", "test"]
    with pytest.raises(UserError, match="TFRecords hold train and val only; pack it as arrow"):
        pack(str(tmp_path / "data"), tmp_path / "u", format="tfrecord")


@pytest.mark.parametrize("format", FORMATS)
def test_unreadable_images_are_kept_and_named(pictures, tmp_path, format):
    shutil.copytree(pictures / "val", tmp_path / "data")
    whole = (tmp_path / "data" / "flower" / "01.jpg").read_bytes()
    (tmp_path / "data" / "flower" / "01.jpg").write_bytes(whole[:-200])
    (tmp_path / "data" / "temple" / "02.jpg").write_bytes(b"")
    (tmp_path / "data" / "temple" / "03.jpg").write_bytes(b"<html>not found</html>")
    report = pack(str(tmp_path / "data"), tmp_path / "packed", format=format, verify=True)
    facts = report["splits"]["train"]
    assert [bad["name"] for bad in facts["unreadable"]] == [
        "flower/01.jpg",
        "temple/02.jpg",
        "temple/03.jpg",
    ]
    assert facts["unreadable"][1]["reason"] == "empty file"
    assert facts["images"] == 12
    assert open_images(tmp_path / "packed")[1].image == whole[:-200]
    assert open_images(tmp_path / "packed")[8].image == b""


def test_the_report_counts(uris, pictures, tmp_path):
    report = pack(uris["folder"], tmp_path / "packed")
    files = [path for path in pictures.rglob("*") if path.is_file()]
    assert report["bytes"] == sum(path.stat().st_size for path in files)
    assert (report["images"], report["format"], report["verified"]) == (60, "arrow", False)
    assert report["splits"]["train"]["formats"] == {"JPEG": 36, "PNG": 12}
    assert report["splits"]["val"]["classes"] == 2


def test_malformed_lines_of_a_listing_are_in_the_report(pictures, tmp_path):
    (tmp_path / "a.csv").write_text("train/temple/01.jpg 1\nwhat\ntrain/flower/01.jpg 0\n")
    uri = f"{tmp_path / 'a.csv'}:{pictures}"
    report = pack(uri, tmp_path / "packed")
    assert report["splits"]["train"]["malformed_lines"] == [2]
    (tmp_path / "a.csv").write_text("train/temple/01.jpg 1\ntrain/flower/none.jpg 0\n")
    with pytest.raises(UserError, match="1 of 2 images"):
        pack(uri, tmp_path / "other")


# --- Refusals, and nothing left behind ------------------------------------------------------------


def test_a_destination_that_is_not_empty_is_refused_untouched(uris, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    with pytest.raises(UserError, match="full' exists and is not empty"):
        pack(uris["folder"], tmp_path / "full")
    with pytest.raises(UserError, match="mine' exists and is not empty"):
        pack(uris["folder"], tmp_path / "full" / "mine")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    assert pack(uris["folder"], tmp_path / "empty")["images"] == 60


def test_free_space_is_checked_first(uris, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**24))
    with pytest.raises(UserError, match=r"Packing needs .* GiB, but '.*' has 0\.02 GiB free"):
        pack(uris["folder"], tmp_path / "deep" / "packed")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**26))
    assert pack(uris["folder"], tmp_path / "deep" / "packed")["images"] == 60


# --- What is reported -----------------------------------------------------------------------------


def test_duplicates_are_named_over_all_splits(pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "data")
    train, val = tmp_path / "data" / "train", tmp_path / "data" / "val"
    shutil.copy(train / "flower" / "03.jpg", train / "temple" / "again.jpg")
    shutil.copy(train / "flower" / "03.jpg", val / "temple" / "leaked.jpg")
    shutil.copy(val / "flower" / "00.png", val / "flower" / "copy.png")
    for name in ("empty.jpg", "void.jpg"):  # not duplicates, but unreadable
        (train / "flower" / name).write_bytes(b"")
    report = pack(str(tmp_path / "data"), tmp_path / "packed", shard_bytes=9_000)
    names = [[(x["split"], x["name"]) for x in group] for group in report["duplicates"]]
    assert names == [
        [("train", "flower/03.jpg"), ("train", "temple/again.jpg"), ("val", "temple/leaked.jpg")],
        [("val", "flower/00.png"), ("val", "flower/copy.png")],
    ]
    for group in report["duplicates"]:
        found = {open_images(tmp_path / "packed", x["split"])[x["index"]].image for x in group}
        assert len(found) == 1
    rows = dict(pack_rows(report))
    assert rows["identical to another image"] == "3"
    assert rows["  unreadable"] == "0"  # of val, the last split
    assert rows["all of them are named in"] == "pack-report.json"


@pytest.mark.parametrize("format", FORMATS)
def test_files_that_cannot_be_read_keep_their_index_and_are_tried_again(
    pictures, tmp_path, format, monkeypatch
):
    shutil.copytree(pictures / "val", tmp_path / "data")
    gone = tmp_path / "data" / "flower" / "02.jpg"
    gone.unlink()
    gone.symlink_to(tmp_path / "nowhere.jpg")
    with monkeypatch.context() as patch:
        patch.setattr("localagg.data.pack.partial_folder.PartialFolder.finish", lambda self: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            pack(str(tmp_path / "data"), tmp_path / "packed", format=format)
    report = pack(str(tmp_path / "data"), tmp_path / "packed", format=format, verify=True)
    (bad,) = report["splits"]["train"]["unreadable"]
    assert bad == {"index": 2, "name": "flower/02.jpg", "reason": "No such file or directory"}
    packed = open_images(tmp_path / "packed")
    assert (len(packed), packed[2].image, packed[2].label) == (12, b"", 0)
    assert packed[3].image == (tmp_path / "data" / "flower" / "03.jpg").read_bytes()


def test_a_vanished_disk_is_no_folder_of_unreadable_images(pictures, tmp_path, monkeypatch):
    from localagg.data.sources.image_folder import ImageFolder

    def vanished(self, index):
        raise OSError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr("localagg.data.sources.source._FINGERPRINT_SAMPLES", 0)
    monkeypatch.setattr(ImageFolder, "__getitem__", vanished)
    with pytest.raises(
        UserError, match=r"flower/00.png and the 15 images behind it cannot be read"
    ):
        pack(str(pictures), tmp_path / "packed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "zip"}, "no format 'zip'; there are arrow, tfrecord, webdataset"),
        ({"shard_bytes": 0}, "0 bytes are too small"),
        ({"quality": 90}, "--quality goes with --size"),
        ({"size": 0}, "--size 0 --quality 95 cannot be"),
        ({"size": 9, "quality": 101}, "a quality 1 to 100"),
    ],
)
def test_wrong_options_are_refused(uris, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        pack(uris["folder"], tmp_path / "packed", **options)
    assert list(tmp_path.iterdir()) == []


# --- Other programs read it -----------------------------------------------------------------------


def test_pythons_tarfile_and_datasets_read_the_tars(pictures, tmp_path):
    import datasets

    report = pack(str(pictures), tmp_path / "w", format="webdataset", shard_bytes=60_000)
    files = report["splits"]["train"]["files"]
    assert files == [f"train-{n:06d}.tar" for n in range(len(files))]
    found = {}
    for name in files:
        with tarfile.open(tmp_path / "w" / name) as tar:
            for member in tar:
                found[member.name] = tar.extractfile(member).read()
    folder = open_images(pictures)
    due = {}
    for i in range(48):
        due[f"{i:09d}{Path(folder.name(i)).suffix}"] = folder[i].image
        due[f"{i:09d}.cls"] = str(folder[i].label).encode()
    assert found == due
    # It takes its columns from the first few samples, so that all must be of one format.
    shutil.copytree(pictures / "val", tmp_path / "jpegs", ignore=shutil.ignore_patterns("*.png"))
    pack(str(tmp_path / "jpegs"), tmp_path / "j", format="webdataset")
    files = {"train": str(tmp_path / "j" / "train-000000.tar")}
    cache = str(tmp_path / "cache")
    loaded = datasets.load_dataset("webdataset", data_files=files, cache_dir=cache, split="train")
    assert loaded["cls"][:] == open_images(tmp_path / "jpegs").labels.tolist()
    images = loaded.cast_column("jpg", datasets.Image(decode=False))["jpg"][:]
    due = [path.read_bytes() for path in sorted((tmp_path / "jpegs").rglob("*.jpg"))]
    assert [image["bytes"] for image in images] == due


def test_the_hashes_are_of_the_images(pictures, tmp_path, monkeypatch):
    from localagg.data.pack.partial_folder import PartialFolder

    seen, real = [], PartialFolder.add
    monkeypatch.setattr(
        PartialFolder,
        "add",
        lambda s, name, facts, digests: (seen.extend(digests), real(s, name, facts, digests)),
    )
    pack(str(pictures / "val"), tmp_path / "p", workers=1)
    source = open_images(pictures, "val")
    assert seen == [hashlib.sha256(source[i].image).digest() for i in range(12)]
    assert os.listdir(tmp_path) == ["p"]
