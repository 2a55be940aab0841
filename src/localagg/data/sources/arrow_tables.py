"""Tables of encoded images: saved ``datasets``, Parquet, and data that ``datasets`` loads.

All of them are memory-mapped Arrow files: opening finds the positions of the images, and an image
is read on access. A saved dataset is opened without ``datasets``: its import takes longer than
opening a million records, and it reads a file that is cut off between two batches as if whole.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from torch import Tensor

from ...errors import UserError
from ...io.console import notify
from .image_files import read_file
from .labels import number_labels
from .source import Sample, Source, content_hash
from .splits import Splits, split_folders, split_in_name

_LABELS = ("label", "labels", "fine_label", "class", "target")
_compute: Any = pyarrow.compute  # its functions are made at run time, unknown to type checkers
_END = b"\xff\xff\xff\xff\0\0\0\0"  # end of a stream of Arrow record batches


class MappedTable:
    """Files of Arrow record batches as one memory-mapped table; pickled as their names.

    Raises:
        OSError: a file cannot be read, or is cut off.
    """

    def __init__(self, files: list[str]) -> None:
        self.files = files
        self._table = pa.concat_tables([_mapped(file) for file in files])
        self.schema, self.column_names = self._table.schema, self._table.column_names

    def column(self, name: str) -> pa.ChunkedArray:
        """Return one column of all files."""
        return self._table.column(name)

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedTable, (self.files,)


def _mapped(file: str) -> pa.Table:
    try:
        with pa.memory_map(file) as mapped:
            size = mapped.size()
            # Arrow reads a file that is cut off between two batches as if whole.
            mapped.seek(max(0, size - len(_END)))
            if mapped.read(len(_END)) != _END:
                raise ValueError(f"it is cut off at byte {size:,}")
            mapped.seek(0)
            table = pa.ipc.open_stream(mapped).read_all()
            table.column_names  # raises if they are no text  # noqa: B018
            return table
    except (OSError, ValueError, pa.ArrowException) as error:
        raise OSError(f"'{file}' is damaged ({_reason(error)}); copy or pack it again") from None


class TableImages(Source):
    """A table with a column of images and perhaps one of labels.

    The image column is the first of type Image, or a struct with ``bytes``, or binary; the label
    column is the first named label, labels, fine_label, class or target.

    Args:
        uri: the table's name for messages.
        table: :class:`MappedTable`, or the table of ``datasets``; it can be pickled.
        features: the columns as ``datasets.Features.to_dict`` describes them; may be empty.
    """

    def __init__(self, uri: str, table: Any, features: dict[str, Any]) -> None:
        self.uri, self._table = uri, table
        self._column = _image_column(uri, table, features)
        self._open()
        self.classes: list[str] | None = None
        self.labels: Tensor | None = None
        label = next((name for name in _LABELS if name in table.column_names), None)
        if label is not None:
            found = _labels(uri, label, table.column(label), features.get(label))
            if found is not None:
                self.labels, self.classes = torch.from_numpy(found[0].astype(np.int64)), found[1]

    def _open(self) -> None:
        try:
            self._images, self._paths = _images_and_paths(self._table.column(self._column))
        except pa.ArrowException as error:
            message = f"'{self.uri}' is damaged: {_reason(error)}; make it again."
            raise UserError("damaged", message) from None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_images", "_paths")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._paths if self._images is None else self._images)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        image = None if self._images is None else self._images[index].as_py()
        if image is None and self._paths is not None and (path := self._paths[index].as_py()):
            image = read_file(path)
        return Sample(index, image or b"", self.label(index))

    def name(self, index: int) -> str:
        """Return the record's number."""
        return f"record {index} of {self.uri}"

    def fingerprint(self) -> str:
        """Hash the sizes and labels of all images, and the bytes of 64."""
        facts = [self._sizes()]
        return content_hash(self, facts if self.labels is None else [*facts, self.labels.numpy()])

    def stored_bytes(self) -> int:
        """Return the size of all images in bytes, including files that the table only names."""
        sizes = self._sizes()
        total = int(sizes[sizes > 0].sum())
        if self._paths is not None:
            named = self._paths.filter(pa.array(sizes < 0)).to_pylist()
            total += sum(_file_size(path) for path in named if path)
        return total

    def _sizes(self) -> np.ndarray:
        """Return the bytes of each image, int64; -1 if only its path is stored."""
        if self._images is None:
            return np.full(len(self), -1)
        lengths = _compute.binary_length(self._images).cast(pa.int64())
        return _compute.fill_null(lengths, -1).to_numpy()


def _file_size(path: str) -> int:
    """Return a file's size in bytes; 0 for a missing file, which reading reports."""
    try:
        return os.path.getsize(path)
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return 0


def _images_and_paths(column: Any) -> tuple[Any, Any]:
    """Return the (encoded images or None, paths or None) of an image column.

    They are validated: wrong offsets in an array would read memory outside of it.
    """
    column.validate()
    images, paths = (column, None) if _is_binary(column.type) else (None, column)
    if pa.types.is_struct(column.type):
        images, paths = _child(column, "bytes"), _child(column, "path")
        if paths is not None and not _is_text(paths.type):
            paths = None
    if images is not None:
        images.validate(full=True)
        if not images.null_count:
            return images, None
    if paths is not None:
        paths.validate(full=True)
    return images, paths


