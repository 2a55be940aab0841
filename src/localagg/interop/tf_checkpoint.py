"""Read TensorFlow's V2 checkpoints without TensorFlow.

A checkpoint ``PREFIX`` is ``PREFIX.index`` and ``PREFIX.data-I-of-N``. The index is a LevelDB table
(sorted, prefix-compressed keys in checksummed blocks). Its first key, the empty one, holds a
BundleHeaderProto. Every other key is a variable's name and holds a BundleEntryProto: data type,
shape, data file, and the offset, size and checksum of its little-endian bytes. (TensorFlow's
tensor_bundle.proto and table format; LevelDB's doc/table_format.md.)

No claim of a file is trusted: each length is checked against the available bytes before anything
is allocated, and a wrong one raises :class:`UserError`.
"""

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from google.protobuf import message_factory, text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.message import DecodeError, Message

from ..errors import UserError, suggest
from ..io.crc32c import masked_crc32c
from .leveldb_table import DamagedIndex, read_table
from .tf_checkpoint_files import MOST_INDEX_BYTES, find_prefix, index_file, is_archive, unpack

_MOST_VARIABLES = 100_000
_MOST_SHARDS = 99_999  # five digits in a file name
_MOST_AXES = 32  # supported by every numpy
_MOST_ENTRY_BYTES = 1 << 20  # far above any real one; bounds what a parsed message takes
_MOST_BYTES, _STRING, _BFLOAT16, _BOOL = 1 << 62, 7, 14, 10

# TensorFlow's DataType numbers. numpy has no bfloat16: its values are exact in float32.
_DTYPES = {
    1: "<f4", 2: "<f8", 3: "<i4", 4: "|u1", 5: "<i2", 6: "|i1", _STRING: "O", 8: "<c8", 9: "<i8",
    _BOOL: "|b1", _BFLOAT16: "<f4", 17: "<u2", 18: "<c16", 19: "<f2", 22: "<u4", 23: "<u8",
}  # fmt: skip


# The fields used of tensor_bundle.proto, tensor_shape.proto and versions.proto.
_SCHEMA = """
name: "localagg/tensor_bundle.proto" package: "localagg" syntax: "proto3"
message_type { name: "Version"
  field { name: "min_consumer" number: 2 type: TYPE_INT32 } }
message_type { name: "Header"
  field { name: "num_shards" number: 1 type: TYPE_INT32 }
  field { name: "endianness" number: 2 type: TYPE_INT32 }
  field { name: "version" number: 3 type: TYPE_MESSAGE type_name: "Version" } }
message_type { name: "Axis"
  field { name: "size" number: 1 type: TYPE_INT64 } }
message_type { name: "Shape"
  field { name: "dim" number: 2 type: TYPE_MESSAGE type_name: "Axis" label: LABEL_REPEATED }
  field { name: "unknown_rank" number: 3 type: TYPE_BOOL } }
message_type { name: "Entry"
  field { name: "dtype" number: 1 type: TYPE_INT32 }
  field { name: "shape" number: 2 type: TYPE_MESSAGE type_name: "Shape" }
  field { name: "shard_id" number: 3 type: TYPE_INT32 }
  field { name: "offset" number: 4 type: TYPE_INT64 }
  field { name: "size" number: 5 type: TYPE_INT64 }
  field { name: "crc32c" number: 6 type: TYPE_FIXED32 }
  field { name: "slices" number: 7 type: TYPE_BYTES label: LABEL_REPEATED } }
"""
_MESSAGES = message_factory.GetMessages([text_format.Parse(_SCHEMA, FileDescriptorProto())])
_Header, _Entry = _MESSAGES["localagg.Header"], _MESSAGES["localagg.Entry"]


