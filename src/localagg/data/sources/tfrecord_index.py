"""TFRecord framing, and the index that makes a folder of such files randomly accessible.

The index is built by reading everything once, checksums verified, and kept (see ``index_cache``).
"""

import os
import re
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ...errors import UserError
from ...io.console import show_progress
from ...io.crc32c import masked_crc32c
from .index_cache import Columns, cached_columns
from .source import MOST_CLASSES
from .tf_example import BadExample, ImageExample, parse_example

RECORD_LIMIT = 1 << 28  # bytes; an image's record that claims more is damage, not data
_NAME = re.compile(r"(train|validation)-(\d{1,9})-(?:of-)?(\d{1,9})(?:\.tfrecords?)?")
_VERSION = 2
_SHOW_EVERY = 256  # records
_COLUMNS = {
    **{"file": "int32", "offset": "int64", "length": "int64", "crc": "uint32"},
    **{"start": "int32", "size": "int32"},
}


class TFRecordIndex(NamedTuple):
    """Where the images of a split are, in the order of their index."""

    files: list[str]
    """Names of the split's files."""
    file: np.ndarray
    """int32 [N], which of them."""
    offset: np.ndarray
    """int64 [N], bytes to the record's start."""
    length: np.ndarray
    """int64 [N], bytes of the record's data."""
    crc: np.ndarray
    """uint32 [N], the stored checksum of the record's data."""
    start: np.ndarray
    """int32 [N], where in the record's data the image begins; -1 where it lies there in pieces."""
    size: np.ndarray
    """int32 [N], bytes of the image."""
    label: np.ndarray | None
    """int64 [N], or None where the files store no labels."""


# --- Records ------------------------------------------------------------------------------------------


def frame(data: bytes) -> bytes:
    """A record around ``data``: length, checksum, data, checksum."""
    return _header(len(data)) + data + struct.pack("<I", masked_crc32c(data))


def _header(length: int) -> bytes:
    packed = struct.pack("<Q", length)
    return packed + struct.pack("<I", masked_crc32c(packed))


def read_record(file: BinaryIO, path: Path, offset: int) -> tuple[memoryview, int]:
    """The record at ``offset``, where the file stands: its data, and the stored checksum of it.

    Both checksums are verified, and lengths before anything is allocated.

    Raises:
        UserError: damaged or cut off there.
    """
    size = os.fstat(file.fileno()).st_size
    header = file.read(12)
    if len(header) < 12:
        raise _damaged(path, offset, "the file ends inside the record's header")
    length, check = struct.unpack("<QI", header)
    if masked_crc32c(header[:8]) != check:
        what = "the checksum of the record's length is wrong"
        raise _damaged(path, offset, what if offset else f"{what}, or it is no plain TFRecord file")
    if length > RECORD_LIMIT:
        raise _damaged(path, offset, f"a record of {length:,} bytes is no image")
    if offset + 16 + length > size:
        raise _damaged(path, offset, "the file ends inside the record")
    data = file.read(length + 4)
    if len(data) < length + 4:
        raise _damaged(path, offset, "the file ends inside the record")
    content = memoryview(data)[:length]
    stored = int.from_bytes(data[length:], "little")
    if masked_crc32c(content) != stored:
        raise _damaged(path, offset, "the checksum of the record's data is wrong")
    return content, stored


def read_image(path: Path, index: TFRecordIndex, row: int) -> bytes | None:
    """The image of a row, if its record is what was indexed: one read, and both checksums, but no
    parsing. None where the record is another or damaged, or the image does not lie there in one
    piece; :func:`read_record` says what is the matter.
    """
    offset, length = int(index.offset[row]), int(index.length[row])
    start, size, crc = int(index.start[row]), int(index.size[row]), int(index.crc[row])
    file = os.open(path, os.O_RDONLY)
    try:
        record = os.pread(file, length + 16, offset)
    finally:
        os.close(file)
    data = record[12:-4]
    whole = len(data) == length and record[:12] == _header(length)
    whole = whole and masked_crc32c(data) == crc == int.from_bytes(record[-4:], "little")
    return data[start : start + size] if whole and start >= 0 else None


