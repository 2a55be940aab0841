"""TFRecord framing, and the index that makes a folder of such files randomly accessible.

The index is built by reading everything once, checksums verified, and kept in a hidden file beside
the data, or in the user's cache folder where the data are read-only. Names, sizes and modification
times of the data files are stored with it; if any of them changed it is built again.
"""

import contextlib
import hashlib
import json
import os
import re
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..config import UserError
from ..crc32c import crc32c, masked
from ..logbook import say, showing
from .example import BadExample, ImageExample, parse_example
from .protocol import MOST_CLASSES

RECORD_LIMIT = 1 << 28  # bytes; an image's record that claims more is damage, not data
_NAME = re.compile(r"(train|validation)-(\d{1,9})-(?:of-)?(\d{1,9})(?:\.tfrecords?)?")
_VERSION = 1
_SHOW_EVERY = 256  # records
_COLUMNS = {"file": "int32", "offset": "int64", "length": "int64", "crc": "uint32"}


class Index(NamedTuple):
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
    label: np.ndarray | None
    """int64 [N], or None where the files store no labels."""


# --- Records --------------------------------------------------------------------------------------


def frame(data: bytes) -> bytes:
    """A record around ``data``: length, checksum, data, checksum."""
    length = struct.pack("<Q", len(data))
    sums = [struct.pack("<I", masked(crc32c(part))) for part in (length, data)]
    return length + sums[0] + data + sums[1]


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
    if masked(crc32c(header[:8])) != check:
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
    if masked(crc32c(content)) != stored:
        raise _damaged(path, offset, "the checksum of the record's data is wrong")
    return content, stored


def read_example(data: memoryview, path: Path, offset: int) -> ImageExample:
    """The image in a record's data.

    Raises:
        UserError: the record holds something else.
    """
    try:
        return parse_example(data)
    except BadExample as error:
        raise UserError(
            f"'{path}' holds at byte {offset:,} a record that is not an image of the reference's"
            f" files: {error}."
        ) from None


def _damaged(path: Path, offset: int, what: str) -> UserError:
    return UserError(
        f"'{path}' is damaged at byte {offset:,}: {what}; copy or pack this file again."
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
                f"'{folder}' holds {prefix} files of two packings ({files[0][2]} and"
                f" {files[-1][2]}, for example); keep those of one."
            )
        # Places205's files may be one more than their name says; fewer they never are.
        absent = next((n for n, number in enumerate(numbers) if n != number), len(numbers))
        if absent < max(counts.pop(), max(numbers)):
            raise UserError(
                f"'{folder}' lacks number {absent} of its {prefix} files (it has {files[0][2]} and"
                f" {len(files) - 1:,} more); copy it there."
            )
    return {prefix: [name for _, _, name in files] for prefix, files in sorted(found.items())}


# --- Building -------------------------------------------------------------------------------------


def build_index(folder: Path, files: list[str]) -> Index:
    """Read every record of the files, in order.

    Raises:
        UserError: damage, with file and offset; stored indices that are not 0..N-1; labels that
            only some records have, or that are no class numbers.
    """
    columns = {name: array("q") for name in (*_COLUMNS, "index", "label")}
    lacking = {"index": array("q"), "label": array("q")}  # rows without
    of = sum((folder / name).stat().st_size for name in files)
    done = 0
    with showing(f"indexing {files[0].split('-')[0]} of {folder.name}") as show:
        for number, name in enumerate(files):
            for offset, data, checksum in _scan(folder / name):
                example = read_example(data, folder / name, offset)
                for feature, rows in lacking.items():
                    if getattr(example, feature) is None:
                        rows.append(len(columns["file"]))
                stored = checksum, example.index or 0, example.label or 0
                for column, value in zip(
                    columns.values(), (number, offset, len(data), *stored), strict=True
                ):
                    column.append(value)
                done += 16 + len(data)
                if len(columns["file"]) % _SHOW_EVERY == 0:
                    show(done, of)
    arrays = {name: np.frombuffer(column, np.int64) for name, column in columns.items()}
    places: Any = {name: arrays[name].astype(kind) for name, kind in _COLUMNS.items()}
    index = Index(files, **places, label=arrays["label"])
    index = index._replace(label=_labels(folder, index, lacking["label"]))
    return _in_order(folder, index, arrays["index"], lacking["index"])


def _where(folder: Path, index: Index, row: Any) -> str:
    return f"'{folder / index.files[index.file[row]]}' at byte {index.offset[row]:,}"


