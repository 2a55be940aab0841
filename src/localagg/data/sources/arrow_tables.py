"""Tables of encoded images: saved ``datasets``, Parquet, and whatever ``datasets`` loads.

All of them are Arrow files, memory-mapped: opening reads where things are, and an image is read
when it is asked for. A saved dataset is opened without ``datasets``, whose import takes longer than
the opening of a million records.
"""

import bisect
import itertools
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
from .source import (
    MOST_CLASSES,
    Sample,
    Source,
    Splits,
    fingerprint,
    read_file,
    split_folders,
    split_in_name,
)

_LABELS = ("label", "labels", "fine_label", "class", "target")
_compute: Any = pyarrow.compute  # its functions are made at run time, unknown to type checkers
_END = b"\xff\xff\xff\xff\0\0\0\0"  # how a stream of Arrow record batches ends


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
        """One column of all files."""
        return self._table.column(name)

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedTable, (self.files,)


def _mapped(file: str) -> pa.Table:
    try:
        with pa.memory_map(file) as mapped:
            size = mapped.size()
            # A file that is cut off between two batches looks whole to Arrow.
            mapped.seek(max(0, size - len(_END)))
            if mapped.read(len(_END)) != _END:
                raise ValueError(f"it is cut off at byte {size:,}")
            mapped.seek(0)
            table = pa.ipc.open_stream(mapped).read_all()
            table.column_names  # which may be no text  # noqa: B018
            return table
    except (OSError, ValueError, pa.ArrowException) as error:
        raise OSError(f"'{file}' is damaged ({_line(error)}); copy or pack it again") from None


class TableImages(Source):
    """A table with a column of images and perhaps one of labels.

    The image column is the first of type Image, or a struct with ``bytes``, or binary; the label
    column is the first named label, labels, fine_label, class or target.

    Args:
        uri: what the table is called.
        table: the table, which can be pickled: :class:`MappedTable`, or that of ``datasets``.
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
            self.labels, self.classes = found or (None, None)

    def _open(self) -> None:
        chunks = [chunk for chunk in self._table.column(self._column).chunks if len(chunk)]
        self._starts = list(itertools.accumulate(map(len, chunks), initial=0))
        try:
            self._chunks = [_parts(chunk) for chunk in chunks]
        except pa.ArrowException as error:
            raise UserError(
                "TODO", f"'{self.uri}' is damaged: {_line(error)}; make it again."
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_chunks", "_starts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        chunk = bisect.bisect_right(self._starts, index) - 1
        images, paths = self._chunks[chunk]
        row = index - self._starts[chunk]
        image = None if images is None else images[row].as_py()
        if image is None and paths is not None and (path := paths[row].as_py()):
            image = read_file(path)
        label = None if self.labels is None else int(self.labels[index])
        return Sample(index, image or b"", label)

    def name(self, index: int) -> str:
        """See :class:`~localagg.data.sources.source.Source`."""
        return f"record {index} of {self.uri}"

    def fingerprint(self) -> str:
        """Over the sizes and labels of all images, and the bytes of 64."""
        sizes = np.concatenate([_sizes(images, paths) for images, paths in self._chunks])
        labels = [] if self.labels is None else [self.labels.numpy()]
        return fingerprint(self, [sizes, *labels])

    def stored_bytes(self) -> int:
        """See :class:`~localagg.data.sources.source.Source`; files that a table only names count too."""
        total = 0
        for images, paths in self._chunks:
            sizes = _sizes(images, paths)
            total += int(sizes[sizes > 0].sum())
            if paths is not None:
                named = paths.filter(pa.array(sizes < 0)).to_pylist()
                total += sum(_size(path) for path in named if path)
        return total


def _size(path: str) -> int:
    """Of a file that a table names; 0 where there is none: to read it tells so."""
    try:
        return os.path.getsize(path)
    except (OSError, ValueError):  # ValueError: a NUL in it
        return 0


def _parts(chunk: Any) -> tuple[Any, Any]:
    """(encoded images or None, paths or None) of a piece of an image column, found to be sound.

    Reading an array whose offsets lie would be reading memory that is not its own.
    """
    chunk.validate()
    images: Any = chunk
    paths: Any = None
    if pa.types.is_struct(chunk.type):
        names = [field.name for field in chunk.type]
        images = chunk.field("bytes") if "bytes" in names else None
        paths = chunk.field("path") if "path" in names else None
        if paths is not None and not _is_text(paths.type):
            paths = None
    elif not _is_binary(chunk.type):
        images, paths = None, chunk
    if images is not None:
        images.validate(full=True)
    if images is not None and not images.null_count:
        return images, None
    if paths is not None:
        paths.validate(full=True)
    return images, paths


def _sizes(images: Any, paths: Any) -> np.ndarray:
    """Bytes of each image, int64; -1 where only its path is stored."""
    if images is None:
        return np.full(len(paths), -1)
    return _compute.fill_null(_compute.binary_length(images).cast(pa.int64()), -1).to_numpy(
        zero_copy_only=False
    )


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
    raise UserError("TODO", f"'{uri}' has no column of images; its columns are {columns}.")


def _labels(
    uri: str, name: str, column: pa.ChunkedArray, feature: Any
) -> tuple[Tensor, list[str]] | None:
    """(int64 [N], class names) of a column; None if it holds no classes, or -1 everywhere.

    Numbers of a ClassLabel are kept, -1 too, which says that an image has no label; other values
    are numbered in sorted order.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    integers = pa.types.is_integer(kind) or pa.types.is_boolean(kind)
    if not (integers or _is_text(kind)):
        notify(f"The column '{name}' of '{uri}' holds {kind}, no classes; it is left out.")
        return None
    column.validate(full=True)
    if column.null_count == len(column):
        return None
    if column.null_count:
        first = _compute.index(column.is_null(), True).as_py()
        raise UserError(
            "TODO",
            f"Record {first:,} of '{uri}' has no label in '{name}', but others do; give it one, or"
            " drop the column.",
        )
    names = feature.get("names") if isinstance(feature, dict) else None
    if not isinstance(names, list):
        names = None
    if integers and _compute.all(_compute.equal(column.cast(pa.int64()), -1)).as_py():
        return None  # how data sets on the Hub hide the labels of their test split
    if names is None:
        values = sorted(column.unique().to_pylist())
        if len(values) > MOST_CLASSES:
            raise UserError(
                "TODO", f"The column '{name}' of '{uri}' has {len(values):,} classes, too many."
            )
        found = _compute.index_in(column, value_set=pa.array(values, kind))
        return torch.from_numpy(found.to_numpy().astype(np.int64)), [str(v) for v in values]
    labels = column.to_numpy().astype(np.int64)
    wrong = np.flatnonzero((labels < -1) | (labels >= len(names)))
    if len(wrong):
        raise UserError(
            "TODO",
            f"Record {wrong[0]:,} of '{uri}' has the label {labels[wrong[0]]}, but '{name}' has"
            f" {len(names):,} classes.",
        )
    return torch.from_numpy(labels), [str(name) for name in names]


