"""Tables of encoded images: saved ``datasets``, Parquet, and data that ``datasets`` loads.

All of them are memory-mapped Arrow files: opening finds the positions of the images, and an image
is read on access. A saved dataset is opened without ``datasets``: its import takes longer than
opening a million records, and it reads a file that is cut off between two batches as if whole.
"""

import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from torch import Tensor

from ....errors import UserError
from ....io.console import notify
from ..image_files import read_file
from ..labels import number_labels
from ..source import Sample, Source, content_hash
from ..splits import Splits
from .table_columns import choose_image_column, is_binary, is_text, label_column

_FIRST = 512  # bytes of an image that tell its format
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
        raise OSError(f"'{file}' is damaged ({reason_of(error)}); copy or pack it again") from None


class TableImages(Source):
    """A table with a column of images and perhaps one of labels.

    See :mod:`.table_columns` for the choice of both.

    Args:
        uri: the table's name for messages.
        table: :class:`MappedTable`, or the table of ``datasets``; it can be pickled.
        features: the columns as ``datasets.Features.to_dict`` describes them; may be empty.
        column: the column of images. Default: by type, name and first bytes.
    """

    def __init__(
        self, uri: str, table: Any, features: dict[str, Any], column: str | None = None
    ) -> None:
        self.uri, self._table = uri, table
        first = functools.partial(first_bytes, table)
        chosen = choose_image_column(uri, table.schema, features, first, column)
        self._column, self.note = chosen
        self._open()
        self.classes: list[str] | None = None
        self.labels: Tensor | None = None
        label = label_column(table.column_names)
        if label is not None:
            found = _labels(uri, label, table.column(label), features.get(label))
            if found is not None:
                self.labels, self.classes = torch.from_numpy(found[0].astype(np.int64)), found[1]

    def _open(self) -> None:
        try:
            self._images, self._paths = _images_and_paths(self._table.column(self._column))
        except pa.ArrowException as error:
            message = f"'{self.uri}' is damaged: {reason_of(error)}; make it again."
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
    images, paths = (column, None) if is_binary(column.type) else (None, column)
    if pa.types.is_struct(column.type):
        images, paths = _child(column, "bytes"), _child(column, "path")
        if paths is not None and not is_text(paths.type):
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


def first_bytes(table: Any, name: str) -> bytes:
    """Return the beginning of the first value of a column that is not null."""
    column = table.column(name)
    if pa.types.is_struct(column.type):
        column = _child(column, "bytes")
    for chunk in column.chunks:
        chunk.validate(full=True)
        for value in chunk:
            if value.is_valid:
                return value.as_buffer().to_pybytes()[:_FIRST]
    return b""


def _labels(
    uri: str, name: str, column: Any, feature: Any
) -> tuple[np.ndarray, list[str] | None] | None:
    """Return the labels and class names of a column; None without labels."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    column.validate(full=True)
    if pa.types.is_floating(column.type):  # pandas stores integers with missing values so
        column = _whole_numbers(column)
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or is_text(kind)):
        notify(f"The column '{name}' of '{uri}' has the type {kind}, not classes; it is ignored.")
        return None
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


def _whole_numbers(column: Any) -> Any:
    """Return floating-point numbers as integers, NaN as null; unchanged if one has a fraction."""
    column = _compute.if_else(_compute.is_nan(column), None, column)
    whole = _compute.all(_compute.equal(column, _compute.round(column)))
    small = _compute.all(_compute.less(_compute.abs(column), 2.0**53))
    return column.cast(pa.int64()) if whole.as_py() and small.as_py() else column


def from_datasets(uri: str, dataset: Any, column: str | None = None) -> TableImages:
    """Return the images of a whole split that ``datasets`` has loaded."""
    return TableImages(uri, dataset.data, dataset.features.to_dict(), column)


def find_saved_dataset(uri: str, root: Path, column: str | None = None) -> Splits | None:
    """Return the splits of a folder written by ``datasets.save_to_disk`` or by ``pack``.

    Raises:
        UserError: its description is damaged.
    """
    if (root / "dataset_dict.json").is_file():
        splits = [str(name) for name in _field(root / "dataset_dict.json", "splits", list)]
        folders = {name: root / name for name in splits if (root / name).is_dir()}
    elif (root / "state.json").is_file():
        folders = {"train": root}
    else:
        return None
    for folder in folders.values():
        _field(folder / "state.json", "_data_files", list)

    def reads(path: str) -> bool:
        own = Path(path).suffix in (".arrow", ".json")
        return own and any((root / path).parent == place for place in [root, *folders.values()])

    return Splits([*folders], lambda split: _open_saved(uri, folders[split], column), root, reads)


def _open_saved(uri: str, folder: Path, column: str | None) -> TableImages:
    state = folder / "state.json"
    files = _field(state, "_data_files", list)
    names = [file.get("filename") for file in files if isinstance(file, dict)]
    names = [name for name in names if isinstance(name, str) and name]
    if not files or len(names) < len(files):
        raise UserError("damaged", f"'{state}' names no data files; save the data again.")
    features = _field(folder / "dataset_info.json", "features", dict)
    try:
        table = MappedTable([str(folder / Path(name).name) for name in names])
        return TableImages(uri, table, features, column)
    except (OSError, pa.ArrowException) as error:
        message = f"'{uri}' cannot be read as a saved dataset: {reason_of(error)}."
        raise UserError("damaged", message) from None


def _field(path: Path, name: str, kind: type) -> Any:
    """Return a field of a JSON file of a saved dataset, checked to be of this type."""
    try:
        value = json.loads(path.read_bytes())[name]
        if not isinstance(value, kind):
            raise TypeError(f"'{name}' is no {kind.__name__}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        message = f"Cannot read '{path}': {reason_of(error)}; save the data again."
        raise UserError("damaged", message) from None
    return value


def reason_of(error: BaseException) -> str:
    """Return the reason in one line."""
    cause = error.__cause__ or error
    if isinstance(cause, KeyError):
        return f"{cause} is missing"
    return (str(cause).splitlines() or [type(cause).__name__])[0].rstrip(".")
