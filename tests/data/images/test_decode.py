"""Pixels of every format and mode, against Pillow, and against formulas where Pillow decodes."""

import io
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as V
from encode_image import encoded
from PIL import Image, ImageOps, features

from localagg.data.images import decode as module
from localagg.data.images.decode import (
    UnreadableImage,
    decode,
    decode_crops,
    decoded_size,
)


def levels(image):
    """A PIL image as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@pytest.fixture
def photo(pictures):
    return Image.open(pictures / "train" / "flower" / "00.png").convert("RGB")


@pytest.fixture
def odd_photo(photo):
    """Of a size that no block of a JPEG divides."""
    return photo.resize((117, 83), Image.Resampling.BICUBIC)


@pytest.fixture
def fast_calls(monkeypatch):
    """Shapes of the images that simplejpeg has decoded."""
    import simplejpeg

    answered = []

    class Spied:
        decode_jpeg_header = simplejpeg.decode_jpeg_header

        @staticmethod
        def decode_jpeg(data, **options):
            pixels = simplejpeg.decode_jpeg(data, **options)
            answered.append(pixels.shape)
            return pixels

    monkeypatch.setattr(module, "simplejpeg_module", lambda: Spied)
    return answered


# --- JPEG -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_jpeg_pixels_are_pillows_to_the_level(odd_photo, fast_calls, subsampling, options):
    for quality in (35, 90):
        for image in (odd_photo, odd_photo.convert("L")):
            data = encoded(image, "JPEG", quality=quality, subsampling=subsampling, **options)
            assert torch.equal(decode(data), levels(Image.open(io.BytesIO(data))))
    assert len(fast_calls) == 4


def test_the_size_is_that_of_the_pixels_with_and_without_pillow(odd_photo, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    files = [
        encoded(odd_photo.convert(mode), kind, exif=exif)
        for kind, mode in [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB")]
    ]
    for data in files:
        for upright in (False, True):
            size = tuple(decode(data, upright=upright).shape[1:])
            assert decoded_size(data, upright=upright) == size
    monkeypatch.setattr(module, "open_image", None)  # without Pillow
    assert [decoded_size(data) for data in files[:2]] == [(83, 117)] * 2


def test_a_jpeg_of_too_many_pixels_is_unreadable_by_its_header(odd_photo):
    data = encoded(odd_photo, "JPEG")
    sides = data.index(b"\xff\xc0") + 5
    bomb = data[:sides] + struct.pack(">HH", 60_000, 60_000) + data[sides + 4 :]
    for read in (decode, decoded_size):
        with pytest.raises(UnreadableImage, match=r"more (pixels )?than the limit"):
            read(bomb)


def test_pillow_decodes_files_that_simplejpeg_finds_damaged(odd_photo, fast_calls):
    data = encoded(odd_photo, "JPEG")
    odd = data[:-2] + b"\x00\x12\x13" * 5 + data[-2:]  # bytes between the scan and its end
    assert torch.equal(decode(odd), decode(data))
    assert len(fast_calls) == 1
    for place in range(len(data) // 2, len(data)):
        damaged = data[:place] + bytes([data[place] ^ 0x40]) + data[place + 1 :]
        try:
            expected = levels(Image.open(io.BytesIO(damaged)))
        except OSError:  # Pillow does not tolerate this one
            continue
        assert torch.equal(decode(damaged), expected)
        break
    else:
        pytest.fail("no damage is tolerated")


def test_without_simplejpeg_pixels_are_the_same_and_it_is_said_once(odd_photo, monkeypatch, capsys):
    data = encoded(odd_photo, "JPEG")
    expected = decode(data)
    module.simplejpeg_module.cache_clear()
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    try:
        assert torch.equal(decode(data), expected)
        assert torch.equal(decode(data), expected)
        assert capsys.readouterr().err.count("simplejpeg is not installed") == 1
    finally:
        module.simplejpeg_module.cache_clear()


# --- CMYK, whose colors are Pillow's --------------------------------------------------------------


def components(data):
    """The four components of a JPEG as they are stored, float [H, W, 4].

    Pillow shows those of CMYK files inverted; without Adobe's marker they are taken for CMYK.
    """
    return 255.0 - np.array(Image.open(io.BytesIO(without_adobe(data))))


def adobe(data):
    """Where the marker of Adobe begins, and how long it is."""
    start = data.index(b"\xff\xee")
    return start, 2 + int.from_bytes(data[start + 2 : start + 4], "big")


def without_adobe(data):
    start, length = adobe(data)
    return data[:start] + data[start + length :]


@pytest.fixture
def cmyk_jpeg(photo):
    """Written as Adobe does: inverted."""
    return encoded(photo.convert("CMYK"), "JPEG", quality=100, subsampling="4:4:4")


def ink(cmyk):
    """Colors [3, H, W] of ink [H, W, 4] in 0-255."""
    return torch.from_numpy((255 - cmyk[..., :3]) * (255 - cmyk[..., 3:]) / 255).permute(2, 0, 1)


def test_inverted_cmyk(photo, cmyk_jpeg):
    found = decode(cmyk_jpeg)
    assert (found - ink(255 - components(cmyk_jpeg))).abs().max() <= 1
    assert (found.float() - levels(photo).float()).abs().mean() < 3


def test_cmyk_without_adobes_marker_is_not_inverted(cmyk_jpeg):
    found = decode(without_adobe(cmyk_jpeg))
    assert (found - ink(components(cmyk_jpeg))).abs().max() <= 1


def ycck(data):
    """The same file, with its first three components declared as YCbCr."""
    start, length = adobe(data)
    return data[: start + length - 1] + b"\2" + data[start + length :]


def test_cmyk_is_never_filled_with_gray(cmyk_jpeg):
    """Where data are missing but the end is there, as in color."""
    for data in (cmyk_jpeg, without_adobe(cmyk_jpeg), ycck(cmyk_jpeg)):
        third = len(data) // 3
        hole = data[:third] + bytes(third) + data[2 * third :]
        for damaged in (data[: 2 * third] + b"\xff\xd9", hole):
            with pytest.raises(UnreadableImage, match="its data end before the image does"):
                decode(damaged)


def test_ycck(cmyk_jpeg):
    luma, blue, red, black = np.moveaxis(components(cmyk_jpeg), 2, 0)
    inverted = [  # JFIF's formula; what it gives is ink, inverted, as black is
        luma + 1.402 * (red - 128),
        luma - 0.344136 * (blue - 128) - 0.714136 * (red - 128),
        luma + 1.772 * (blue - 128),
    ]
    expected = ink(np.stack([*(v.clip(0, 255) for v in inverted), 255 - black], axis=2))
    assert (decode(ycck(cmyk_jpeg)) - expected).abs().max() <= 2


# --- Other formats and modes ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_the_pixels(photo, kind):
    data = encoded(photo, kind)
    assert torch.equal(decode(data), torch.from_numpy(np.array(photo)).permute(2, 0, 1))
    assert decoded_size(data) == (photo.height, photo.width)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_every_mode_becomes_three_channels(photo, mode):
    if mode == "I;16":
        image = Image.fromarray(np.array(photo.convert("L")).astype(np.uint16) * 257)
    else:
        image = photo.convert(mode)
    kind = "TIFF" if mode in ("CMYK", "I;16") else "PNG"
    pixels = decode(encoded(image, kind))
    assert pixels.shape == (3, photo.height, photo.width)
    shown = image if mode == "1" else photo  # dithered to black and white
    gray = torch.from_numpy(np.array(shown.convert("L"))).float()
    mixed = (0.299 * pixels[0] + 0.587 * pixels[1] + 0.114 * pixels[2]).float()
    assert (mixed - gray).abs().mean() < 12


def test_sixteen_bits_keep_their_upper_eight(photo):
    deep = np.array(photo.convert("L")).astype(np.uint16) * 256 + 200
    expected = levels(photo.convert("L"))
    for data in (
        encoded(Image.fromarray(deep), "PNG"),
        encoded(Image.fromarray(deep), "TIFF"),
        b"P5 %d %d 65535\n" % photo.size + deep.astype(">u2").tobytes(),
    ):
        assert torch.equal(decode(data), expected)
    color = (np.array(photo).astype(np.uint16) * 256 + 200).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in color)
    assert torch.equal(decode(png(photo.size, 16, 2, rows)), levels(photo))


def test_twelve_bits_keep_their_upper_eight_where_the_file_says_twelve(photo):
    """A TIFF that packs two samples into three bytes, and PPM, whose brightest level is told."""
    deep = np.array(photo.convert("L"))[:, :40].astype(int) * 16 + 9
    height, width = deep.shape
    packed = bytes.fromhex("".join(f"{level:03x}" for level in deep.flat))
    entries = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1)]
    entries += [(278, height), (279, len(packed))]
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    place = struct.pack("<I", 8 + len(packed))
    tiff = b"II*\0" + place + packed + struct.pack("<H", len(entries)) + tags + bytes(4)
    ppm = b"P5 %d %d 4095\n" % (width, height) + deep.astype(">u2").tobytes()
    expected = levels(photo.convert("L"))[:, :, :40]
    assert torch.equal(decode(tiff), expected)
    assert (decode(ppm).int() - expected.int()).abs().max() <= 1  # scaled by 65535 / 4095


@pytest.mark.parametrize("mode", ["F", "I"])
def test_samples_without_an_agreed_range_are_unreadable(photo, mode):
    with pytest.raises(UnreadableImage, match="32 bits a sample have no agreed range"):
        decode(encoded(photo.convert("L").convert(mode), "TIFF"))


def test_alpha_is_dropped_and_shows_the_color_beneath(photo):
    clear = photo.copy()
    clear.putalpha(0)
    for kind in ("PNG", "TIFF"):
        assert torch.equal(decode(encoded(clear, kind)), levels(photo))
    palette = photo.quantize(16)
    expected = levels(palette)
    data = encoded(palette, "PNG", transparency=bytes(range(0, 160, 10)))
    assert torch.equal(decode(data), expected)


@pytest.mark.parametrize("kind", ["WEBP", "AVIF", "JPEG2000"])
def test_newer_formats_are_pillows(photo, kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    for options in ({"lossless": True}, {"quality": 80}) if kind == "WEBP" else ({},):
        data = encoded(photo, kind, **options)
        assert decoded_size(data) == (photo.height, photo.width)
        assert torch.equal(decode(data), levels(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame(photo, kind):
    frames = [Image.new("RGB", photo.size, "red"), photo.rotate(90)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(photo, kind, save_all=True, append_images=frames, duration=50, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert torch.equal(decode(data), decode(encoded(photo, kind, **options)))


def test_formats_that_run_programs_are_not_images(photo):
    for kind in ("EPS", "PDF"):
        with pytest.raises(UnreadableImage, match="document"):
            decode(encoded(photo, kind))


# --- EXIF -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_orientation_is_ignored_unless_asked(odd_photo, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    plain = encoded(odd_photo, kind, **options)
    data = encoded(odd_photo, kind, exif=exif, **options)
    image = Image.open(io.BytesIO(data))
    if kind != "TIFF":  # whose orientation is not EXIF's, and which Pillow turns at any rate
        assert torch.equal(decode(data), decode(plain))
        assert decoded_size(data) == (odd_photo.height, odd_photo.width)
    assert decoded_size(data) == tuple(decode(data).shape[1:])
    expected = levels(ImageOps.exif_transpose(image))
    assert torch.equal(decode(data, upright=True), expected)
    assert decoded_size(data, upright=True) == tuple(expected.shape[1:])
    box = (5, 9, 40, 60)
    crop = decode_crops(data, [box], 16, resize="bilinear", upright=True)[0]
    assert torch.equal(crop, V.resized_crop(expected, 9, 5, 51, 35, [16, 16], antialias=True))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 40]
)
def test_orientation_that_cannot_be_read_counts_as_none(photo, exif):
    data = encoded(photo, "JPEG", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(decode(data, upright=True), decode(data))


# --- Unreadable images ----------------------------------------------------------------------------


def png(size, depth, color, rows):
    """A PNG from its filtered rows."""

    def chunk(name, data):
        crc = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", *size, depth, color, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("size", [(60_000, 60_000), (13_378, 13_378)])
def test_bombs_are_unreadable_by_their_header(size, monkeypatch):
    """A few kilobytes that would be 10 GB, and the first square beyond the limit."""
    assert size[0] * size[1] > module.PIXEL_LIMIT > 13_377**2
    data = png(size, 8, 2, b"\0" * 1000)
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("it is decoded"))
    for read in (decoded_size, decode, lambda d: decode_crops(d, [], 8, resize="area")):
        with pytest.raises(UnreadableImage, match=r"more .*than the limit of 178,956,970"):
            read(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # Pillow's own limit does not matter
    with pytest.raises(UnreadableImage, match=f"{size[0]:,} x {size[1]:,} pixels, more than"):
        decode(data)


def test_large_images_below_the_limit_are_read_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decoded_size(png((13_000, 13_000), 1, 0, b"\0" * 10)) == (13_000, 13_000)


# --- Crops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("size", [16, 33, 60])
def test_resized_crops_are_torchvisions_and_nearly_pillows(odd_photo, kind, size):
    data = encoded(odd_photo, kind)
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    boxes = [(3, 5, 33, 41), (0, 0, 117, 20), (50, 7, 110, 67), (9, 9, 10, 10)]
    found = decode_crops(data, boxes, size, resize="bilinear")
    for (left, top, right, bottom), crop in zip(boxes, found, strict=True):
        box = top, left, bottom - top, right - left
        assert torch.equal(crop, V.resized_crop(levels(whole), *box, [size, size], antialias=True))
        part = whole.crop((left, top, right, bottom))
        pillows = levels(part.resize((size, size), Image.Resampling.BILINEAR))
        assert (crop.int() - pillows.int()).abs().max() <= 1


@pytest.mark.parametrize("resize", ["bilinear", "area"])
def test_pixels_outside_of_the_box_have_no_influence(photo, resize):
    box, other = (8, 8, 30, 30), np.full_like(np.array(photo), 255)
    other[8:30, 8:30] = np.array(photo)[8:30, 8:30]
    found = [
        decode_crops(encoded(image, "PNG"), [box], 16, resize=resize)
        for image in (photo, Image.fromarray(other))
    ]
    assert torch.equal(*found)


def test_area_crops_are_truncated_means(photo):
    found = decode_crops(encoded(photo, "PNG"), [(4, 2, 44, 42)], 10, resize="area")[0]
    blocks = np.array(photo)[2:42, 4:44].reshape(10, 4, 10, 4, 3).mean(axis=(1, 3))
    assert np.array_equal(found.permute(1, 2, 0).numpy(), np.floor(blocks))
