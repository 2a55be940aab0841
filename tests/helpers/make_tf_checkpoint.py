"""Write TensorFlow V2 checkpoints by their format's description, independently of the reader.

LevelDB's doc/table_format.md, TensorFlow's tensor_bundle.proto and protobuf.dev's "Encoding".
"""

import gzip
import io
import struct
import tarfile
from collections.abc import Sequence
from typing import NamedTuple

import google_crc32c
import numpy as np

DTYPES = {
    "float32": 1, "float64": 2, "int32": 3, "uint8": 4, "int16": 5, "int8": 6, "complex64": 8,
    "int64": 9, "bool": 10, "uint16": 17, "complex128": 18, "float16": 19, "uint32": 22,
    "uint64": 23,
}  # fmt: skip
STRING, BFLOAT16 = 7, 14
MAGIC = 0xDB4775248B80FB57


class Raw(NamedTuple):
    """A variable by its DataType number and bytes, for types that numpy lacks."""

    dtype: int
    shape: tuple[int, ...]
    data: bytes
    more: bytes = b""  # further fields of its BundleEntryProto


def masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def varint(value: int) -> bytes:
    value %= 2**64
    digits = []
    while value >= 128:
        digits.append(value % 128 + 128)
        value //= 128
    return bytes([*digits, value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value) if value else b""


def message(field: int, data: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(data)) + data


def header(shards: int, endianness: int = 0, min_consumer: int = 0) -> bytes:
    version = number(1, 1) + number(2, min_consumer)
    return number(1, shards) + number(2, endianness) + message(3, version)


def entry(dtype, shape, shard, offset, data, more=b"", size=None) -> bytes:
    axes = b"".join(message(2, number(1, axis)) for axis in shape)
    return (
        number(1, dtype)
        + message(2, axes)
        + number(3, shard)
        + number(4, offset)
        + number(5, len(data) if size is None else size)
        + varint(6 << 3 | 5)
        + struct.pack("<I", masked_crc(data))
        + more
    )


def block(pairs: Sequence[tuple[bytes, bytes]], interval: int = 4) -> bytes:
    """A block's content; each key but one in ``interval`` omits the prefix shared with the last."""
    out, restarts, last = b"", [], b""
    for count, (key, value) in enumerate(pairs):
        shared = 0
        if count % interval == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        own = key[shared:]
        out += varint(shared) + varint(len(own)) + varint(len(value)) + own + value
        last = key
    restarts = restarts or [0]
    return out + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def seal(content: bytes, compression: int = 0) -> bytes:
    """A block as it lies in the file."""
    sealed = content + bytes([compression])
    return sealed + struct.pack("<I", masked_crc(sealed))


def handle(offset: int, content: bytes) -> bytes:
    return varint(offset) + varint(len(content))


def table_parts(blocks: Sequence[tuple[bytes, bytes]], compression: int = 0) -> list[bytes]:
    """[data blocks, content of the index block, handles in the footer] of (last key, content)s."""
    body, handles = b"", []
    for last, content in blocks:
        handles.append((last, handle(len(body), content)))
        body += seal(content, compression)
    meta, listing = block([]), block(handles, interval=1)
    footer = handle(len(body), meta) + handle(len(body + seal(meta)), listing)
    return [body, listing, footer]


def joined(body: bytes, listing: bytes, footer: bytes) -> bytes:
    """The file of :func:`table_parts`."""
    end = footer.ljust(40, b"\0") + struct.pack("<Q", MAGIC)
    return body + seal(block([])) + seal(listing) + end


def index(pairs: Sequence[tuple[bytes, bytes]], a_block: int = 5) -> bytes:
    groups = [pairs[i : i + a_block] for i in range(0, len(pairs), a_block)]
    return joined(*table_parts([(group[-1][0], block(group)) for group in groups]))


def bundle(variables, shards: int = 1) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
    """(pairs of the index in their order, bytes of each data file); variables take turns in them.

    Args:
        variables: numpy array or :class:`Raw` by name.
        shards: number of data files.
    """
    pairs, data = [(b"", header(shards))], [b""] * shards
    for count, (name, value) in enumerate(sorted(variables.items(), key=lambda v: v[0].encode())):
        if not isinstance(value, Raw):
            little = value.astype(value.dtype.newbyteorder("<"))
            value = Raw(DTYPES[value.dtype.name], value.shape, little.tobytes())
        shard = count % shards
        place = entry(value.dtype, value.shape, shard, len(data[shard]), value.data, value.more)
        pairs.append((name.encode(), place))
        data[shard] += value.data
    return pairs, data


def files(pairs, data, prefix: str = "model.ckpt-10", a_block: int = 5) -> dict[str, bytes]:
    """File name -> content."""
    found = {f"{prefix}.data-{i:05d}-of-{len(data):05d}": part for i, part in enumerate(data)}
    return {f"{prefix}.index": index(pairs, a_block), **found}


def checkpoint(variables, shards: int = 1, prefix: str = "model.ckpt-10") -> dict[str, bytes]:
    """File name -> content of the checkpoint of some variables."""
    return files(*bundle(variables, shards), prefix)


def archive(members: dict[str, bytes], compression: str = "") -> bytes:
    """A tar of members; ``compression`` "gz" or none. The same bytes at any time."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return gzip.compress(out.getvalue(), mtime=0) if compression else out.getvalue()


# --- Small checkpoints ---

SMALL = {"a/kernel": np.arange(6, dtype="float32").reshape(2, 3), "b": np.array([1, -2], "int64")}


def put(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def entry_of(message, shards=1, data=b"abcd"):
    """Files of a checkpoint with one variable, "x", whose BundleEntryProto is given."""
    return files([(b"", header(shards)), (b"x", message)], [data] * shards)
