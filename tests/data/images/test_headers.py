"""The header scan finds truncated files, format by format; other damage shows when decoding."""

import numpy as np
import pytest
from encode_image import encoded
from PIL import Image, features
from sklearn.datasets import load_sample_images

from localagg.data.images.decode import decode
from localagg.data.images.headers import HEAD, read_ends, read_header
from localagg.data.loading.scan import scan_headers
from localagg.data.sources.open import open_images

PHOTO = Image.fromarray(load_sample_images().images[0][100:228, 200:360])
GRAY = np.array(PHOTO.convert("L"))
BOX = (12).to_bytes(4, "big") + b"xml <a/>"


@pytest.fixture
def stored(tmp_path):
    """A folder of images with these bytes: of files only the ends are read."""

    def write(*images):
        for number, data in enumerate(images):
            (tmp_path / f"{number}.jpg").write_bytes(data)
        return open_images(tmp_path)

    return write


def ppm(magic, most, pixels):
    return b"%s\n# of a test\n160 128\n%d\n" % (magic, most) + pixels.tobytes()


def narrow(height):
    """A TIFF with a strip for each row, so that its tags are long."""
    image = Image.fromarray(np.resize(np.array(PHOTO), (height, 3, 3)))
    return encoded(image, "TIFF", tiffinfo={278: 1})


WHOLE = {
    "JPEG": encoded(PHOTO, "JPEG", quality=100, subsampling=0),
    "CMYK": encoded(PHOTO.convert("CMYK"), "JPEG", quality=100),
    "PNG": encoded(PHOTO, "PNG"),
    "GIF": encoded(PHOTO.quantize(256), "GIF"),
    "WEBP": encoded(PHOTO, "WEBP", lossless=True),
    "BMP": encoded(PHOTO, "BMP"),
    "TIFF": encoded(PHOTO, "TIFF"),
    "TIFF of strips": encoded(PHOTO, "TIFF", tiffinfo={278: 2}),
    "TIFF of 1 bit": encoded(PHOTO.convert("1"), "TIFF"),
    "TIFF by LZW": encoded(PHOTO, "TIFF", compression="tiff_lzw"),
    "TIFF whose counts lie behind": narrow(6000),
    "TIFF whose offsets lie behind": narrow(12_000),
    "PPM": encoded(PHOTO, "PPM"),
    "PPM in gray": encoded(PHOTO.convert("L"), "PPM"),
    "PPM of 1 bit": encoded(PHOTO.convert("1").crop((0, 0, 157, 128)), "PPM"),
    "PPM of 16 bits": ppm(b"P5", 65_535, GRAY.astype(">u2")),
    "PPM of 12 bits": ppm(b"P5", 4095, GRAY.astype(">u2")),
    "PPM of 12 bits in color": ppm(b"P6", 4095, np.array(PHOTO).astype(">u2")),
    "PPM of 5 bits": ppm(b"P5", 31, GRAY // 8),
    "JPEG2000": encoded(PHOTO, "JPEG2000"),
    "JPEG2000 without boxes": encoded(PHOTO, "JPEG2000", no_jp2=True),
}
if features.check("avif"):
    WHOLE["AVIF"] = encoded(PHOTO, "AVIF", quality=100, subsampling="4:4:4")


def header(source, index):
    return read_header(source, index, read_ends(source, index))


@pytest.mark.parametrize("data", WHOLE.values(), ids=WHOLE)
def test_the_scan_finds_truncated_images(data, stored):
    lengths = [len(data) // 10, len(data) // 2, len(data) * 9 // 10, len(data) - 1, len(data)]
    source = stored(*(data[:length] for length in lengths))
    found, end_is_missing, _ = header(source, 4)
    assert (found.height, found.width) == tuple(decode(data).shape[1:])
    assert found.decoded == (found.format in ("TIFF", "PPM", "JPEG2000", "AVIF"))
    assert not end_is_missing
    failed = scan_headers(source, range(5)).unreadable.keys()
    last_is_no_pixel = data[:4] in (b"\x89PNG", b"GIF8")
    assert failed == ({0, 1, 2} if last_is_no_pixel else {0, 1, 2, 3})


def test_most_examples_are_longer_than_the_bytes_read():
    assert sum(len(data) > HEAD for data in WHOLE.values()) > len(WHOLE) // 2


def test_bytes_after_the_pixels_are_ignored(stored):
    source = stored(WHOLE["JPEG2000"] + BOX, WHOLE["PPM"] + b"\n", WHOLE["TIFF"] + b"more")
    assert not any(header(source, index)[1] for index in range(3))


def test_an_end_that_is_missing_although_all_pixels_are_there_is_told(stored):
    source = stored(WHOLE["PNG"][:-1], WHOLE["JPEG"] + b"more")
    for index in range(2):
        found, end_is_missing, _ = header(source, index)
        assert (found.decoded, end_is_missing) == (True, True)
