"""TFRecords made by the definition of their formats, independent of protobuf and of our writer.

For tests and for ``benchmarks/fuzz.py``.
"""

import struct
from pathlib import Path

import numpy as np

from localagg.data.sources.source import ImageRecord, Source
from localagg.data.sources.tfrecords.tf_example import parse_example
from localagg.data.sources.tfrecords.tfrecord import tfrecord_name, tfrecord_rows, write_tfrecord
from localagg.io.crc32c import masked_crc32c

BYTES, FLOAT, INT64 = 1, 2, 3


def varint(value: int) -> bytes:
    """Encode an integer in protobuf's wire format."""
    value &= (1 << 64) - 1
    head = b""
    while value > 127:
        head, value = head + bytes([value & 127 | 128]), value >> 7
    return head + bytes([value])


def field(number: int, content: bytes | int) -> bytes:
    """Encode a field of a message."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def feature(name: str, kind: int, values: bytes | None) -> bytes:
    """Encode an entry of an Example's map; ``values`` is the content of its list."""
    value = b"" if values is None else field(kind, values)
    return field(1, field(1, name.encode()) + field(2, value))


def example_of(*features: bytes) -> bytes:
    """Encode an Example of these features. Examples can be joined to one."""
    return field(1, b"".join(features))


def example(image: bytes, label: int | None = None, index: int | None = None) -> bytes:
    """Encode an Example of an image in the reference's order, with packed integers."""
    numbers = [("labels", label), ("index", index)]
    parts = [feature(n, INT64, field(1, varint(v))) for n, v in numbers if v is not None]
    return example_of(*parts, feature("images", BYTES, field(1, image)))


def record(length: bytes, payload: bytes) -> bytes:
    """Encode a record with a given length, true or not, and correct checksums."""
    parts = (length, payload)
    return b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in parts)


def framed(*payloads: bytes) -> bytes:
    """Encode a file of records."""
    return b"".join(record(struct.pack("<Q", len(payload)), payload) for payload in payloads)


def write_tfrecords(source: Source, folder: Path, *, split: str, files: int) -> list[str]:
    """Write a source as ``pack`` does; return the names of the files."""
    folder.mkdir(exist_ok=True)
    names = [tfrecord_name(split, number, files) for number in range(files)]
    for number, name in enumerate(names):
        rows = tfrecord_rows(len(source), number, files)
        samples = (source[i] for i in rows)
        write_tfrecord(
            folder / name, (ImageRecord(s.index, "", bytes(s.image), s.label) for s in samples)
        )
    return names


def by_index(folder: Path, *, labeled: bool) -> dict[int, tuple[bytes, int | None]]:
    """Read {index: (image, label)} of whole files, without their checksums."""
    found: list[tuple[bytes, int | None, int | None]] = []
    for path in sorted(folder.glob("train-*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            payload, at = data[at + 12 : at + 12 + length], at + 16 + length
            found.append(parse_example(payload))
    stored = [index for _, _, index in found]
    order = range(len(found)) if None in stored else stored
    pairs = zip(order, found, strict=True)
    missing = -1 if labeled else None
    return {i: (x, y if labeled and y is not None else missing) for i, (x, y, _) in pairs}


# (image's size, label, index) by file. No prefix or suffix of a file is one of the highest indices,
# so that wherever a file is cut off between two records, the indices that remain have a gap.
LAYOUT = {
    "train-00000-of-00002": ((40, 2, 0), (300, 0, 5), (0, 1, 1)),
    "train-00001-of-00002": ((7, 2, 2), (130, 1, 4), (90, 0, 3)),
}


def payloads() -> dict[str, list[bytes]]:
    """Return six images in two files, one with features of other kinds too."""
    draws = np.random.RandomState(0)
    made = {
        name: [example(draws.bytes(size), label, index) for size, label, index in images]
        for name, images in LAYOUT.items()
    }
    floats = feature("width", FLOAT, field(1, struct.pack("<2f", 1, 2.5)))
    made["train-00001-of-00002"][1] += example_of(floats, feature("name", BYTES, field(1, b"x")))
    return made
