"""pack: every kind of source to every format and back, byte for byte."""

import errno
import io
import json
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from expect import user_error
from make_tfrecords import write_tfrecords
from packed_folder import save_splits
from tables import embedded

from localagg.data import open_images
from localagg.data.images.decode import decode
from localagg.data.pack.pack_dataset import pack, pack_rows
from localagg.data.sources.image_folder import ImageFolder
from localagg.data.sources.open import stored_splits
from localagg.errors import UserError

FORMATS = ("arrow", "tfrecord", "webdataset")
KINDS = ("parquet", "paths", "saved", "hub", "tars", "listing", "tfrecord")


@pytest.fixture(scope="module")
def uris(pictures, tmp_path_factory):
    """The same pictures as every kind of source, each made without pack (but for the TFRecords)."""
    root = tmp_path_factory.mktemp("sources")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(pictures), cache_dir=str(root / "c"))
    for folder in ("parquet", "paths", "tars"):
        (root / folder).mkdir()
    for split, name in (("train", "train"), ("validation", "val")):
        embedded(loaded[split]).to_parquet(root / "parquet" / f"{name}.parquet")
        bare = loaded[split].cast_column("image", datasets.Image(decode=False))
        bare.to_parquet(root / "paths" / f"{name}.parquet")  # paths only, no bytes
        lines = []
        with tarfile.open(root / "tars" / f"set-{name}-00.tar", "w") as tar:
            for path in sorted((pictures / name).rglob("*.*")):
                inside = path.relative_to(pictures)
                lines.append(f"{inside} {int(inside.parts[1] == 'temple')}\n")
                tar.add(path, str(inside))
                word = tarfile.TarInfo(str(inside.with_suffix(".cls")))
                word.size = len(inside.parts[1])
                tar.addfile(word, io.BytesIO(inside.parts[1].encode()))
        (root / f"{name}_list.csv").write_text("".join(lines))
        write_tfrecords(open_images(pictures, name), root / "tfrecord", split=name, files=3)
    loaded.save_to_disk(root / "saved")
    return {
        **{kind: str(root / kind) for kind in KINDS},
        "folder": str(pictures),
        "hub": "hf:me/pictures",
        "listing": f"{root}:{pictures}",
        "digits": "digits",
    }


@pytest.mark.parametrize(
    ("kind", "format"),
    [
        *((kind, format) for kind in ("folder", "digits") for format in FORMATS),
        *((kind, "arrow") for kind in KINDS),
    ],
)
def test_a_round_trip_keeps_bytes_labels_classes_order_and_splits(
    uris, kind, format, tmp_path, monkeypatch, pictures
):
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


@pytest.mark.parametrize("format", FORMATS)
def test_a_source_without_labels_and_splits(pictures, tmp_path, format):
    report = pack(str(pictures / "train" / "temple"), tmp_path / "packed", format=format)
    packed = open_images(tmp_path / "packed")
    assert (packed.labels, packed.classes, packed[0].label) == (None, None, None)
    assert list(report["splits"]) == stored_splits(tmp_path / "packed") == ["train"]
    assert packed[5].image == (pictures / "train" / "temple" / "05.jpg").read_bytes()


@pytest.mark.parametrize("format", FORMATS)
def test_partly_labeled_images_are_packed(pictures, tmp_path, format):
    image = (pictures / "val" / "temple" / "01.jpg").read_bytes()
    kinds = datasets.ClassLabel(names=["a", "b"])
    table = datasets.Dataset.from_list(
        [{"image": {"bytes": image, "path": None}, "label": label} for label in (0, -1, 1)],
        features=datasets.Features({"image": datasets.Image(), "label": kinds}),
    )
    table.save_to_disk(tmp_path / "some")
    uri, folder = str(tmp_path / "some"), tmp_path / "packed"
    pack(uri, folder, format=format, verify=True)
    assert open_images(folder).labels.tolist() == [0, -1, 1]


