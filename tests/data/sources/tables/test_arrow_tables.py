"""Tables of images: what ``datasets`` and pyarrow write, and damage."""

import os
import pickle
import sys

import fuzz
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from expect import user_error

from localagg.data import open_images
from localagg.data.inspect.inspect_dataset import inspect
from localagg.data.pack.pack_dataset import pack

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
IMAGES = [b"zero", b"one" * 99, b"", b"three"]


def save(folder, labels=None, feature=None, images=IMAGES, **how):
    """A saved dataset. ``feature`` is made by it, for an import of it chooses the cache folder."""
    import datasets

    columns = {"image": datasets.Image()}
    rows = {"image": [{"bytes": image, "path": None} for image in images]}
    if labels is not None:
        columns["label"] = feature(datasets)
        rows["label"] = labels
    datasets.Dataset.from_dict(rows, features=datasets.Features(columns)).save_to_disk(
        folder, **how
    )
    return folder


def contents(source):
    return [(source[i].image, source[i].label) for i in range(len(source))]


def names(datasets):
    return datasets.ClassLabel(names=["a", "b", "c"])


def value(kind):
    return lambda datasets: datasets.Value(kind)


def test_shards_batches_and_copies_are_read_in_order(tmp_path):
    images = [f"image {i}".encode() for i in range(2500)]  # three batches and more
    save(tmp_path / "s", [i % 3 for i in range(2500)], names, images, num_shards=4)
    source = open_images(tmp_path / "s")
    assert contents(source) == [(image, i % 3) for i, image in enumerate(images)]
    assert source.classes == ["a", "b", "c"]
    assert source.stored_bytes() == sum(map(len, images))
    copy = pickle.loads(pickle.dumps(source))
    assert copy[1700] == source[1700]
    assert len(pickle.dumps(source)) < 40_000  # the names of the files, not their content
    with pytest.raises(IndexError):
        source[2500]
    with pytest.raises(IndexError):
        source[-1]


def test_a_saved_dataset_is_opened_without_importing_datasets(tmp_path, monkeypatch):
    save(tmp_path / "s")
    monkeypatch.setitem(sys.modules, "datasets", None)  # an import would fail
    assert len(open_images(tmp_path / "s")) == 4


@pytest.mark.parametrize(
    ("labels", "feature", "expected", "classes"),
    [
        ([2, 0, 1, 1], names, [2, 0, 1, 1], ["a", "b", "c"]),
        ([-1] * 4, names, None, None),
        ([7, 3, 7, 5], value("int32"), [2, 0, 2, 1], ["3", "5", "7"]),
        (["b", "a", "b", "b"], value("string"), [1, 0, 1, 1], ["a", "b"]),
        ([True, False, True, True], value("bool"), [1, 0, 1, 1], ["False", "True"]),
        ([0, 1, -1, 1], names, [0, 1, -1, 1], ["a", "b", "c"]),
        ([None] * 4, names, None, None),
        ([0, None, 1, 1], names, [0, -1, 1, 1], ["a", "b", "c"]),
        (["b", None, "", "a"], value("string"), [1, -1, -1, 0], ["a", "b"]),
        ([5.0, None, float("nan"), 3.0], value("float64"), [1, -1, -1, 0], ["3", "5"]),
        ([-1, 1, 1, -1], value("int8"), [0, 1, 1, 0], ["-1", "1"]),
        ([-1, 1, 0, -1], value("int8"), [-1, 1, 0, -1], ["0", "1"]),
        ([0.5, 1, 2, 3], value("float32"), None, None),
    ],
)
def test_labels_of_every_kind(tmp_path, labels, feature, expected, classes):
    source = open_images(save(tmp_path / "s", labels, feature))
    assert source.classes == classes
    assert (source.labels.tolist() if source.labels is not None else None) == expected


def test_invalid_labels_raise(tmp_path):
    save(tmp_path / "t", [0, 1, 2, 1], names)
    info = tmp_path / "t" / "dataset_info.json"  # datasets would not write label 2 of two classes
    info.write_text(info.read_text().replace('"c"', "").replace('"b",', '"b"'))
    with user_error("damaged", "Record 2", "label 2", "to 1"):
        open_images(tmp_path / "t")


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_plain_binary_columns_and_missing_images(tmp_path, kind):
    images = pa.array([b"a", None, b"ccc"], kind)
    pyarrow.parquet.write_table(pa.table({"n": [1, 2, 3], "jpeg": images}), tmp_path / "t.parquet")
    source = open_images(tmp_path / "t.parquet")
    assert contents(source) == [(b"a", None), (b"", None), (b"ccc", None)]


def test_paths_in_a_table_may_name_anything(tmp_path):
    """What cannot be read is one unreadable image; a pipe is not waited for."""
    (tmp_path / "0.jpg").write_bytes(b"zero")
    os.mkfifo(tmp_path / "1.jpg")
    paths = [*(str(tmp_path / f"{i}.jpg") for i in range(3)), "x\0y", "/dev/zero", str(tmp_path)]
    table = pa.table({"image": [{"bytes": None, "path": path} for path in paths]})
    table = table.set_column(0, "image", table["image"].cast(STRUCT))
    (tmp_path / "t").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "t" / "t.parquet")
    source = open_images(tmp_path / "t")
    assert source[0].image == b"zero"
    for i in range(1, 6):
        with pytest.raises(OSError, match=r"file|path|directory"):
            source[i]
    assert len(source.fingerprint()) == 64
    report = pack(tmp_path / "t", tmp_path / "packed")
    told = {bad["index"]: bad["reason"] for bad in report["splits"]["train"]["unreadable"]}
    assert told.keys() == {0, 1, 2, 3, 4, 5}
    assert (told[1], told[3]) == ("Not a regular file", "Not a path")
    found = inspect(str(tmp_path / "t"))["splits"]["train"]
    assert {bad["reason"]: bad["name"][:8] for bad in found["unreadable"]}[
        "Not a path"
    ] == "record 3"


