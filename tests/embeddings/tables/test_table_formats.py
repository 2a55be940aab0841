"""Each format is read by its own library, with the rows of the Parquet table."""

import json
import os
import resource
import shutil
import sys

import h5py
import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
import zarr
from expect import user_error

import localagg
import localagg.embeddings.tables.table_formats as formats
from embeddings import hidden_files, save_small_encoder, stacked_rows
from localagg.cli.main import main
from localagg.config import ViewConfig
from localagg.embeddings.duplicates import find_duplicates
from localagg.embeddings.search import search
from localagg.embeddings.tables.write_table import write_embeddings
from localagg.errors import Interrupted


def from_csv(path):
    table = pandas.read_csv(path)
    return table, table.filter(regex=r"^embedding_\d+$").to_numpy()


def from_npy(path):
    return pandas.read_csv(path.with_suffix(".images.csv")), np.load(path)


def from_arrow(path):
    table = pandas.read_feather(path)
    return table, np.stack(table["embedding"])


def from_hdf5(path):
    with h5py.File(path) as file:
        assert json.loads(file.attrs["localagg"])["dim"] == 12
        columns = {name: file[name][:] for name in file if name != "embedding"}
        texts = {n: [t.decode() for t in c] for n, c in columns.items() if n != "index"}
        return columns | texts, file["embedding"][:]


def from_zarr(path):
    group = zarr.open_group(path, mode="r")
    assert json.loads(group.attrs["localagg"])["dim"] == 12
    return {name: group[name][:] for name in group if name != "embedding"}, group["embedding"][:]


READERS = {
    ".csv": from_csv, ".npy": from_npy, ".arrow": from_arrow, ".feather": from_arrow,
    ".h5": from_hdf5, ".hdf5": from_hdf5, ".zarr": from_zarr,
}  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_small_encoder(tmp_path_factory.mktemp("weights") / "small.safetensors")[0]