def test_a_test_split_keeps_its_name_if_the_format_has_one(pictures, tmp_path):
    data = tmp_path / "data"
    for name, split in (("train", "train"), ("val", "test")):
        shutil.copytree(pictures / name, data / split)
    assert list(pack(str(data), tmp_path / "a")["splits"]) == ["train", "test"]
    report = pack(str(data), tmp_path / "t", format="tfrecord", verify=True)
    assert list(report["splits"]) == ["train", "val"]
    assert len(open_images(tmp_path / "t", "val")) == 12
    shutil.copytree(pictures / "val", data / "val")
    assert list(pack(str(data), tmp_path / "b")["splits"]) == ["train", "val", "test"]
    assert pack(str(data), tmp_path / "w", format="webdataset")["images"] == 72
    assert stored_splits(tmp_path / "w") == ["train", "val", "test"]
    with user_error("unsupported", data, "train, val, test"):
        pack(str(data), tmp_path / "u", format="tfrecord")


# --- Errors ---------------------------------------------------------------------------------------


def test_a_destination_that_is_not_empty_stays_untouched(pictures, tmp_path):
    uri, full = str(pictures / "val"), tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("kept")
    for destination in (full, full / "mine"):
        with user_error("exists", destination):
            pack(uri, destination)
    assert [p.name for p in full.iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    assert pack(uri, tmp_path / "empty")["images"] == 12


def test_free_space_is_checked_first(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**24))
    with user_error("too-large", "0.02 GiB"):
        pack(str(pictures), tmp_path / "deep" / "packed")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**26))
    assert pack(str(pictures), tmp_path / "deep" / "packed")["images"] == 60


@pytest.mark.parametrize(
    ("options", "code", "value"),
    [
        ({"format": "zip"}, "option-invalid", "'zip'"),
        ({"shard_bytes": 0}, "option-invalid", "0"),
        ({"quality": 90}, "option-conflict", "--size"),
        ({"size": 0}, "option-invalid", "--size is 0"),
        ({"size": 9, "quality": 101}, "option-invalid", "101"),
    ],
)
def test_invalid_options_are_named(tmp_path, options, code, value):
    with user_error(code, value):
        pack("digits", tmp_path / "packed", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_vanished_disk_is_an_error_and_not_a_folder_of_unreadable_images(
    pictures, tmp_path, monkeypatch
):
    def vanished(self, index):
        raise OSError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(ImageFolder, "fingerprint", lambda self: "")
    monkeypatch.setattr(ImageFolder, "__getitem__", vanished)
    with user_error("unreadable-images", "flower/00.png", 15):
        pack(str(pictures), tmp_path / "packed")


# --- Report ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_the_report_counts_and_names_unreadable_images(pictures, tmp_path, format):
    data = tmp_path / "data"
    shutil.copytree(pictures / "val", data)
    whole = (data / "flower" / "01.jpg").read_bytes()
    (data / "flower" / "01.jpg").write_bytes(whole[:-200])
    (data / "temple" / "02.jpg").write_bytes(b"")
    (data / "temple" / "03.jpg").write_bytes(b"<html>not found</html>")
    size = sum(path.stat().st_size for path in data.rglob("*.*"))
    (data / "flower" / "02.jpg").unlink()
    (data / "flower" / "02.jpg").symlink_to(tmp_path / "nowhere.jpg")
    size -= (pictures / "val" / "flower" / "02.jpg").stat().st_size
    report = pack(str(data), tmp_path / "packed", format=format, verify=True)
    assert (report["format"], report["verified"], report["bytes"]) == (format, True, size)
    facts = report["splits"]["train"]
    assert (facts["images"], facts["classes"]) == (12, 2)
    assert facts["formats"] == {"JPEG": 5, "PNG": 4}
    assert {bad["index"]: bad["name"] for bad in facts["unreadable"]} == {
        1: "flower/01.jpg",
        2: "flower/02.jpg",
        8: "temple/02.jpg",
        9: "temple/03.jpg",
    }
    reasons = [bad["reason"] for bad in facts["unreadable"]]
    assert reasons[1:3] == ["No such file or directory", "empty file"]
    packed = open_images(tmp_path / "packed")
    assert packed[1].image == whole[:-200]
    assert packed[2].image == packed[8].image == b""
    assert packed.labels.tolist() == [0] * 6 + [1] * 6
    assert packed[3].image == (data / "flower" / "03.jpg").read_bytes()


def test_malformed_lines_of_a_listing_are_reported(pictures, tmp_path):
    (tmp_path / "a.csv").write_text("train/temple/01.jpg 1\nwhat\ntrain/flower/01.jpg 0\n")
    report = pack(f"{tmp_path / 'a.csv'}:{pictures}", tmp_path / "packed")
    assert report["splits"]["train"]["malformed_lines"] == [2]


def test_identical_images_are_named_over_all_splits(pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "data")
    train, val = tmp_path / "data" / "train", tmp_path / "data" / "val"
    shutil.copy(train / "flower" / "03.jpg", train / "temple" / "again.jpg")
    shutil.copy(train / "flower" / "03.jpg", val / "temple" / "leaked.jpg")
    shutil.copy(val / "flower" / "00.png", val / "flower" / "copy.png")
    for name in ("empty.jpg", "void.jpg"):  # unreadable, not identical
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
    assert rows["    flower/empty.jpg"] == "empty file"
    assert rows["all of them are named in"] == "pack-report.json"


def test_splits_of_other_names_are_skipped_and_reported(pictures, tmp_path, capsys):
    uri = save_splits(pictures, tmp_path / "data", "train", "extra", "val", "validation")
    report = pack(uri, tmp_path / "packed")
    assert list(report["splits"]) == ["train", "val"]
    assert report["left_out_splits"] == ["extra", "validation"]
    assert ["splits skipped", "extra, validation"] in pack_rows(report)
    assert "extra, validation" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match="extra"):
        pack(save_splits(pictures, tmp_path / "extra", "extra"), tmp_path / "none")


