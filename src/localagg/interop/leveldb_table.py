"""Read LevelDB tables, the format of a TensorFlow checkpoint's index.

Source: LevelDB's doc/table_format.md and doc/impl.md. Every length is checked against the
available bytes before anything is read.
"""

from collections.abc import Iterator

from ..io.crc32c import masked_crc32c

_MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")  # a table's last bytes
_FOOTER = 48  # two block handles, padding, magic
_TRAILER = 5  # a block's compression type and checksum
_LONGEST_KEY = 4096


class DamagedIndex(Exception):
    """Inconsistent contents of an index file; the message names the problem."""


def read_table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the (key, value) pairs of a LevelDB table in file order.

    Raises:
        DamagedIndex: not a table, a wrong checksum or length, compression, or overlapping blocks,
            which would let a small file expand without bound.
    """
    if len(data) < _FOOTER or data[-8:] != _MAGIC:
        raise DamagedIndex("it has no table footer")
    meta_offset, meta_size, index_offset, index_size = _varints(data[-_FOOTER:-8], 0, 4)[0]
    _read_block(data, meta_offset, meta_size)  # empty, but its checksum covers part of the file
    end = 0
    for _, handle in _pairs(_read_block(data, index_offset, index_size)):
        offset, size = _varints(handle, 0, 2)[0]
        if offset < end:
            raise DamagedIndex("its blocks overlap")
        end = offset + size + _TRAILER
        yield from _pairs(_read_block(data, offset, size))


def _read_block(data: bytes, offset: int, size: int) -> bytes:
    end = offset + size
    if end + _TRAILER > len(data) - _FOOTER:
        raise DamagedIndex("a block ends outside of the file")
    crc = int.from_bytes(data[end + 1 : end + _TRAILER], "little")
    if masked_crc32c(data[offset : end + 1]) != crc:
        raise DamagedIndex("a block does not match its checksum")
    if data[end]:
        raise DamagedIndex("it is compressed, unlike TensorFlow's own; save it again")
    return data[offset:end]


def _pairs(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield (key, value) of a block; a key is stored without the prefix shared with the last."""
    restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 * (restarts + 1)
    if not restarts or end < 0:
        raise DamagedIndex("a block has no room for its restarts")
    entries, at, key = block[:end], 0, b""
    while at < end:
        (shared, own, length), at = _varints(entries, at, 3)
        if shared > len(key) or own + length > end - at or shared + own > _LONGEST_KEY:
            raise DamagedIndex("a name or value ends outside of its block")
        key = key[:shared] + entries[at : at + own]
        at += own + length
        yield key, entries[at - length : at]


def _varints(data: bytes, at: int, count: int) -> tuple[list[int], int]:
    """Return ``count`` consecutive varints and the position after them."""
    values = []
    for _ in range(count):
        value, at = _varint(data, at)
        values.append(value)
    return values, at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return (value below 2 ** 64, position after it)."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise DamagedIndex("a number is cut off")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80 and value < 1 << 64:
            return value, at
        if byte < 0x80:
            break
    raise DamagedIndex("a number has too many digits")