def read_example(data: memoryview, path: Path, offset: int) -> ImageExample:
    """The image in a record's data.

    Raises:
        UserError: the record holds something else.
    """
    try:
        return parse_example(data)
    except BadExample as error:
        raise UserError(
            "TODO",
            f"'{path}' holds at byte {offset:,} a record that is not an image of the reference's"
            f" files: {error}.",
        ) from None


def _damaged(path: Path, offset: int, what: str) -> UserError:
    return UserError(
        "TODO", f"'{path}' is damaged at byte {offset:,}: {what}; copy or pack this file again."
    )


def _scan(path: Path) -> Iterator[tuple[int, memoryview, int]]:
    """(offset, data, checksum) of every record of a file."""
    with open(path, "rb", buffering=1 << 20) as file:
        size, offset = os.fstat(file.fileno()).st_size, 0
        while offset < size:
            data, checksum = read_record(file, path, offset)
            yield offset, data, checksum
            offset += 16 + len(data)


# --- Files ----------------------------------------------------------------------------------------


def files_by_split(folder: Path) -> dict[str, list[str]]:
    """Names of the TFRecord files in a folder by their prefix, in the order of their numbers.

    Raises:
        UserError: files of two packings, or a file of the numbered ones is missing.
    """
    found: dict[str, list[tuple[int, int, str]]] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if (match := _NAME.fullmatch(entry.name)) and entry.is_file():
                prefix, number, count = match.groups()
                found.setdefault(prefix, []).append((int(number), int(count), entry.name))
    for prefix, files in found.items():
        files.sort()
        counts = {count for _, count, _ in files}
        numbers = [number for number, _, _ in files]
        if len(counts) > 1 or len(set(numbers)) < len(numbers):
            raise UserError(
                "TODO",
                f"'{folder}' holds {prefix} files of two packings ({files[0][2]} and"
                f" {files[-1][2]}, for example); keep those of one.",
            )
        # Places205's files may be one more than their name says; fewer they never are.
        absent = next((n for n, number in enumerate(numbers) if n != number), len(numbers))
        if absent < max(counts.pop(), max(numbers)):
            raise UserError(
                "TODO",
                f"'{folder}' lacks number {absent} of its {prefix} files (it has {files[0][2]} and"
                f" {len(files) - 1:,} more); copy it there.",
            )
    return {prefix: [name for _, _, name in files] for prefix, files in sorted(found.items())}


# --- Building -------------------------------------------------------------------------------------


def build_index(folder: Path, files: list[str]) -> TFRecordIndex:
    """Read every record of the files, in order.

    Raises:
        UserError: damage, with file and offset; stored indices that are not 0..N-1; labels that
            only some records have, or that are no class numbers.
    """
    columns = {name: array("q") for name in (*_COLUMNS, "index", "label")}
    lacking = {"index": array("q"), "label": array("q")}  # rows without
    of = sum((folder / name).stat().st_size for name in files)
    done = 0
    with show_progress(f"indexing {files[0].split('-')[0]} of {folder.name}") as show:
        for number, name in enumerate(files):
            for offset, data, checksum in _scan(folder / name):
                example = read_example(data, folder / name, offset)
                for feature, rows in lacking.items():
                    if getattr(example, feature) is None:
                        rows.append(len(columns["file"]))
                start = bytes(data).find(example.image)  # -1 where it was joined from pieces
                place = number, offset, len(data), checksum, start, len(example.image)
                stored = example.index or 0, example.label or 0
                for column, value in zip(columns.values(), (*place, *stored), strict=True):
                    column.append(value)
                done += 16 + len(data)
                if len(columns["file"]) % _SHOW_EVERY == 0:
                    show(done, of)
    arrays = {name: np.frombuffer(column, np.int64) for name, column in columns.items()}
    places: Any = {name: arrays[name].astype(kind) for name, kind in _COLUMNS.items()}
    index = TFRecordIndex(files, **places, label=arrays["label"])
    index = index._replace(label=_labels(folder, index, lacking["label"]))
    return _in_order(folder, index, arrays["index"], lacking["index"])


