"""Write tables of embeddings in the formats of other programs, group by group of rows.

Commands read Parquet. To add a format, write a function and list it in :data:`TABLE_FORMATS`. Its
arguments: the file, the schema (:func:`.table_schema`), the number of rows, and the groups.
"""

import contextlib
import csv
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import UserError, first_line
from ...io.files import hidden_beside, sync_to_disk

if TYPE_CHECKING:
    import pyarrow as pa

Groups = Iterator["pa.Table"]


def _write_parquet(path: Path, schema: "pa.Schema", rows: int, groups: Groups) -> None:
    import pyarrow.parquet as pq

    # Plain pages that every reader knows; a dictionary of floats saves nothing.
    options: Any = {"use_dictionary": ["label"], "write_page_checksum": True}
    with pq.ParquetWriter(path, schema, **options) as writer:
        for group in groups:
            writer.write_table(group)


def _write_arrow(path: Path, schema: "pa.Schema", rows: int, groups: Groups) -> None:
    """Arrow's file format (Feather version 2)."""
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for group in groups:
            writer.write_table(group)


def _write_csv(path: Path, schema: "pa.Schema", rows: int, groups: Groups) -> None:
    """One column a value: ``embedding_0``, ``embedding_1``, ..."""
    vectors, names = _vector_columns(schema), _image_columns(schema)
    header = [f"{name}_{i}" for name, dim in vectors.items() for i in range(dim)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, *header])
        for group in groups:
            values = np.concatenate([_values(group, name) for name in vectors], axis=1)
            texts = [group[name].to_pylist() for name in names]
            writer.writerows(
                [*row, *map(str, numbers)] for *row, numbers in zip(*texts, values, strict=True)
            )


def _write_npy(path: Path, schema: "pa.Schema", rows: int, groups: Groups) -> None:
    """Rows [n, F] or maps [n, C, H, W]; the other columns are in ``FILE.images.csv``."""
    ((name, shape),) = _shapes(schema).items()
    names = _image_columns(schema)
    dtype = schema.field(name).type.value_type.to_pandas_dtype()
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (rows, *shape)}
    with (
        open(path, "wb") as file,
        open(images_file(path), "w", newline="", encoding="utf-8") as images,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        writer = csv.writer(images)
        writer.writerow(names)
        for group in groups:
            file.write(_values(group, name).tobytes())
            writer.writerows(zip(*(group[n].to_pylist() for n in names), strict=True))
    sync_to_disk(images_file(path))


def images_file(path: Path) -> Path:
    """Return the file of the paths beside an ``.npy`` file."""
    return path.with_suffix(".images.csv")


def _write_hdf5(path: Path, schema: "pa.Schema", rows: int, groups: Groups) -> None:
    h5py = _library("h5py")
    try:
        with h5py.File(path, "w") as file:
            _fill_datasets(file, schema, rows, groups, h5py.string_dtype())
    except RuntimeError as error:  # of a full disk, when the file is closed
        raise OSError(first_line(error)) from None


def _write_zarr(path: Path, schema: "pa.Schema", rows: int, groups: Groups) -> None:
    shutil.rmtree(path, ignore_errors=True)
    _fill_datasets(_library("zarr").open_group(path, mode="w"), schema, rows, groups, "string")


def _fill_datasets(file: Any, schema: "pa.Schema", rows: int, groups: Groups, text: Any) -> None:
    """Fill a data set for each column of an HDF5 file or zarr group; a missing label is ""."""
    vectors, start = _shapes(schema), 0
    file.attrs["localagg"] = (schema.metadata or {})[b"localagg"].decode()
    for name in schema.names:
        if name in vectors:
            dtype = schema.field(name).type.value_type.to_pandas_dtype()
            file.create_dataset(name, shape=(rows, *vectors[name]), dtype=dtype)
        else:
            file.create_dataset(name, shape=(rows,), dtype="int64" if name == "index" else text)
    for group in groups:
        part = slice(start, start := start + len(group))
        for name in schema.names:
            if name in vectors:
                file[name][part] = _values(group, name).reshape(-1, *vectors[name])
            elif name == "index":
                file[name][part] = group[name].to_numpy()
            else:
                file[name][part] = np.array([t or "" for t in group[name].to_pylist()], object)


def _vector_columns(schema: "pa.Schema") -> dict[str, int]:
    """Return {column: values a row} of the embedding or layers."""
    return json.loads((schema.metadata or {})[b"localagg"])["columns"]


def _shapes(schema: "pa.Schema") -> dict[str, list[int]]:
    """Return {column: shape of a row}: [F], or [C, H, W] of raw maps."""
    facts = json.loads((schema.metadata or {})[b"localagg"])
    return facts.get("shapes") or {name: [dim] for name, dim in facts["columns"].items()}


def _image_columns(schema: "pa.Schema") -> list[str]:
    return [name for name in schema.names if name not in _vector_columns(schema)]


def _values(group: "pa.Table", name: str) -> np.ndarray:
    """Return a column of vectors as an array [n, F]."""
    column = group[name].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(group), -1)


def _library(name: str) -> Any:
    try:
        return __import__(name)
    except ModuleNotFoundError:
        raise UserError(
            "missing-extra", f"{name} is missing: pip install 'localagg[tables]'."
        ) from None


TABLE_FORMATS: dict[str, Callable[[Path, "pa.Schema", int, Groups], None]] = {
    ".parquet": _write_parquet,
    ".pq": _write_parquet,
    ".csv": _write_csv,
    ".npy": _write_npy,
    ".arrow": _write_arrow,
    ".feather": _write_arrow,
    ".h5": _write_hdf5,
    ".hdf5": _write_hdf5,
    ".zarr": _write_zarr,
}


def check_format(out: Path, columns: int) -> None:
    """Raise UserError unless the suffix names a format that holds so many vector columns."""
    suffix = out.suffix.lower()
    if suffix not in TABLE_FORMATS:
        raise UserError(
            "unsupported", f"--out {out} must end in one of {', '.join(TABLE_FORMATS)}."
        )
    if suffix == ".npy" and columns > 1:
        raise UserError(
            "option-conflict", f"--out {out} holds one layer; use .h5, .zarr or .parquet for more."
        )
    if suffix in (".h5", ".hdf5", ".zarr"):  # before any work
        _library("zarr" if suffix == ".zarr" else "h5py")


@contextlib.contextmanager
def publish_images_file(out: Path) -> Iterator[None]:
    """Move the paths of an ``.npy`` file, written meanwhile, to their name beside it."""
    written = images_file(hidden_beside(out, ".tmp"))
    try:
        yield
        if written.exists():
            os.replace(written, images_file(out))
            sync_to_disk(out.parent)
    finally:
        with contextlib.suppress(OSError):
            written.unlink(missing_ok=True)