def _child(column: Any, name: str) -> Any:
    if (position := column.type.get_field_index(name)) < 0:
        return None
    chunks = [chunk.field(position) for chunk in column.chunks]
    return pa.chunked_array(chunks, column.type.field(position).type)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _image_column(uri: str, table: Any, features: dict[str, Any]) -> str:
    for field in table.schema:
        feature = features.get(field.name)
        struct = pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        if struct and _is_binary(field.type.field("bytes").type):
            return field.name
        marked = isinstance(feature, dict) and feature.get("_type") == "Image"
        if marked and (_is_binary(field.type) or pa.types.is_string(field.type)):
            return field.name
    for field in table.schema:
        if _is_binary(field.type):
            return field.name
    columns = ", ".join(table.column_names)
    raise UserError("no-images", f"'{uri}' has no column of images; its columns are {columns}.")


def _labels(
    uri: str, name: str, column: Any, feature: Any
) -> tuple[np.ndarray, list[str] | None] | None:
    """Return the labels and class names of a column; None without labels."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or _is_text(kind)):
        notify(f"The column '{name}' of '{uri}' has the type {kind}, not classes; it is ignored.")
        return None
    column.validate(full=True)
    values = [value for value in column.unique().to_pylist() if value is not None]
    codes = _compute.fill_null(_compute.index_in(column, value_set=pa.array(values, kind)), -1)
    names = feature.get("names") if isinstance(feature, dict) else None
    return number_labels(
        values,
        codes.to_numpy(),
        lambda row: f"Record {row:,} of '{uri}'",
        names=[str(name) for name in names] if isinstance(names, list) else None,
        renumber=True,
    )


def from_datasets(uri: str, dataset: Any) -> TableImages:
    """Return the images of a whole split that ``datasets`` has loaded."""
    return TableImages(uri, dataset.data, dataset.features.to_dict())


def find_parquet(uri: str) -> Splits | None:
    """Return the splits of a Parquet file, or of those in a folder or its split folders."""
    root = Path(uri).expanduser()
    tables: dict[str, list[Path]] = {}
    if root.is_file() and root.suffix == ".parquet":
        tables["train"] = [root]
    for path in sorted(root.glob("*.parquet")):
        tables.setdefault(split_in_name(path.stem), []).append(path)
    for name, folder in split_folders(root).items():
        if files := sorted(folder.glob("*.parquet")):
            tables.setdefault(name, []).extend(files)
    return Splits(list(tables), lambda split: _open_parquet(uri, tables[split])) if tables else None


def _open_parquet(uri: str, paths: list[Path]) -> TableImages:
    """Open the files of one split through the cache of ``datasets``; verify page checksums."""
    import datasets
    from pyarrow import dataset, parquet

    files: Any = []
    for path in paths:  # reading each file's metadata first names the file that is damaged
        try:
            if parquet.read_metadata(path).num_rows:
                files.append(str(path))
        except (OSError, pa.ArrowException) as error:
            message = f"'{path}' cannot be read as Parquet: {_reason(error)}."
            raise UserError("damaged", message) from None
    if not files:
        raise UserError("no-images", f"'{uri}' has no records ({paths[0].name} is empty).")
    datasets.disable_progress_bars()
    # datasets logs each error that it raises.
    logging.getLogger("datasets.packaged_modules.parquet").setLevel(logging.CRITICAL)
    verified = dataset.ParquetFragmentScanOptions(page_checksum_verification=True)
    try:
        table = datasets.Dataset.from_parquet(files, fragment_scan_options=verified)
        return from_datasets(uri, table)
    except UserError:
        raise
    except Exception as error:  # the readers raise many types for damaged types or features
        message = f"'{uri}' cannot be read as Parquet: {_reason(error)}."
        raise UserError("damaged", message) from None


def find_saved_dataset(uri: str) -> Splits | None:
    """Return the splits of a folder written by ``datasets.save_to_disk`` or by ``pack``."""
    root = Path(uri).expanduser()
    if (root / "dataset_dict.json").is_file():
        splits = _field(root / "dataset_dict.json", "splits", list)
        return Splits([str(name) for name in splits], lambda split: _open_saved(uri, root / split))
    if (root / "state.json").is_file():
        return Splits(["train"], lambda _: _open_saved(uri, root))
    return None


def _open_saved(uri: str, folder: Path) -> TableImages:
    state = folder / "state.json"
    files = _field(state, "_data_files", list)
    names = [file.get("filename") for file in files if isinstance(file, dict)]
    names = [name for name in names if isinstance(name, str) and name]
    if not files or len(names) < len(files):
        raise UserError("damaged", f"'{state}' names no data files; save the data again.")
    features = _field(folder / "dataset_info.json", "features", dict)
    try:
        table = MappedTable([str(folder / Path(name).name) for name in names])
        return TableImages(uri, table, features)
    except (OSError, pa.ArrowException) as error:
        message = f"'{uri}' cannot be read as a saved dataset: {_reason(error)}."
        raise UserError("damaged", message) from None


def _field(path: Path, name: str, kind: type) -> Any:
    """Return a field of a JSON file of a saved dataset, checked to be of this type."""
    try:
        value = json.loads(path.read_bytes())[name]
        if not isinstance(value, kind):
            raise TypeError(f"'{name}' is no {kind.__name__}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        message = f"Cannot read '{path}': {_reason(error)}; save the data again."
        raise UserError("damaged", message) from None
    return value


def _reason(error: BaseException) -> str:
    """Return the reason in one line."""
    cause = error.__cause__ or error
    if isinstance(cause, KeyError):
        return f"{cause} is missing"
    return (str(cause).splitlines() or [type(cause).__name__])[0].rstrip(".")