@pytest.fixture(scope="module")
def expected(weights, pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("table") / "e.parquet"
    write_embeddings(weights, str(pictures), out, split="val", batch=5)
    return pq.read_table(out)


def test_every_format_but_parquet_has_a_reader_here():
    assert set(formats.TABLE_FORMATS) == {".parquet", ".pq", *READERS}


@pytest.mark.parametrize("suffix", READERS)
def test_other_libraries_read_the_rows(weights, pictures, expected, tmp_path, suffix, monkeypatch):
    monkeypatch.setattr("localagg.embeddings.tables.table_writer.GROUP_ROWS", 5)  # several groups
    out = tmp_path / f"e{suffix}"
    write_embeddings(weights, str(pictures), out, split="val", batch=5)
    columns, rows = READERS[suffix](out)
    np.testing.assert_array_equal(rows.astype(np.float32), stacked_rows(expected))
    for name in ("path", "split", "index", "label"):
        assert list(columns[name]) == expected[name].to_pylist()
    assert not hidden_files(tmp_path)
    if not out.is_dir():  # a second table replaces the first
        write_embeddings(weights, str(pictures), out, split="train", batch=5)
        assert len(READERS[suffix](out)[1]) == 48


def test_several_layers_are_columns_of_one_pass(weights, flat, tmp_path):
    out = tmp_path / "layers.parquet"
    words = ["embed", str(weights), "--data", str(flat), "--out", str(out), "--workers", "0"]
    assert main([*words, "--layer", "0", "1"]) == 0
    both = pq.read_table(out)
    for layer in ("0", "1"):
        alone = tmp_path / f"{layer}.parquet"
        write_embeddings(weights, str(flat), alone, layer=layer)
        np.testing.assert_allclose(
            np.stack(both[f"layer_{layer}"].to_numpy()),
            stacked_rows(pq.read_table(alone)),
            atol=1e-6,
        )
    with user_error("unsupported", out):
        search(out, [0])
    with user_error("option-conflict", "e.npy"):
        write_embeddings(weights, str(flat), tmp_path / "e.npy", layer=["0", "1"])
    with user_error("option-invalid", "0 0"):
        write_embeddings(weights, str(flat), out, layer=["0", "0"])
    with user_error("option-unknown", "conv9"):
        write_embeddings(weights, str(flat), out, layer=["0", "conv9"])


def test_half_precision_is_kept(weights, flat, tmp_path):
    for suffix in (".npy", ".h5", ".zarr"):
        write_embeddings(weights, str(flat), tmp_path / f"e{suffix}", dtype="float16")
        rows = READERS[suffix](tmp_path / f"e{suffix}")[1]
        assert (rows.dtype, rows.shape) == (np.float16, (12, 12))


def test_other_suffixes_and_missing_libraries_are_refused(weights, flat, tmp_path, monkeypatch):
    for name in ("e.txt", "e", "e.csv.gz"):
        with user_error("unsupported", name, ".parquet", ".csv"):
            write_embeddings(weights, str(flat), tmp_path / name)
    write_embeddings(weights, str(flat), tmp_path / "e.csv")
    with user_error("unsupported", "e.csv", ".parquet"):
        search(tmp_path / "e.csv", [0])
    (tmp_path / "z.zarr").mkdir()
    with user_error("not-found", "z.zarr"):
        write_embeddings(weights, str(flat), tmp_path / "z.zarr")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with user_error("missing-extra", "h5py", "localagg[tables]"):
        write_embeddings(weights, str(flat), tmp_path / "e.h5")


@pytest.mark.parametrize("suffix", [".csv", ".npy", ".h5", ".zarr"])
def test_commands_name_the_format_that_they_read(weights, flat, tmp_path, suffix):
    out = tmp_path / f"e{suffix}"
    write_embeddings(weights, str(flat), out)
    for command in (search_first, write_report, find_duplicates):
        with user_error("unsupported", out, ".parquet"):
            command(out)


def search_first(table):
    return search(table, [0])


def write_report(table):
    from localagg.report.run_report import write_report

    return write_report([table])


def test_raw_maps_have_the_shape_and_values_of_the_modules(weights, flat, tmp_path):
    """The view of stimuli is set by hand: whole images of 24 pixels."""
    view = {"image_size": 24, "eval_crop": 1.0}
    model = localagg.load(weights, views=ViewConfig(**view), device="cpu")
    expected = model.features(localagg.open_images(str(flat)), ["0", "1"], flatten=False)
    assert expected["1"].shape == (12, 8, 24, 24)
    words = ["embed", str(weights), "--data", str(flat), "--workers", "0", "--raw-maps"]
    words += ["--image-size", "24", "--eval-crop", "1", "--layer"]
    for suffix, read in ((".npy", from_npy), (".h5", None), (".parquet", None)):
        out = tmp_path / f"maps{suffix}"
        layers = ["1"] if suffix == ".npy" else ["1", "0"]
        assert main([*words, *layers, "--out", str(out)]) == 0
        if read:
            found = {"1": read(out)[1]}
        elif suffix == ".h5":
            with h5py.File(out) as file:
                found = {name: file[f"layer_{name}"][:] for name in layers}
        else:
            table = pq.read_table(out)
            shapes = json.loads(table.schema.metadata[b"localagg"])["shapes"]
            columns = {name: np.stack(table[f"layer_{name}"].to_numpy()) for name in layers}
            found = {n: c.reshape(-1, *shapes[f"layer_{n}"]) for n, c in columns.items()}
        for name, maps in found.items():
            np.testing.assert_allclose(maps, expected[name], atol=1e-5)


def test_the_view_can_be_set_and_a_picture_is_searched_among_raw_maps(weights, flat, tmp_path):
    out = tmp_path / "maps.parquet"
    write_embeddings(weights, str(flat), out, layer="1", raw_maps=True, image_size=24)
    photo = tmp_path / "photo.png"
    shutil.copy(sorted(flat.glob("*.png"))[0], photo)
    (query,) = search(out, [photo])["queries"]
    assert query["neighbors"][0]["path"] == sorted(flat.glob("*.png"))[0].name
    assert query["neighbors"][0]["similarity"] == pytest.approx(1, abs=1e-5)
    with user_error("option-missing", "--raw-maps", "--layer"):
        write_embeddings(weights, str(flat), out, raw_maps=True)
    for wrong in ({"image_size": 0}, {"image_size": 2.5}, {"eval_crop": 0}, {"eval_crop": 1.5}):
        with user_error("option-invalid", next(iter(wrong)).replace("_", "-").partition("-")[0]):
            write_embeddings(weights, str(flat), out, **wrong)
    with user_error("mismatch", out):
        write_embeddings(weights, str(flat), out, append=True, layer="1", image_size=16)


def test_a_kill_between_the_two_files_of_npy_leaves_no_other_paths(weights, tmp_path, monkeypatch):
    out, paths = tmp_path / "v.npy", tmp_path / "v.images.csv"
    write_embeddings(weights, "digits", out, split="val")
    before = paths.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt_second(os.replace))
        with pytest.raises(Interrupted):
            write_embeddings(weights, "digits", out, split="train")
    assert len(np.load(out)) == 1400
    assert not paths.exists()
    write_embeddings(weights, "digits", out, split="train")
    assert len(pandas.read_csv(paths)) == 1400
    assert paths.read_bytes() != before
    assert not hidden_files(tmp_path)


def interrupt_second(replace):
    calls = []

    def replaced(*names):
        if str(names[1]).endswith((".npy", ".csv")):
            calls.append(names)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(*names)

    return replaced


def test_the_paths_of_npy_replace_no_input(weights, tmp_path, capsys):
    listing = tmp_path / "v.images.csv"
    listing.write_text("path\n")
    words = ["embed", str(weights), "--data", str(listing), "--out", str(tmp_path / "v.npy")]
    assert main(words) == 2
    assert str(listing) in capsys.readouterr().err
    assert listing.read_text() == "path\n"


# Objects of an unwritten file that are freed later.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_hdf5_on_a_disk_that_is_full_at_any_place_is_an_os_error(weights, tmp_path):
    """h5py raises RuntimeError where the disk is full when it closes the file."""
    write_embeddings(weights, "digits", tmp_path / "t.parquet", split="val")
    table, limits = pq.read_table(tmp_path / "t.parquet"), resource.getrlimit(resource.RLIMIT_FSIZE)
    write, whole = formats.TABLE_FORMATS[".h5"], tmp_path / "whole.h5"
    write(whole, table.schema, len(table), iter([table]))
    for room in range(500, whole.stat().st_size, 1_500):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            write(tmp_path / "cut.h5", table.schema, len(table), iter([table]))
        except OSError:
            continue
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        raise AssertionError(f"written whole in {room:,} bytes")