def _where(folder: Path, index: TFRecordIndex, row: Any) -> str:
    return f"'{folder / index.files[index.file[row]]}' at byte {index.offset[row]:,}"


def _labels(folder: Path, index: TFRecordIndex, lacking: array) -> np.ndarray | None:
    label = index.label
    assert label is not None
    if len(lacking) == len(label) or bool((label == -1).all()):
        return None  # the reference reads a label that is not there as -1
    if len(lacking):
        raise UserError(
            "TODO",
            f"{_where(folder, index, lacking[0])} stores no label, but other records do; pack the"
            " data again, with or without labels.",
        )
    wrong = np.flatnonzero((label < 0) | (label >= MOST_CLASSES))
    if len(wrong):
        raise UserError(
            "TODO",
            f"{_where(folder, index, wrong[0])} stores the label {label[wrong[0]]}; labels are"
            f" class numbers from 0 to {MOST_CLASSES - 1:,}.",
        )
    return label


def _in_order(
    folder: Path, index: TFRecordIndex, stored: np.ndarray, lacking: array
) -> TFRecordIndex:
    """The index sorted by what the records say is their index, which must be 0..N-1."""
    if len(lacking) == len(stored):
        return index  # packed without: the order of the records
    if len(lacking):
        raise UserError(
            "TODO",
            f"{_where(folder, index, lacking[0])} stores no index, but other records do; pack the"
            " data again.",
        )
    order = np.argsort(stored, kind="stable")
    wrong = np.flatnonzero(stored[order] != np.arange(len(stored)))
    if len(wrong):
        row, due = order[wrong[0]], int(wrong[0])
        what = "a second time" if 0 <= stored[row] < due else f"but no record stores {due}"
        raise UserError(
            "TODO",
            f"{_where(folder, index, row)} stores the index {stored[row]} {what}; the"
            f" {len(stored):,} records of {index.files[0].split('-')[0]} must hold 0 to"
            f" {len(stored) - 1:,}, each once (a file may be missing, or of another packing).",
        )
    columns: Any = {
        name: column[order]
        for name, column in index._asdict().items()
        if isinstance(column, np.ndarray)
    }
    return index._replace(**columns)


# --- Cache ----------------------------------------------------------------------------------------


def cached_index(folder: Path, prefix: str, files: list[str]) -> TFRecordIndex:
    """The index of a split: from its cache if the files did not change, else built and cached.

    Raises:
        UserError: as :func:`build_index`.
    """

    def build() -> Columns:
        columns = build_index(folder, files)._asdict()
        return {name: column for name, column in columns.items() if isinstance(column, np.ndarray)}

    def valid(found: Columns) -> bool:
        kinds = {**_COLUMNS, "label": "int64"} if "label" in found else _COLUMNS
        shapes = {column.shape for column in found.values()}
        if {n: str(c.dtype) for n, c in found.items()} != kinds or len(shapes) != 1:
            return False
        file, offset = found["file"], found["offset"]
        return not len(file) or bool(
            0 <= file.min() <= file.max() < len(files)
            and min(offset.min(), found["size"].min(), found["start"].min() + 1) >= 0
            and (found["start"].astype("int64") + found["size"] <= found["length"]).all()
        )

    try:
        columns = cached_columns(folder, prefix, files, _VERSION, build, valid)
    except OSError as error:
        raise UserError("TODO", f"The TFRecords in '{folder}' cannot be read: {error}.") from None
    arrays: Any = {"label": None, **columns}
    return TFRecordIndex(files, **arrays)