def test_a_column_of_paths_that_are_no_text_is_not_followed(tmp_path):
    table = pa.table({"image": [{"bytes": b"a", "path": 7}, {"bytes": None, "path": 7}]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    assert contents(open_images(tmp_path / "t.parquet")) == [(b"a", None), (b"", None)]


def test_files_without_records_are_skipped(tmp_path):
    table = pa.table({"image": [b"a", b"b"]})
    pyarrow.parquet.write_table(table.slice(0, 0), tmp_path / "0.parquet")
    with user_error("no-images", "0.parquet"):
        open_images(tmp_path)
    pyarrow.parquet.write_table(table, tmp_path / "1.parquet")
    assert contents(open_images(tmp_path)) == [(b"a", None), (b"b", None)]


def test_files_with_different_columns_are_reported_once(tmp_path, capfd):
    """Not by ``datasets`` too, on stderr."""
    pyarrow.parquet.write_table(pa.table({"image": [b"a"]}), tmp_path / "0.parquet")
    pyarrow.parquet.write_table(pa.table({"image": [b"a"], "n": [1]}), tmp_path / "1.parquet")
    with user_error("damaged", tmp_path):
        open_images(tmp_path)
    assert capfd.readouterr().err == ""


def test_the_fingerprint_covers_sizes_labels_and_order(tmp_path):
    images = [bytes([i % 7]) * (i % 50) for i in range(1000)]
    labels = [i % 3 for i in range(1000)]
    first = open_images(save(tmp_path / "0", labels, names, images)).fingerprint()
    assert (
        open_images(save(tmp_path / "1", labels, names, images, num_shards=3)).fingerprint()
        == first
    )
    sampled = set(np.linspace(0, 999, 64).astype(int).tolist())
    spot = next(i for i in range(500, 900) if not {i, i + 1} & sampled)
    images[spot], images[spot + 1] = images[spot + 1], images[spot]  # labels stay
    assert open_images(save(tmp_path / "2", labels, names, images)).fingerprint() != first
    images[spot], images[spot + 1] = images[spot + 1], images[spot]
    labels[spot], labels[spot + 1] = labels[spot + 1], labels[spot]
    assert open_images(save(tmp_path / "3", labels, names, images)).fingerprint() != first


# --- Damage ---------------------------------------------------------------------------------------


def test_an_arrow_file_cut_off_anywhere_is_named(tmp_path):
    save(tmp_path / "s", [0, 1, 2, 0], names)
    (path,) = (tmp_path / "s").glob("*.arrow")
    whole = path.read_bytes()
    for size in range(0, len(whole), 61):
        path.write_bytes(whole[:size])
        with user_error("damaged", path):
            open_images(tmp_path / "s")
    path.unlink()
    with user_error("damaged", path):
        open_images(tmp_path / "s")


def test_an_arrow_file_cut_off_between_two_batches_raises(tmp_path):
    """To Arrow it is whole."""
    save(tmp_path / "s", images=[b"image"] * 2500)
    (path,) = (tmp_path / "s").glob("*.arrow")
    whole, found = path.read_bytes(), []
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as batches:
        batches.read_next_batch()
        at = file.tell()
    path.write_bytes(whole[:at])
    with pa.memory_map(str(path)) as file:
        found = pa.ipc.open_stream(file).read_all()
    assert 0 < len(found) < 2500
    with user_error("damaged", f"byte {at:,}"):
        open_images(tmp_path / "s")


def test_a_parquet_file_cut_off_anywhere_is_named(tmp_path):
    table = pa.table({"image": [{"bytes": image, "path": None} for image in IMAGES]})
    pyarrow.parquet.write_table(table, tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    assert contents(open_images(tmp_path / "whole.parquet"))[1][0] == IMAGES[1]
    for size in range(0, len(whole), len(whole) // 9):
        path = tmp_path / f"{size}.parquet"
        path.write_bytes(whole[:size])
        with user_error("damaged", path):
            open_images(path)


@pytest.mark.parametrize(
    ("name", "content", "value"),
    [
        ("state.json", "{}", "'_data_files'"),
        ("state.json", '{"_data_files": []}', "state.json"),
        ("state.json", '{"_data_files": [3]}', "state.json"),
        ("state.json", "[" * 100_000, "state.json"),
        ("dataset_info.json", "no", "dataset_info.json"),
        ("dataset_info.json", '{"features": 3}', "'features'"),
    ],
)
def test_damaged_descriptions_raise(tmp_path, name, content, value):
    save(tmp_path / "s")
    (tmp_path / "s" / name).write_text(content)
    with user_error("damaged", tmp_path / "s" / name, value):
        open_images(tmp_path / "s")


def test_changed_saved_datasets_are_read_as_pyarrow_does_or_raise():
    tally = fuzz.fuzz(fuzz.TARGETS["saved_dataset"](), range(500), seed=1)
    assert tally.findings == []
    assert min(tally.outcomes[kind] for kind in ("right", "refused", "other values")) > 10
