"""``tf.train.Example`` without TensorFlow: the protobuf wire format, as far as an image needs it.

An Example is ``features = 1``, that is a map ``feature = 1`` from ``key = 1`` to ``value = 2``, a
Feature of which one list is set: ``bytes_list = 1``, ``float_list = 2`` or ``int64_list = 3``, each
with ``value = 1``. The reference stores ``images`` (bytes), ``labels`` and ``index`` (int64).
"""

from collections.abc import Iterator
from typing import NamedTuple

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_BYTES_LIST, _FLOAT_LIST, _INT64_LIST = 1, 2, 3
_KEYS = (b"images", b"labels", b"index")
_NAMED = 8  # other features named in a message


class BadExample(ValueError):
    """Bytes that are not an Example of an image; the message says why, in a few words."""


class ImageExample(NamedTuple):
    """What the reference stores of an image."""

    image: bytes
    label: int | None
    index: int | None


def parse_example(data: bytes | memoryview) -> ImageExample:
    """Read an image, its label and its index from a serialized ``tf.train.Example``.

    Other features and unknown fields are passed over; of repeated features the last one counts, as
    protobuf has it. Nothing longer than ``data`` is ever allocated.

    Raises:
        BadExample: not an Example, no image, or not exactly one value where one is due.
    """
    found: dict[bytes, memoryview] = {}
    others: list[str] = []
    for features in _messages(memoryview(data), 1):
        for entry in _messages(features, 1):
            key, value = _key_and_value(entry)
            if key in _KEYS:
                found[key] = value
            elif len(others) < _NAMED:
                others.append(key.decode()[:40])
    image = _one(found[b"images"], _BYTES_LIST, "images") if b"images" in found else None
    if image is None:
        names = ", ".join(map(repr, others)) or "none"
        raise BadExample(f"no feature 'images' (its other features: {names})")
    return ImageExample(bytes(_view(image)), _integer(found, b"labels"), _integer(found, b"index"))


def write_example(image: bytes, label: int | None, index: int | None) -> bytes:
    """Serialize an image as the reference's files hold it: labels, index, images, in this order."""
    entries = [
        _entry(key, _INT64_LIST, _delimited(1, _varint(value)))  # a packed list of one
        for key, value in ((b"labels", label), (b"index", index))
        if value is not None
    ]
    entries.append(_entry(b"images", _BYTES_LIST, _delimited(1, image)))
    return _delimited(1, b"".join(entries))


# --- Reading --------------------------------------------------------------------------------------


def _key_and_value(entry: memoryview) -> tuple[bytes, memoryview]:
    key, values = b"", []
    for field, kind, content in _fields(entry):
        if (field, kind) == (1, _BYTES):
            key = bytes(_view(content))
        elif (field, kind) == (2, _BYTES):
            values.append(_view(content))
    try:
        key.decode()
    except UnicodeDecodeError:
        raise BadExample("the name of a feature is not UTF-8") from None
    # protobuf merges a message that is repeated, which is to concatenate it
    return key, values[0] if len(values) == 1 else memoryview(b"".join(values))


def _integer(found: dict[bytes, memoryview], key: bytes) -> int | None:
    if key not in found:
        return None
    value = _one(found[key], _INT64_LIST, key.decode())
    if not isinstance(value, int):
        return None
    return value - (1 << 64) if value >> 63 else value


def _one(feature: memoryview, wanted: int, name: str) -> int | memoryview | None:
    """The only value of a feature's list, None where no list is set.

    Of several lists the last one set counts (they are a oneof).
    """
    lists: list[tuple[int, memoryview]] = []
    for field, kind, content in _fields(feature):
        if kind == _BYTES and field in (_BYTES_LIST, _FLOAT_LIST, _INT64_LIST):
            if lists and lists[-1][0] != field:
                lists.clear()
            lists.append((field, _view(content)))
    if not lists:
        return None
    values = (value for field, part in lists if field == wanted for value in _list(part, wanted))
    first = next(values, None)
    if first is None or next(values, None) is not None:
        raise BadExample(f"feature '{name}' does not hold exactly one value")
    return first


def _list(data: memoryview, wanted: int) -> Iterator[int | memoryview]:
    for field, kind, content in _fields(data):
        if field != 1:
            continue
        if (wanted, kind) in ((_BYTES_LIST, _BYTES), (_INT64_LIST, _VARINT)):
            yield content
        elif wanted == _INT64_LIST and kind == _BYTES:  # packed
            packed, place = _view(content), 0
            while place < len(packed):
                value, place = _read_varint(packed, place)
                yield value


def _messages(data: memoryview, wanted: int) -> Iterator[memoryview]:
    for field, kind, content in _fields(data):
        if field == wanted and kind == _BYTES:
            yield _view(content)


def _fields(data: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """(field number, wire type, content) of every field: an integer, or a view of its bytes."""
    place = 0
    while place < len(data):
        key, place = _read_varint(data, place)
        field, kind = key >> 3, key & 7
        if not 0 < field < 1 << 29:
            raise BadExample("not a protobuf message (a field's number is out of range)")
        if kind == _VARINT:
            value, place = _read_varint(data, place)
            yield field, kind, value
            continue
        if kind == _BYTES:
            length, place = _read_varint(data, place)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise BadExample(f"not a protobuf message (a field is of wire type {kind})")
        if length > len(data) - place:
            raise BadExample("a field is longer than its record")
        yield field, kind, data[place : place + length]
        place += length


def _read_varint(data: memoryview, place: int) -> tuple[int, int]:
    """(value, place behind it) of an unsigned 64-bit integer of at most ten bytes."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise BadExample("a number is cut off")
        octet = data[place]
        place += 1
        value |= (octet & 0x7F) << shift
        if octet < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, place
    raise BadExample("a number is longer than ten bytes")


def _view(content: int | memoryview) -> memoryview:
    assert isinstance(content, memoryview)
    return content


# --- Writing --------------------------------------------------------------------------------------


def _varint(value: int) -> bytes:
    value &= 0xFFFFFFFFFFFFFFFF
    octets = bytearray()
    while value > 0x7F:
        octets.append(value & 0x7F | 0x80)
        value >>= 7
    octets.append(value)
    return bytes(octets)


def _delimited(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | _BYTES) + _varint(len(content)) + content


def _entry(key: bytes, kind: int, values: bytes) -> bytes:
    feature = _delimited(2, _delimited(kind, values))
    return _delimited(1, _delimited(1, key) + feature)
