"""pack: every kind of source to both formats and back, byte for byte."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from localagg.config import UserError
from localagg.data import open_images
from localagg.data import pack as pack_module
from localagg.data.decode import decode
from localagg.data.pack import pack
from localagg.data.protocol import encoded
from localagg.data.sources import stored_splits

FORMATS = ("arrow", "tfrecord")
KINDS = ("folder", "parquet", "named", "saved", "listing", "tfrecord", "digits")


@pytest.fixture(scope="module")
def uris(pictures, tmp_path_factory):
    """The same pictures as every kind of source, each made without pack (but for the TFRecords)."""
    import datasets

    from localagg.data.tfrecord import write_tfrecords

    root = tmp_path_factory.mktemp("sources")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(pictures), cache_dir=str(root / "c"))
    for split, name in (("train", "train"), ("validation", "val")):
        (root / "parquet").mkdir(exist_ok=True)
        (root / "named").mkdir(exist_ok=True)
        loaded[split].to_parquet(root / "parquet" / f"{name}.parquet")
        bare = loaded[split].cast_column("image", datasets.Image(decode=False))
        bare.to_parquet(root / "named" / f"{name}.parquet")  # paths only, no bytes
        lines = []
        for path in sorted((pictures / name).rglob("*.*")):
            inside = path.relative_to(pictures)
            lines.append(f"{inside} {int(inside.parts[1] == 'temple')}\n")
        (root / f"{name}_list.csv").write_text("".join(lines))
        write_tfrecords(open_images(pictures, name), root / "tfrecords", split=name, files=3)
    loaded.save_to_disk(root / "saved")
    return {
        "folder": str(pictures),
        "parquet": str(root / "parquet"),
        "named": str(root / "named"),
        "saved": str(root / "saved"),
        "listing": f"{root}:{pictures}",
        "tfrecord": str(root / "tfrecords"),
        "digits": "digits",
    }


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_keeps_bytes_labels_classes_order_and_splits(uris, kind, format, tmp_path):
    report = pack(uris[kind], tmp_path / "packed", format=format, shard_bytes=9_000)
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
    assert json.loads((tmp_path / "packed" / "pack-report.json").read_text()) == report
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


def test_a_test_split_keeps_its_name_where_the_format_has_one(pictures, tmp_path):
    for name, split in (("train", "train"), ("val", "test")):
        shutil.copytree(pictures / name, tmp_path / "data" / split)
    assert list(pack(str(tmp_path / "data"), tmp_path / "a")["splits"]) == ["train", "test"]
    report = pack(str(tmp_path / "data"), tmp_path / "t", format="tfrecord", verify=True)
    assert list(report["splits"]) == ["train", "val"]
    assert len(open_images(tmp_path / "t", "val")) == 12
    shutil.copytree(pictures / "val", tmp_path / "data" / "val")
    assert list(pack(str(tmp_path / "data"), tmp_path / "b")["splits"]) == ["train", "val", "test"]
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
    with pytest.raises(UserError, match="malformed lines"):
        pack(uri, tmp_path / "other", malformed="error")
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


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_pack_that_fails_leaves_nothing(uris, tmp_path, monkeypatch, format, error):
    calls = []

    def fail(image):
        calls.append(image)
        if len(calls) == 30:
            raise error
        return decode(image)

    monkeypatch.setattr(pack_module, "decode", fail)
    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match=r"cannot be packed .*disk full|^$"):
        pack(uris["folder"], tmp_path / "packed", format=format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", FORMATS)
def test_verify_finds_what_came_back_differently(uris, tmp_path, monkeypatch, format):
    class Flawed:
        """A source whose image 7 is another one each time."""

        def __init__(self, inner):
            self.inner, self.reads = inner, 0

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __len__(self):
            return len(self.inner)

        def __getitem__(self, index):
            sample = self.inner[index]
            self.reads += index == 7
            if index != 7:
                return sample
            return sample._replace(image=encoded(sample.image) + bytes(self.reads))

    real = open_images
    monkeypatch.setattr(
        pack_module,
        "open_images",
        lambda uri, split, **how: Flawed(real(uri, split, **how)) if how else real(uri, split),
    )
    with pytest.raises(UserError, match=r"flower/07.jpg was read back differently"):
        pack(str(Path(uris["folder"]) / "train"), tmp_path / "packed", format=format, verify=True)
    assert list(tmp_path.iterdir()) == []
    pack(str(Path(uris["folder"]) / "train"), tmp_path / "packed", format=format)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"format": "zip"}, "no format 'zip'"), ({"shard_bytes": 0}, "0 bytes are too small")],
)
def test_wrong_options_are_refused(uris, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        pack(uris["folder"], tmp_path / "packed", **options)
