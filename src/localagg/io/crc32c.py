"""CRC-32C (Castagnoli, RFC 3720), the checksum in TensorFlow's files, by google-crc32c."""

import google_crc32c
import numpy as np

_MASK_DELTA = 0xA282EAD8


def crc32c(data: bytes | bytearray | memoryview | np.ndarray) -> int:
    """Return the CRC-32C of a contiguous buffer; 0 if it is empty."""
    if isinstance(data, np.ndarray):
        data = data.tobytes()
    return google_crc32c.value(data if isinstance(data, bytes) else bytes(data))


def masked_crc32c(data: bytes | bytearray | memoryview | np.ndarray) -> int:
    """Return the checksum as TensorFlow stores it after the data: rotated and shifted.

    The mask keeps checksums meaningful for data that contain their own checksum.
    """
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF
