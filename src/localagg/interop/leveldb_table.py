"""LevelDB tables and the fields of protocol buffers, as far as a TensorFlow index needs them.

LevelDB's doc/table_format.md and doc/impl.md; protobuf.dev's "Encoding". Every length is held
against what is there before anything is read.
"""

from collections.abc import Iterator

from ..io.crc32c import masked_crc32c

TABLE_MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")  # a table's last bytes
_FOOTER = 48  # two block handles, padding, magic
_TRAILER = 5  # of a block: compression, checksum
_LONGEST_NAME = 4096


class DamagedIndex(Exception):
    """What a file says cannot be; the message says what."""


def fields(data: bytes, kinds: dict[int, int]) -> Iterator[tuple[int, int, bytes]]:
    """(number, integer, bytes) of a protocol buffer's fields, one of the two by the wire type.

    Args:
        data: an encoded message.
        kinds: the wire type of each number that the caller knows (0 varint, 2 bytes, 5 fixed32).

    Raises:
        DamagedIndex: not a message, or a known number has another wire type.
    """
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kinds.get(number, kind) != kind:
            raise DamagedIndex("a field has the wrong type")
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value, b""
            continue
        if kind == 2:
            length, at = _varint(data, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise DamagedIndex("a field has an unknown type")
        if length > len(data) - at:
            raise DamagedIndex("a field ends outside of its message")
        piece = data[at : at + length]
        at += length
        yield (number, 0, piece) if kind == 2 else (number, int.from_bytes(piece, "little"), b"")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value below 2 ** 64, where the next begins)."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise DamagedIndex("a number is cut off")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, at
    raise DamagedIndex("a number has too many digits")


def read_table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) of a LevelDB table, block after block.

    Raises:
        DamagedIndex: not a table, a false checksum or length, overlapping blocks (which could make a
            small file take for ever), or compression.
    """
    if len(data) < _FOOTER or data[-8:] != TABLE_MAGIC:
        raise DamagedIndex("it does not end as one")
    handles = data[-_FOOTER:-8]
    meta_offset, at = _varint(handles, 0)
    meta_size, at = _varint(handles, at)
    index_offset, at = _varint(handles, at)
    index_size, at = _varint(handles, at)
    _read_block(data, meta_offset, meta_size)  # holds nothing, but belongs to the whole
    end = 0
    for _, handle in _pairs(_read_block(data, index_offset, index_size)):
        offset, at = _varint(handle, 0)
        size, at = _varint(handle, at)
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
        raise DamagedIndex("a block does not have its checksum")
    if data[end]:
        raise DamagedIndex("it is compressed, which TensorFlow's own never are; save it again")
    return data[offset:end]


def _pairs(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) of a block: a key shares its first bytes with the one before."""
    restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 * (restarts + 1)
    if not restarts or end < 0:
        raise DamagedIndex("a block has no room for its restarts")
    entries, at, key = block[:end], 0, b""
    while at < end:
        shared, at = _varint(entries, at)
        own, at = _varint(entries, at)
        length, at = _varint(entries, at)
        if shared > len(key) or own + length > end - at or shared + own > _LONGEST_NAME:
            raise DamagedIndex("a name or value ends outside of its block")
        key = key[:shared] + entries[at : at + own]
        at += own + length
        yield key, entries[at - length : at]
