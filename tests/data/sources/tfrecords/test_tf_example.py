"""``tf.train.Example`` against bytes made by the definition of protobuf's wire format."""

import random
from collections import Counter

import fuzz
import numpy as np
import pytest
from make_tfrecords import (
    BYTES,
    FLOAT,
    INT64,
    example,
    example_of,
    feature,
    field,
    payloads,
)

from localagg.data.sources.tfrecords.tf_example import BadExample, parse_example, write_example


@pytest.mark.parametrize("label", [0, 1, 127, 128, 999, 2**40, 2**63 - 1, -1, -(2**63), None])
@pytest.mark.parametrize("size", [0, 1, 127, 128, 70_000])
def test_examples_are_read_and_written_by_the_wire_format(label, size):
    image = np.random.RandomState(size).bytes(size)
    data = example(image, label, 7)
    assert tuple(parse_example(memoryview(data))) == (image, label, 7)
    assert write_example(image, label, 7) == data


IMAGE = feature("images", BYTES, field(1, b"a"))
FIVE = feature("labels", INT64, field(1, 5))  # not packed


@pytest.mark.parametrize(
    ("data", "label"),
    [
        (example_of(IMAGE, FIVE), 5),
        (example_of(feature("labels", INT64, field(1, b"\3")), IMAGE) + example_of(FIVE), 5),
        (example_of(IMAGE, feature("labels", INT64, None)), None),  # no list, as in TensorFlow
        (example_of(IMAGE, feature("width", FLOAT, field(1, bytes(8)))) + field(9, b"x"), None),
    ],
    ids=["unpacked", "repeated", "without list", "others"],
)
def test_the_last_feature_counts_and_others_are_ignored(data, label):
    assert tuple(parse_example(data)) == (b"a", label, None)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no feature 'images'"),
        (example_of(feature("image/encoded", BYTES, field(1, b"x"))), "image/encoded"),
        (b"\x0a\x05", "not a tf.train.Example"),
        (b"\x0b", "not a tf.train.Example"),
        (b"\xff" * 11, "not a tf.train.Example"),
        (b"\x0a\x06\x0a\x04\x0a\x02\xff\xfe", "not a tf.train.Example"),  # a name that is not UTF-8
        (b"\x0a\x02" * 100_000, "not a tf.train.Example"),
        (example_of(feature("images", BYTES, field(1, b"a") * 2)), "'images'"),
        (example_of(feature("images", INT64, field(1, 1))), "'images'"),
        (example_of(IMAGE, feature("labels", INT64, b"")), "'labels'"),
    ],
)
def test_other_bytes_raise_bad_example_with_the_reason(data, reason):
    with pytest.raises(BadExample, match=reason):
        parse_example(data)


def test_changed_examples_are_read_or_raise_bad_example():
    """No other error, and no image that is not in the bytes."""
    draw, ends = random.Random(1), Counter()
    whole = [data for records in payloads().values() for data in records]
    for _ in range(3000):
        data, _ = fuzz._mutated(draw.choice(whole), draw)
        try:
            ends["read"] += parse_example(data).image in data
        except BadExample:
            ends["bad"] += 1
    assert ends["read"] + ends["bad"] == 3000
    assert min(ends.values()) > 200
