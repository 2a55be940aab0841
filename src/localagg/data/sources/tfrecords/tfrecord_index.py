"""TFRecord framing, and the index that makes a folder of such files randomly accessible.

The index is built by reading everything once with verified checksums, and cached.
"""

import os
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ....errors import UserError
from ....io.crc32c import masked_crc32c
from ....io.files import read_at
from ..file_index import POSITIONS, Columns, cached_index, damaged, scan_files
from ..labels import number_labels
from .tf_example import BadExample, ImageExample, parse_example

RECORD_LIMIT = 1 << 28  # bytes; a larger length of an image's record is damage
_NAME = re.compile(r"(train|validation)-(\d{1,9})-(?:of-)?(\d{1,9})(?:\.tfrecords?)?")
_VERSION = 2
_DTYPES = {**POSITIONS, "crc": "uint32"}  # the stored checksum of the record's data


# --- Records --------------------------------------------------------------------------------------


def frame(data: bytes) -> bytes:
    """Return a record: length, checksum of the length, data, checksum of the data."""
    parts = (struct.pack("<Q", len(data)), data)
    return b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in parts)


def read_example(
    file: int, path: str | Path, offset: int, length: int = 0
) -> tuple[ImageExample, int, int]:
    """Read the record at ``offset`` of an open file: (image, length of the data, their checksum).

    Both checksums are verified, and the length is checked before anything is allocated. The
    expected ``length``, if it is right, saves a second read.

    Raises:
        UserError: the file is damaged or cut off there, or the record holds something else.
    """
    record = read_at(file, length + 16, offset)
    if len(record) < 12:
        raise damaged(path, offset, "the file ends inside the record's header")
    length, check = struct.unpack_from("<QI", record)
    if masked_crc32c(record[:8]) != check:
        reason = "" if offset else ", or it is no plain TFRecord file"
        raise damaged(path, offset, f"the checksum of the record's length is wrong{reason}")
    if length > RECORD_LIMIT:
        raise damaged(path, offset, f"a record of {length:,} bytes is no image")
    if len(record) != length + 16:
        fits = offset + length + 16 <= os.fstat(file).st_size
        record = read_at(file, length + 16, offset) if fits else b""
    if len(record) < length + 16:
        raise damaged(path, offset, "the file ends inside the record")
    data, crc = record[12:-4], int.from_bytes(record[-4:], "little")
    if masked_crc32c(data) != crc:
        raise damaged(path, offset, "the checksum of the record's data is wrong")
    try:
        return parse_example(data), length, crc
    except BadExample as error:
        message = (
            f"The record of '{path}' at byte {offset:,} is no image of the reference: {error}."
        )
        raise UserError("unsupported", message) from None


# --- Files ----------------------------------------------------------------------------------------


def files_by_split(folder: Path) -> dict[str, list[str]]:
    """Return the names of a folder's TFRecord files by their prefix, in the order of their numbers.

    Raises:
        UserError: files of two packings, or a missing file.
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
            names = f"{files[0][2]} and {files[-1][2]}"
            message = f"'{folder}' has {prefix} files of two packings ({names}); keep one packing."
            raise UserError("mismatch", message)
        # Places205 may have one file more than the names say, never fewer.
        absent = next((n for n, number in enumerate(numbers) if n != number), len(numbers))
        if absent < max(counts.pop(), max(numbers)):
            message = f"'{folder}' lacks number {absent} of its {prefix} files; copy it there."
            raise UserError("not-found", message)
    return {prefix: [name for _, _, name in files] for prefix, files in sorted(found.items())}


def check_first_record(folder: Path, files: dict[str, list[str]]) -> None:
    """Check that the first record of a folder's files is an image.

    Raises:
        UserError: it is damaged, or holds something else.
    """
    for name in (name for names in files.values() for name in names):
        with open(folder / name, "rb") as file:
            if os.fstat(file.fileno()).st_size:
                read_example(file.fileno(), folder / name, 0)
                return


# --- Index ----------------------------------------------------------------------------------------


def open_index(folder: Path, prefix: str, files: list[str]) -> Columns:
    """Return the index of a split in the order of the images: cached, or built if files changed.

    Raises:
        UserError: damage, with file and offset; stored indices that are not 0..N-1; labels that
            only some records have, or that are no class numbers.
    """
    return cached_index(
        folder, prefix, files, _VERSION, _DTYPES, lambda: build_index(folder, files)
    )


def build_index(folder: Path, files: list[str]) -> Columns:
    """Read every record of the files; return the columns of the index."""

    def scan(path: Path) -> Iterator[tuple[int, ...]]:
        with open(path, "rb") as file:
            size, offset = os.fstat(file.fileno()).st_size, 0
            while offset < size:
                (_, label, index), length, crc = read_example(file.fileno(), path, offset)
                labeled, indexed = label is not None, index is not None
                yield offset, length, crc, index or 0, indexed, label or 0, labeled
                offset += 16 + length

    names = ("offset", "length", "crc", "index", "indexed", "label", "labeled")
    columns = scan_files(folder, files, scan, names)

    def where(row: int) -> str:
        path = folder / files[columns["file"][row]]
        return f"The record of '{path}' at byte {columns['offset'][row]:,}"

    values, codes = np.unique(columns["label"], return_inverse=True)
    codes[columns["labeled"] == 0] = -1
    found = {name: columns[name].astype(dtype) for name, dtype in _DTYPES.items()}
    if labels := number_labels(values.tolist(), codes, where):
        found["label"] = labels[0]
    order = _order(columns["index"], columns["indexed"] == 1, where)
    return {name: column[order] for name, column in found.items()}


def _order(stored: np.ndarray, known: np.ndarray, where: Callable[[int], str]) -> np.ndarray:
    """Return the records in the order of their stored indices, which must be 0..N-1 or absent."""
    if not known.any():
        return np.arange(len(stored))
    if not known.all():
        row = int(np.argmin(known))
        message = f"{where(row)} stores no index, but other records do; pack the data again."
        raise UserError("damaged", message)
    order = np.argsort(stored, kind="stable")
    wrong = np.flatnonzero(stored[order] != np.arange(len(stored)))
    if len(wrong):
        row, due = int(order[wrong[0]]), int(wrong[0])
        reason = "a second time" if 0 <= stored[row] < due else f"but no record stores {due}"
        raise UserError(
            "mismatch",
            f"{where(row)} stores the index {stored[row]} {reason}; the split must store 0 to"
            f" {len(stored) - 1:,}, each once. Is a file missing, or of another packing?",
        )
    return order
