"""Reads TensorFlow's V2 checkpoints without TensorFlow.

A checkpoint ``PREFIX`` is ``PREFIX.index`` and ``PREFIX.data-I-of-N``. The index is a LevelDB table
(sorted, prefix-compressed keys in checksummed blocks). Its first key, the empty one, holds a
BundleHeaderProto, every other key is the name of a variable and holds a BundleEntryProto: data
type, shape, and where in which data file its bytes lie, little-endian, with their checksum.
(TensorFlow's tensor_bundle.proto and table format; LevelDB's doc/table_format.md.)

Nothing that a file claims is trusted: every length is held against what is there before anything
is allocated, and a false one is a :class:`UserError`.
"""

import math
import os
import tempfile
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from ..errors import UserError, suggest
from ..io.crc32c import masked_crc32c
from .leveldb_table import DamagedIndex, fields, read_table
from .tf_checkpoint_files import MOST_INDEX_BYTES, find_prefix, index_file, is_archive, unpack

_MOST_VARIABLES = 100_000
_MOST_SHARDS = 99_999  # five digits in a file name
_MOST_AXES = 32  # what every numpy takes
_FULL, _STRING, _BFLOAT16, _BOOL = 1 << 62, 7, 14, 10

# TensorFlow's DataType numbers. numpy has no bfloat16: its values are exact in float32.
_DTYPES = {
    1: "<f4", 2: "<f8", 3: "<i4", 4: "|u1", 5: "<i2", 6: "|i1", _STRING: "O", 8: "<c8", 9: "<i8",
    _BOOL: "|b1", _BFLOAT16: "<f4", 17: "<u2", 18: "<c16", 19: "<f2", 22: "<u4", 23: "<u8",
}  # fmt: skip


class _Entry(NamedTuple):
    """A BundleEntryProto."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    sliced: bool


def open_tf_checkpoint(prefix: str | os.PathLike[str]) -> "TFCheckpoint":
    """Open a TensorFlow V2 checkpoint; to be used in a ``with``.

    Args:
        prefix: ``model.ckpt-10`` or ``checkpoint-10``, one of the files that begin with it, a
            folder that holds one checkpoint or whose state file ``checkpoint`` names one, or a
            ``.tar`` or ``.tar.gz`` of such files (unpacked into a temporary folder until closed).

    Raises:
        UserError: there is no such checkpoint, it is V1, its index is damaged, a data file is
            missing or too short, or an archive has a member that is a link or leaves its folder.
    """
    path = Path(prefix)
    try:
        if not is_archive(path):
            return TFCheckpoint(find_prefix(path))
        unpacked = tempfile.TemporaryDirectory(prefix="localagg-")
        try:
            inside = unpack(path, Path(unpacked.name))
            return TFCheckpoint(inside, archive=path, unpacked=unpacked)
        except BaseException:
            unpacked.cleanup()
            raise
    except OSError as error:
        raise UserError("TODO", f"'{path}' cannot be read: {error.strerror or error}.") from None


class TFCheckpoint:
    """The variables of an open checkpoint; made by :func:`open_tf_checkpoint`.

    ``names`` are those of all variables in the order of the index (sorted by bytes), as TensorFlow
    spells them, without ``:0``.
    """

    names: list[str]

    def __init__(
        self,
        prefix: Path,
        *,
        archive: Path | None = None,
        unpacked: tempfile.TemporaryDirectory[str] | None = None,
    ) -> None:
        self._prefix, self._archive, self._unpacked = prefix, archive, unpacked
        file = index_file(prefix)
        try:
            if file.stat().st_size > MOST_INDEX_BYTES:
                raise DamagedIndex("it is too large for an index")
            self._shards, self._entries = _read_index(file.read_bytes())
        except DamagedIndex as error:
            raise UserError(
                "TODO",
                f"'{self._shown(file)}' is not a whole index of a TensorFlow V2 checkpoint"
                f" ({error}); copy it again.",
            ) from None
        self.names = list(self._entries)
        self._check_shards()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a variable.

        Raises:
            UserError: there is no such variable.
        """
        return self._entry(name).shape

    def dtype(self, name: str) -> np.dtype:
        """Type of the array that :meth:`read` returns: float32 for bfloat16, object for text.

        Raises:
            UserError: there is no such variable, or its type is not one of numbers.
        """
        code = self._entry(name).dtype
        if code not in _DTYPES:
            raise UserError(
                "TODO",
                f"'{name}' in '{self._shown(self._prefix)}' has TensorFlow's data type {code},"
                " which is not read: leave this variable out.",
            )
        return np.dtype(_DTYPES[code]).newbyteorder("=")

    def read(self, name: str) -> np.ndarray:
        """The values of a variable, once their checksum was found right.

        Returns:
            A new array of :meth:`shape` and :meth:`dtype`.

        Raises:
            UserError: there is no such variable, it is damaged, text, of another type than numbers,
                or saved in slices (a partitioned variable).
        """
        entry, dtype = self._entry(name), self.dtype(name)
        where = f"'{name}' in '{self._shown(self._prefix)}'"
        if entry.dtype == _STRING or entry.sliced:
            what = "holds text" if entry.dtype == _STRING else "was saved in slices"
            raise UserError("TODO", f"{where} {what}, which is not read: leave this variable out.")
        data = np.empty(entry.size, np.uint8)
        file = self._shard_file(entry.shard)
        try:
            with open(file, "rb", buffering=0) as source:
                source.seek(entry.offset)
                count = 0
                while count < len(data):
                    got = source.readinto(data[count:])  # type: ignore[arg-type]
                    if not got:
                        break
                    count += got
        except OSError as error:
            raise UserError("TODO", f"{where} cannot be read: {error.strerror or error}.") from None
        if count < len(data) or masked_crc32c(data) != entry.crc:
            raise UserError(
                "TODO",
                f"'{self._shown(file)}' is damaged: '{name}' does not have its checksum; copy the"
                " file again.",
            )
        return _values(data, entry).reshape(entry.shape).astype(dtype, copy=False)

    def close(self) -> None:
        """Remove what was unpacked from an archive."""
        if self._unpacked is not None:
            self._unpacked.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            like = suggest(name, self.names)
            raise UserError(
                "TODO", f"'{self._shown(self._prefix)}' has no variable '{name}'.{like}"
            )
        return self._entries[name]

    def _shard_file(self, shard: int) -> Path:
        return self._prefix.with_name(f"{self._prefix.name}.data-{shard:05d}-of-{self._shards:05d}")

    def _shown(self, file: Path) -> str:
        """A file as the user knows it."""
        return f"{self._archive}:{file.name}" if self._archive else str(file)

    def _check_shards(self) -> None:
        """Make sure that the bytes of all variables are there."""
        ends: dict[int, int] = {}
        bytes_of: dict[int, int] = {}
        for entry in self._entries.values():
            if not entry.sliced:
                end = entry.offset + entry.size
                ends[entry.shard] = max(ends.get(entry.shard, 0), end)
                bytes_of[entry.shard] = bytes_of.get(entry.shard, 0) + entry.size
        for shard, end in sorted(ends.items()):
            file = self._shard_file(shard)
            if not file.is_file():
                raise UserError(
                    "TODO",
                    f"'{self._shown(file)}' is missing; a checkpoint is its .index and its .data"
                    " files together, so copy it beside the index.",
                )
            size = file.stat().st_size
            # TensorFlow writes one variable after the other: they do not share bytes.
            if size < max(end, bytes_of[shard]):
                raise UserError(
                    "TODO",
                    f"'{self._shown(file)}' is truncated: it has {size:,} bytes of at least"
                    f" {max(end, bytes_of[shard]):,}; copy it again.",
                )