class _IndexEntry(NamedTuple):
    """The checked fields of a variable's entry in the index."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    sliced: bool


@contextlib.contextmanager
def open_tf_checkpoint(prefix: str | os.PathLike[str]) -> Iterator["TFCheckpoint"]:
    """Open a TensorFlow V2 checkpoint as a context.

    Args:
        prefix: ``model.ckpt-10`` or ``checkpoint-10``, one of the files that begin with it, a
            folder that holds one checkpoint or whose state file ``checkpoint`` names one, or a
            ``.tar`` or ``.tar.gz`` of these files (unpacked into a temporary folder until closed).

    Raises:
        UserError: no V2 checkpoint, a damaged index, or an archive member that is a link or leaves
            its folder.
    """
    path = Path(prefix)
    with contextlib.ExitStack() as stack:
        try:
            if is_archive(path):
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="localagg-"))
                checkpoint = TFCheckpoint(unpack(path, Path(folder)), archive=path)
            else:
                checkpoint = TFCheckpoint(find_prefix(path))
        except OSError as error:
            raise UserError(
                "environment", f"'{path}' cannot be read: {error.strerror or error}."
            ) from None
        yield checkpoint


class TFCheckpoint:
    """The variables of a checkpoint that :func:`open_tf_checkpoint` opened.

    ``names`` lists all variables in index order (sorted by bytes), without ``:0``.
    """

    names: list[str]

    def __init__(self, prefix: Path, *, archive: Path | None = None) -> None:
        self._prefix, self._archive = prefix, archive
        file = index_file(prefix)
        try:
            if file.stat().st_size > MOST_INDEX_BYTES:
                raise DamagedIndex("it is too large for an index")
            self._shards, self._entries = _read_index(file.read_bytes())
        except DamagedIndex as error:
            raise UserError(
                "damaged",
                f"'{self._shown(file)}' is not a whole index of a TensorFlow V2 checkpoint"
                f" ({error}); copy it again.",
            ) from None
        self.names = list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a variable's shape.

        Raises:
            UserError: unknown variable.
        """
        return self._entry(name).shape

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype of :meth:`read`'s array: float32 for bfloat16, object for text.

        Raises:
            UserError: unknown variable, or a type without numbers.
        """
        code = self._entry(name).dtype
        if code not in _DTYPES:
            raise self._unsupported(name, f"has TensorFlow's data type {code}")
        return np.dtype(_DTYPES[code]).newbyteorder("=")

    def read(self, name: str) -> np.ndarray:
        """Return a variable's values as a new array, after checking their checksum.

        Raises:
            UserError: unknown variable, missing or damaged data, text, a type without numbers, or a
                partitioned variable, which is saved in slices.
        """
        entry, dtype = self._entry(name), self.dtype(name)
        if entry.dtype == _STRING:
            raise self._unsupported(name, "holds text")
        if entry.sliced:
            raise self._unsupported(name, "was saved in slices")
        file = self._data_file(entry.shard)
        try:
            size = file.stat().st_size
            start, count = min(entry.offset, size), min(entry.size, size)
            data = np.fromfile(file, np.uint8, count, offset=start)
        except OSError as error:
            raise UserError(
                "not-found" if isinstance(error, FileNotFoundError) else "environment",
                f"'{self._shown(file)}' cannot be read: {error.strerror or error}; a checkpoint is"
                " its .index and its .data files together.",
            ) from None
        if len(data) < entry.size or masked_crc32c(data) != entry.crc:
            raise UserError(
                "damaged",
                f"'{self._shown(file)}' is damaged: '{name}' is cut or does not match its checksum;"
                " copy the file again.",
            )
        return _values(data, entry).reshape(entry.shape).astype(dtype, copy=False)

    def _entry(self, name: str) -> _IndexEntry:
        if name not in self._entries:
            raise UserError(
                "not-found",
                f"'{self._shown(self._prefix)}' has no variable '{name}'."
                f"{suggest(name, self.names)}",
            )
        return self._entries[name]

    def _unsupported(self, name: str, reason: str) -> UserError:
        where = f"'{name}' in '{self._shown(self._prefix)}'"
        return UserError("unsupported", f"{where} {reason}, which is unsupported; skip it.")

    def _data_file(self, shard: int) -> Path:
        return self._prefix.with_name(f"{self._prefix.name}.data-{shard:05d}-of-{self._shards:05d}")

    def _shown(self, file: Path) -> str:
        """Return a file's name for messages: a member of the archive, or its path."""
        return f"{self._archive}:{file.name}" if self._archive else str(file)


def _values(data: np.ndarray, entry: _IndexEntry) -> np.ndarray:
    """Convert bytes to values [n] of the entry's type."""
    if entry.dtype == _BOOL:
        return data != 0
    if entry.dtype == _BFLOAT16:
        return (data.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return data.view(_DTYPES[entry.dtype])


def _read_index(data: bytes) -> tuple[int, dict[str, _IndexEntry]]:
    """Return the number of data files, and the entries by name."""
    shards, last = 0, None
    entries: dict[str, _IndexEntry] = {}
    for count, (key, value) in enumerate(read_table(data)):
        if (key != b"") if last is None else (key <= last):
            raise DamagedIndex("its names are not in order")
        if count > _MOST_VARIABLES:
            raise DamagedIndex(f"it names more than {_MOST_VARIABLES:,} variables")
        last = key
        if not count:
            shards = _read_header(value)
        elif not key.startswith(b"\0"):  # such a key is a slice of a partitioned variable
            try:
                name = key.decode()
            except UnicodeDecodeError:
                raise DamagedIndex("a name is not UTF-8") from None
            entries[name] = _read_entry(value, shards)
    if not shards:
        raise DamagedIndex("it has no header")
    return shards, entries


def _parse(message: type[Message], data: bytes) -> Any:
    if len(data) > _MOST_ENTRY_BYTES:
        raise DamagedIndex("an entry is too large")
    try:
        return message.FromString(data)
    except DecodeError:
        raise DamagedIndex("an entry is not a protocol buffer") from None


def _read_header(data: bytes) -> int:
    """Return the number of data files."""
    header = _parse(_Header, data)
    if header.endianness:
        raise DamagedIndex("its numbers are big-endian; save it again on a little-endian host")
    if header.version.min_consumer > 1:
        raise DamagedIndex("it needs a newer reader")
    if not 0 < header.num_shards <= _MOST_SHARDS:
        raise DamagedIndex(f"it claims {header.num_shards} data files")
    return header.num_shards


def _read_entry(data: bytes, shards: int) -> _IndexEntry:
    """Return the checked fields of an entry."""
    entry = _parse(_Entry, data)
    dtype, offset, size = entry.dtype, entry.offset, entry.size
    shape = tuple(axis.size for axis in entry.shape.dim)
    if not (0 <= entry.shard_id < shards and 0 <= offset <= offset + size < _MOST_BYTES):
        raise DamagedIndex("a variable lies outside of all data files")
    if entry.shape.unknown_rank:
        raise DamagedIndex("a variable has no known shape")
    if len(shape) > _MOST_AXES or not all(0 <= axis < _MOST_BYTES for axis in shape):
        raise DamagedIndex("a variable has an impossible shape")
    sliced = len(entry.slices) > 0
    if dtype in _DTYPES and not sliced and dtype != _STRING:
        width = 2 if dtype == _BFLOAT16 else np.dtype(_DTYPES[dtype]).itemsize
        if math.prod(axis or 1 for axis in shape) * width >= _MOST_BYTES:
            raise DamagedIndex("a variable has an impossible shape")
        if math.prod(shape) * width != size:
            raise DamagedIndex("a variable's size does not match its shape")
    return _IndexEntry(dtype, shape, entry.shard_id, offset, size, entry.crc32c, sliced)