def _labels(folder: Path, index: Index, lacking: array) -> np.ndarray | None:
    label = index.label
    assert label is not None
    if len(lacking) == len(label) or bool((label == -1).all()):
        return None  # the reference reads a label that is not there as -1
    if len(lacking):
        raise UserError(
            f"{_where(folder, index, lacking[0])} stores no label, but other records do; pack the"
            " data again, with or without labels."
        )
    wrong = np.flatnonzero((label < 0) | (label >= MOST_CLASSES))
    if len(wrong):
        raise UserError(
            f"{_where(folder, index, wrong[0])} stores the label {label[wrong[0]]}; labels are"
            f" class numbers from 0 to {MOST_CLASSES - 1:,}."
        )
    return label


def _in_order(folder: Path, index: Index, stored: np.ndarray, lacking: array) -> Index:
    """The index sorted by what the records say is their index, which must be 0..N-1."""
    if len(lacking) == len(stored):
        return index  # packed without: the order of the records
    if len(lacking):
        raise UserError(
            f"{_where(folder, index, lacking[0])} stores no index, but other records do; pack the"
            " data again."
        )
    order = np.argsort(stored, kind="stable")
    wrong = np.flatnonzero(stored[order] != np.arange(len(stored)))
    if len(wrong):
        row, due = order[wrong[0]], int(wrong[0])
        what = "a second time" if 0 <= stored[row] < due else f"but no record stores {due}"
        raise UserError(
            f"{_where(folder, index, row)} stores the index {stored[row]} {what}; the"
            f" {len(stored):,} records of {index.files[0].split('-')[0]} must hold 0 to"
            f" {len(stored) - 1:,}, each once (a file may be missing, or of another packing)."
        )
    columns: Any = {
        name: column[order]
        for name, column in index._asdict().items()
        if isinstance(column, np.ndarray)
    }
    return index._replace(**columns)


# --- Cache ----------------------------------------------------------------------------------------


def cached_index(folder: Path, prefix: str, files: list[str]) -> Index:
    """The index of a split: from its cache if the files did not change, else built and cached.

    Raises:
        UserError: as :func:`build_index`.
    """
    folder = folder.resolve()
    try:
        stats = [(folder / name).stat() for name in files]
        state = [[n, s.st_size, s.st_mtime_ns] for n, s in zip(files, stats, strict=True)]
        key = json.dumps({"version": _VERSION, "files": state})
        places = _cache_places(folder, prefix)
        for place in places:
            if (index := _load(place, key, files)) is not None:
                return index
        index = build_index(folder, files)
    except OSError as error:
        raise UserError(f"The TFRecords in '{folder}' cannot be read: {error}.") from None
    _save(places, key, index)
    return index


def _cache_places(folder: Path, prefix: str) -> list[Path]:
    """Where the index may lie, best first: beside the data unless the folder is read-only."""
    name = f"localagg-index-{prefix}.safetensors"
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]
    places = [folder / f".{name}", home / "localagg" / "tfrecords" / digest / name]
    # An administrator may write anywhere; a folder without a write bit is still meant to stay.
    writable = os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222
    return places if writable else places[::-1]


def _load(place: Path, key: str, files: list[str]) -> Index | None:
    """The index in a cache file; None if there is none, or it is of other files, or damaged."""
    try:
        with safe_open(place, framework="np") as cache:
            if (cache.metadata() or {}).get("localagg") != key:
                return None
            found = {name: cache.get_tensor(name) for name in cache.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    label = found.get("label")
    kinds = _COLUMNS if label is None else {**_COLUMNS, "label": "int64"}
    shapes = {column.shape for column in found.values()}
    if {n: str(c.dtype) for n, c in found.items()} != kinds or len(shapes) != 1:
        return None
    if len(found["file"]) and not (
        0 <= found["file"].min() <= found["file"].max() < len(files) and found["offset"].min() >= 0
    ):
        return None
    return Index(files, **{"label": None, **found})


def _save(places: list[Path], key: str, index: Index) -> None:
    """Write the cache beside its name and rename it, so that other processes see all or nothing."""
    columns = {name: np.ascontiguousarray(getattr(index, name)) for name in _COLUMNS}
    if index.label is not None:
        columns["label"] = np.ascontiguousarray(index.label)
    content = save(columns, metadata={"localagg": key})
    for place in places:
        beside = place.with_name(f"{place.name}.{os.getpid()}.tmp")
        try:
            if not place.parent.is_dir():
                place.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(content)
            os.replace(beside, place)
            return
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
    where = " or ".join(f"'{place.parent}'" for place in places)
    say(f"The index of the TFRecords cannot be written to {where}; it is built each time.")