# --- Other programs read it -----------------------------------------------------------------------


def test_datasets_reads_packed_arrow_files_in_place(pictures, tmp_path):
    pack(str(pictures), tmp_path / "packed", shard_bytes=30_000)
    loaded = datasets.load_from_disk(str(tmp_path / "packed"))
    assert list(loaded) == ["train", "val"]
    train, folder = loaded["train"], open_images(pictures)
    assert train.features["label"].names == ["flower", "temple"]
    assert train["label"][:] == folder.labels.tolist()
    for i in (0, 30, 47):
        pixels = torch.from_numpy(np.array(train[i]["image"].convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(pixels, decode(folder[i].image))
    encoded = train.cast_column("image", datasets.Image(decode=False))
    assert encoded[30]["image"]["path"] == folder.name(30)
    shards = sorted((tmp_path / "packed" / "train").glob("data-*.arrow"))
    assert len(shards) > 2
    assert {Path(file["filename"]) for file in train.cache_files} == set(shards)  # mapped, no copy


def test_tarfile_and_datasets_read_packed_tars(pictures, tmp_path):
    report = pack(str(pictures), tmp_path / "w", format="webdataset", shard_bytes=60_000)
    files = report["splits"]["train"]["files"]
    assert files == [f"train-{n:06d}.tar" for n in range(len(files))]
    found = {}
    for name in files:
        with tarfile.open(tmp_path / "w" / name) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    folder, expected = open_images(pictures), {}
    for i in range(48):
        expected[f"{i:09d}{Path(folder.name(i)).suffix}"] = folder[i].image
        expected[f"{i:09d}.cls"] = str(folder[i].label).encode()
    assert found == expected
    # datasets takes its columns from the first few samples, so that all must be of one format.
    jpegs = tmp_path / "jpegs"
    shutil.copytree(pictures / "val", jpegs, ignore=shutil.ignore_patterns("*.png"))
    pack(str(jpegs), tmp_path / "j", format="webdataset")
    files = {"train": str(tmp_path / "j" / "train-000000.tar")}
    cache = str(tmp_path / "cache")
    loaded = datasets.load_dataset("webdataset", data_files=files, cache_dir=cache, split="train")
    assert loaded["cls"][:] == open_images(jpegs).labels.tolist()
    images = loaded.cast_column("jpg", datasets.Image(decode=False))["jpg"][:]
    expected = [path.read_bytes() for path in sorted(jpegs.rglob("*.jpg"))]
    assert [image["bytes"] for image in images] == expected
