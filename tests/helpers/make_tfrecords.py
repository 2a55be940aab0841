"""TFRecords by Google's protobuf and the format's definition: an independent reader and writer.

For tests and for ``benchmarks/fuzz.py``.
"""

import struct
from pathlib import Path

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from localagg.data.sources.tf_example import parse_example
from localagg.io.crc32c import masked_crc32c


def example_class():
    """``tf.train.Example`` by Google's protobuf: the independent reader and writer."""
    file = descriptor_pb2.FileDescriptorProto(name="e.proto", package="t", syntax="proto3")
    field = descriptor_pb2.FieldDescriptorProto

    def message(name, *fields, into=file):
        new = (into.nested_type if into is not file else file.message_type).add(name=name)
        for number, label, kind, of, title in fields:
            new.field.add(name=title, number=number, label=label, type=kind, type_name=of)
        return new

    message("BytesList", (1, field.LABEL_REPEATED, field.TYPE_BYTES, None, "value"))
    message("FloatList", (1, field.LABEL_REPEATED, field.TYPE_FLOAT, None, "value"))
    message("Int64List", (1, field.LABEL_REPEATED, field.TYPE_INT64, None, "value"))
    feature = message("Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(("bytes", "float", "int64"), 1):
        kind = f".t.{name.capitalize()}List"
        feature.field.add(
            name=f"{name}_list",
            number=number,
            label=field.LABEL_OPTIONAL,
            type=field.TYPE_MESSAGE,
            type_name=kind,
            oneof_index=0,
        )
    entries = (1, field.LABEL_REPEATED, field.TYPE_MESSAGE, ".t.Features.FeatureEntry", "feature")
    features = message("Features", entries)
    entry = message(
        "FeatureEntry",
        (1, field.LABEL_OPTIONAL, field.TYPE_STRING, None, "key"),
        (2, field.LABEL_OPTIONAL, field.TYPE_MESSAGE, ".t.Feature", "value"),
        into=features,
    )
    entry.options.map_entry = True
    whole = (1, field.LABEL_OPTIONAL, field.TYPE_MESSAGE, ".t.Features", "features")
    message("Example", whole)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


Example = example_class()


def by_protobuf(data: bytes) -> tuple[bytes, int | None, int | None] | None:
    """(image, label, index) as the reference's parser would see them; None where it would fail."""
    try:
        parsed = Example.FromString(bytes(data))
    except DecodeError:
        return None
    feature = parsed.features.feature
    found = []
    for key, kind in (("images", "bytes_list"), ("labels", "int64_list"), ("index", "int64_list")):
        # A feature without any list is, to TensorFlow, not there.
        there = key in feature and feature[key].WhichOneof("kind") is not None
        values = getattr(feature[key], kind).value if there else [None]
        if len(values) != 1:
            return None
        found.append(values[0])
    return tuple(found) if found[0] is not None else None


def example(image: bytes, label: int | None = None, index: int | None = None) -> bytes:
    """An Example serialized by protobuf."""
    made = Example()
    made.features.feature["images"].bytes_list.value.append(image)
    for key, value in (("labels", label), ("index", index)):
        if value is not None:
            made.features.feature[key].int64_list.value.append(value)
    return made.SerializeToString(deterministic=True)


def record(length: bytes, payload: bytes) -> bytes:
    """A record that claims a length of its own, with right checksums."""
    parts = (length, payload)
    return b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in parts)


def framed(*payloads: bytes) -> bytes:
    """A file of records."""
    return b"".join(record(struct.pack("<Q", len(payload)), payload) for payload in payloads)


def by_index(folder: Path, *, labeled: bool) -> dict[int, tuple[bytes, int | None]]:
    """{index: (image, label)} of whole files as protobuf reads them.

    It refuses a record for a fault in any feature, where ours reads its own three all the same;
    such a record is held to be right if its image is in it.
    """
    found: list[tuple[bytes, int | None, int | None]] = []
    for path in sorted(folder.glob("train-*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            payload, at = data[at + 12 : at + 12 + length], at + 16 + length
            parsed = by_protobuf(payload) or tuple(parse_example(payload))
            assert parsed[0] in payload, "an image out of nowhere"
            found.append(parsed)
    stored = [index for _, _, index in found]
    order = range(len(found)) if None in stored else stored
    pairs = zip(order, found, strict=True)
    return {i: (image, label if labeled else None) for i, (image, label, _) in pairs}


# (image's size, label, index) by file. No prefix or suffix of a file is one of the highest indices,
# so that wherever a file is cut off between two records, the indices that remain have a gap.
LAYOUT = {
    "train-00000-of-00002": ((40, 2, 0), (300, 0, 5), (0, 1, 1)),
    "train-00001-of-00002": ((7, 2, 2), (130, 1, 4), (90, 0, 3)),
}


def payloads() -> dict[str, list[bytes]]:
    """Six images in two files, one with features of other kinds too."""
    draws = np.random.RandomState(0)
    made = {
        name: [example(draws.bytes(size), label, index) for size, label, index in images]
        for name, images in LAYOUT.items()
    }
    more = Example()
    more.features.feature["width"].float_list.value.extend([1.0, 2.5])
    more.features.feature["name"].bytes_list.value.append(b"x")
    made["train-00001-of-00002"][1] += more.SerializeToString()
    return made
