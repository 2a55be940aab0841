"""``tf.train.Example`` without TensorFlow: images of the reference's files, by protobuf.

The reference stores the features ``images`` (bytes), ``labels`` and ``index`` (int64).
"""

from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError

_LISTED = 8  # other features named in a message

# TensorFlow declares ``feature`` as a map; in bytes that is a repeated message of key and value.
# A repeated message keeps the order of the features, so that the reference's bytes can be written.
_DESCRIPTOR = """
name: "localagg_example.proto" package: "localagg" syntax: "proto3"
message_type { name: "BytesList"
  field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "FloatList"
  field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT } }
message_type { name: "Int64List"
  field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type { name: "Feature" oneof_decl { name: "kind" }
  field { name: "bytes_list" number: 1 label: LABEL_OPTIONAL oneof_index: 0
    type: TYPE_MESSAGE type_name: ".localagg.BytesList" }
  field { name: "float_list" number: 2 label: LABEL_OPTIONAL oneof_index: 0
    type: TYPE_MESSAGE type_name: ".localagg.FloatList" }
  field { name: "int64_list" number: 3 label: LABEL_OPTIONAL oneof_index: 0
    type: TYPE_MESSAGE type_name: ".localagg.Int64List" } }
message_type { name: "Entry"
  field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
  field { name: "value" number: 2 label: LABEL_OPTIONAL
    type: TYPE_MESSAGE type_name: ".localagg.Feature" } }
message_type { name: "Features"
  field { name: "feature" number: 1 label: LABEL_REPEATED
    type: TYPE_MESSAGE type_name: ".localagg.Entry" } }
message_type { name: "Example"
  field { name: "features" number: 1 label: LABEL_OPTIONAL
    type: TYPE_MESSAGE type_name: ".localagg.Features" } }
"""
_pool = descriptor_pool.DescriptorPool()
_pool.Add(text_format.Parse(_DESCRIPTOR, descriptor_pb2.FileDescriptorProto()))
_Example: Any = message_factory.GetMessageClass(_pool.FindMessageTypeByName("localagg.Example"))


class BadExample(ValueError):
    """The bytes are not an Example of an image; the message gives the reason in a few words."""


class ImageExample(NamedTuple):
    """An image as the reference stores it."""

    image: bytes
    label: int | None
    index: int | None


def parse_example(data: bytes | memoryview) -> ImageExample:
    """Read an image, its label and its index from a serialized ``tf.train.Example``.

    Other features are ignored. The last of repeated features counts, and a feature without a list
    does not exist, as in TensorFlow.

    Raises:
        BadExample: not an Example, no image, or not exactly one value of a feature.
    """
    try:
        entries = _Example.FromString(data).features.feature
    except DecodeError as error:
        raise BadExample(f"not a tf.train.Example ({error})") from None
    features = {entry.key: entry.value for entry in entries}
    image = _single_value(features, "images", "bytes_list")
    if image is None:
        names = ", ".join(repr(name[:40]) for name in [*features][:_LISTED]) or "none"
        raise BadExample(f"no feature 'images' (its features: {names})")
    label = _single_value(features, "labels", "int64_list")
    return ImageExample(image, label, _single_value(features, "index", "int64_list"))


def _single_value(features: dict[str, Any], name: str, kind: str) -> Any:
    if (feature := features.get(name)) is None:
        return None
    values = getattr(feature, kind).value
    if len(values) == 1:
        return values[0]
    if feature.WhichOneof("kind") is None:
        return None
    raise BadExample(f"feature '{name}' does not hold exactly one value")


def write_example(image: bytes, label: int | None, index: int | None) -> bytes:
    """Serialize an image with its features in the reference's order: labels, index, images."""
    example = _Example()
    features = example.features.feature
    for key, value in (("labels", label), ("index", index)):
        if value is not None:
            features.add(key=key).value.int64_list.value.append(value)
    features.add(key="images").value.bytes_list.value.append(image)
    return example.SerializeToString()
