import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localagg.io.crc32c import crc32c, masked_crc32c


def bit_by_bit(data):
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "expected"),
    [  # the catalog's check value, and the vectors of RFC 3720, appendix B.4
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"", 0),
    ],
)
def test_published_values(data, expected):
    assert crc32c(data) == expected


@given(st.integers(0, 2**32 - 1), st.integers(0, 700))
def test_short_lengths(seed, length):
    data = np.random.RandomState(seed).bytes(length)
    assert crc32c(data) == bit_by_bit(data)


def test_long_buffers():
    # CRC-32C of data followed by its own checksum, little-endian, is one constant for any data.
    for length in (1 << 20, (1 << 22) - 1, (1 << 22) + 1, 9_999_991):
        data = np.random.RandomState(length).bytes(length)
        assert crc32c(data + crc32c(data).to_bytes(4, "little")) == 0x48674BC7
        assert crc32c(memoryview(data)) == crc32c(np.frombuffer(data, np.uint8))
    data = np.random.RandomState(0).bytes(150_000)
    assert crc32c(data) == bit_by_bit(data)


def test_the_mask_is_tensorflows():
    crc = bit_by_bit(b"foo")
    assert masked_crc32c(b"foo") == ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32