def from_datasets(uri: str, dataset: Any) -> TableImages:
    """A whole split that ``datasets`` has loaded.

    Raises:
        UserError: no images in it, or labels that are none.
    """
    return TableImages(uri, dataset.data, dataset.features.to_dict())


def find_parquet(uri: str, root: Path) -> Splits | None:
    """A Parquet file, or those under a folder or its split folders, by the split of their name."""
    tables: dict[str, list[Path]] = {}
    if root.is_file() and root.suffix == ".parquet":
        tables["train"] = [root]
    for path in sorted(root.glob("*.parquet")):
        tables.setdefault(split_in_name(path.stem), []).append(path)
    for name, folder in split_folders(root).items():
        if files := sorted(folder.glob("*.parquet")):
            tables.setdefault(name, []).extend(files)
    return Splits(list(tables), lambda split: _parquet(uri, tables[split])) if tables else None


def _parquet(uri: str, paths: list[Path]) -> TableImages:
    """Files of one split as ``datasets`` copies them to its cache; checksums of their pages are
    verified where they have any."""
    import datasets
    from pyarrow import dataset, parquet

    files: Any = []
    for path in paths:  # named one by one, before any is copied
        try:
            if parquet.read_metadata(path).num_rows:
                files.append(str(path))
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                "TODO", f"'{path}' cannot be read as Parquet: {_line(error)}."
            ) from None
    if not files:
        raise UserError(
            "TODO", f"'{uri}' holds no records in {paths[0].name}; is it the right file?"
        )
    datasets.disable_progress_bars()
    logger = logging.getLogger("datasets.packaged_modules.parquet")  # it tells errors a second time
    logger.setLevel(logging.CRITICAL)
    verified = dataset.ParquetFragmentScanOptions(page_checksum_verification=True)
    try:
        table = datasets.Dataset.from_parquet(files, fragment_scan_options=verified)
        return from_datasets(uri, table)
    except UserError:
        raise
    except Exception as error:  # whatever the readers raise where types or features are damaged
        raise UserError("TODO", f"'{uri}' cannot be read as Parquet: {_line(error)}.") from None


def find_saved_dataset(uri: str, root: Path) -> Splits | None:
    """A folder written by ``datasets.save_to_disk``, or by ``pack``."""
    if (root / "dataset_dict.json").is_file():
        splits = _field(root / "dataset_dict.json", "splits", list)
        return Splits([str(name) for name in splits], lambda split: _saved(uri, root / split))
    if (root / "state.json").is_file():
        return Splits(["train"], lambda _: _saved(uri, root))
    return None


def _saved(uri: str, folder: Path) -> TableImages:
    files = _field(folder / "state.json", "_data_files", list)
    names = [file.get("filename") for file in files if isinstance(file, dict)]
    names = [name for name in names if isinstance(name, str) and name]
    if not files or len(names) < len(files):
        raise UserError(
            "TODO", f"'{folder / 'state.json'}' names no files of data; save the data again."
        )
    features = _field(folder / "dataset_info.json", "features", dict)
    try:
        return TableImages(uri, MappedTable([str(folder / Path(n).name) for n in names]), features)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            "TODO", f"'{uri}' cannot be read as a saved dataset: {_line(error)}."
        ) from None


def _field(path: Path, name: str, kind: type) -> Any:
    """A field of a JSON file.

    Raises:
        UserError: there is none of this type, or no such file.
    """
    try:
        value = json.loads(path.read_bytes())[name]
        if not isinstance(value, kind):
            raise TypeError(f"'{name}' is no {kind.__name__}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            "TODO", f"'{path}' cannot be read as a saved dataset's: {_line(error)}; save it again."
        ) from None
    return value


def _line(error: BaseException) -> str:
    """The reason in one line."""
    cause = error.__cause__ or error
    if isinstance(cause, KeyError):
        return f"{cause} is missing"
    return (str(cause).splitlines() or [type(cause).__name__])[0].rstrip(".")
