"""Encode pictures in any format."""

import io

from PIL import Image


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """Return the bytes of a file of Pillow's format ``kind``."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
