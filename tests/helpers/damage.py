"""Damage that only decoding shows."""


def middle_lost(data: bytes) -> bytes:
    """A JPEG or PNG file without the second half of its pixels, but with its end."""
    start = data.index(b"\xff\xda" if data[:2] == b"\xff\xd8" else b"IDAT")
    return data[: (start + len(data)) // 2] + data[-12:]