def _values(data: np.ndarray, entry: _Entry) -> np.ndarray:
    """Bytes as values [n] of the entry's type."""
    if entry.dtype == _BOOL:
        return data != 0
    if entry.dtype == _BFLOAT16:
        return (data.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return data.view(_DTYPES[entry.dtype])


def _read_index(data: bytes) -> tuple[int, dict[str, _Entry]]:
    """Number of data files, and the entries by name."""
    shards, last = 0, None
    entries: dict[str, _Entry] = {}
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


def _read_header(message: bytes) -> int:
    """Number of data files out of a BundleHeaderProto."""
    shards = 0
    for number, value, inner in fields(message, {1: 0, 2: 0, 3: 2}):
        if number == 1:
            shards = value
        elif number == 2 and value:
            raise DamagedIndex(
                "its numbers are big-endian; save it again on a little-endian machine"
            )
        elif number == 3:
            for part, version, _ in fields(inner, {1: 0, 2: 0}):
                if part == 2 and version > 1:
                    raise DamagedIndex("it asks for a newer reader than this one")
    if not 0 < shards <= _MOST_SHARDS:
        raise DamagedIndex(f"it claims {shards} data files")
    return shards


def _read_entry(message: bytes, shards: int) -> _Entry:
    """A BundleEntryProto, its numbers within reason."""
    numbers = dict.fromkeys((1, 3, 4, 5, 6), 0)  # what is 0 is left out
    shape: tuple[int, ...] = ()
    sliced = False
    for number, value, inner in fields(message, {1: 0, 2: 2, 3: 0, 4: 0, 5: 0, 6: 5, 7: 2}):
        if number == 2:
            shape += _read_shape(inner)
        elif number == 7:
            sliced = True
        elif number in numbers:
            numbers[number] = value
    dtype, shard, offset, size, crc = numbers.values()
    if shard >= shards or offset + size >= _FULL:  # negative ones too: varints above 2 ** 63
        raise DamagedIndex("a variable lies outside of all data files")
    if len(shape) > _MOST_AXES or max(shape, default=0) >= _FULL:
        raise DamagedIndex("a variable has an impossible shape")
    if dtype in _DTYPES and not sliced and dtype != _STRING:
        width = 2 if dtype == _BFLOAT16 else np.dtype(_DTYPES[dtype]).itemsize
        if math.prod(axis or 1 for axis in shape) * width >= _FULL:
            raise DamagedIndex("a variable has an impossible shape")
        if math.prod(shape) * width != size:
            raise DamagedIndex("a variable's size is not that of its shape")
    return _Entry(dtype, shape, shard, offset, size, crc, sliced)


def _read_shape(message: bytes) -> tuple[int, ...]:
    """A TensorShapeProto."""
    shape = []
    for number, value, inner in fields(message, {2: 2, 3: 0}):
        if number == 3 and value:
            raise DamagedIndex("a variable has no known shape")
        if number == 2:
            axis = 0
            for part, length, _ in fields(inner, {1: 0}):
                axis = length if part == 1 else axis
            shape.append(axis)
    return tuple(shape)
