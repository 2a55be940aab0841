"""What is odd about an image that can be read: a wrong extension, broken EXIF or color profile.

None of it changes the pixels that are learned from: they are decoded by their content, and EXIF and
color profiles are ignored.
"""

import io
import os
import warnings
from typing import Any

from PIL import Image, ImageCms

from ..sources.image_files import EXTENSIONS

_SAME = {"MPO": "JPEG"}  # photographs with a second one inside carry the extension of JPEG


def odd_metadata(name: str, kind: str, info: dict[Any, Any]) -> str | None:
    """The first oddity in a few words, or None.

    Args:
        name: of the image; what has no extension of an image is not compared.
        kind: Pillow's name of its format.
        info: what Pillow has read beside the pixels.
    """
    extension = os.path.splitext(name)[1].lower()
    if extension in EXTENSIONS:
        called = Image.registered_extensions().get(extension, kind)
        if called != _SAME.get(kind, kind):
            return f"it is {kind}, not {called}"
    if "exif" in info and _broken_exif(info["exif"]):
        return "its EXIF block is broken"
    if "icc_profile" in info and _broken_profile(info["icc_profile"]):
        return "its color profile is broken"
    return None


def _broken_exif(data: bytes) -> bool:
    exif = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Pillow only warns of entries that it cannot read
            exif.load(data)
            dict(exif.items())
    except Exception:  # whatever its parser stumbles on
        return True
    return False


def _broken_profile(data: bytes | None) -> bool:
    try:
        ImageCms.ImageCmsProfile(io.BytesIO(data or b""))
    except Exception:  # likewise
        return True
    return False


def broken_checksum(png: bytes) -> bool:
    """Whether a chunk's CRC is wrong. Decoding goes by zlib's own checksum, and by none for the
    last bytes."""
    try:
        Image.open(io.BytesIO(png)).verify()
    except Exception:  # likewise
        return True
    return False
