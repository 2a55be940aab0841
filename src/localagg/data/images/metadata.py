"""Find oddities of images that can be decoded: a wrong extension, broken EXIF or color profile.

None of them changes the pixels of training: images are decoded by their content, and EXIF and color
profiles are ignored.
"""

import io
import os
import warnings
from collections.abc import Callable
from typing import Any

from PIL import Image, ImageCms

from ..sources.image_files import EXTENSIONS

_EXTENSION_FORMATS = {"MPO": "JPEG"}  # photographs with a second one inside are named like JPEG


def odd_metadata(name: str, format: str, info: dict[Any, Any]) -> str | None:
    """Return the first oddity in a few words, or None.

    Args:
        name: of the image; an extension that is not an image's is ignored.
        format: Pillow's name.
        info: Pillow's metadata.
    """
    extension = os.path.splitext(name)[1].lower()
    if extension in EXTENSIONS:
        named = Image.registered_extensions().get(extension, format)
        if named != _EXTENSION_FORMATS.get(format, format):
            return f"it is {format}, not {named}"
    if "exif" in info and _broken_exif(info["exif"]):
        return "its EXIF block is broken"
    if "icc_profile" in info and _broken_profile(info["icc_profile"]):
        return "its color profile is broken"
    return None


def broken_checksum(png: bytes) -> bool:
    """Return whether a CRC of a PNG file is wrong. Decoders check only zlib's own checksum."""
    return _raises(lambda: Image.open(io.BytesIO(png)).verify())


def _broken_exif(data: bytes) -> bool:
    exif = Image.Exif()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow only warns of entries that it cannot read
        return _raises(lambda: exif.load(data)) or _raises(lambda: dict(exif.items()))


def _broken_profile(data: bytes | None) -> bool:
    return _raises(lambda: ImageCms.ImageCmsProfile(io.BytesIO(data or b"")))


def _raises(parse: Callable[[], object]) -> bool:
    try:
        parse()
    except Exception:  # parsers raise errors of any kind
        return True
    return False
