import io

import numpy as np
import pytest
import torch
from PIL import Image

from localagg.data import decode as module
from localagg.data.decode import UnreadableImage, decode, decode_crops, image_size


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def photo(pictures):
    return Image.open(pictures / "train" / "flower" / "00.png").convert("RGB")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_the_pixels(photo, kind):
    data = encoded(photo, kind)
    assert torch.equal(decode(data), torch.from_numpy(np.array(photo)).permute(2, 0, 1))
    assert image_size(data) == (photo.height, photo.width, kind)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "F"])
def test_every_mode_becomes_three_channels(photo, mode):
    if mode == "I;16":
        image = Image.fromarray(np.array(photo.convert("L")).astype(np.uint16) * 257)
    else:
        image = photo.convert(mode)
    kind = "TIFF" if mode in ("CMYK", "F", "I;16") else "PNG"
    pixels = decode(encoded(image, kind))
    assert pixels.shape == (3, photo.height, photo.width)
    shown = image if mode == "1" else photo  # dithered to black and white
    gray = torch.from_numpy(np.array(shown.convert("L"))).float()
    mixed = (0.299 * pixels[0] + 0.587 * pixels[1] + 0.114 * pixels[2]).float()
    assert (mixed - gray).abs().mean() < 12


def test_an_animation_gives_its_first_frame(photo):
    data = encoded(photo, "GIF", save_all=True, append_images=[Image.new("RGB", photo.size)])
    still = encoded(photo, "GIF")
    assert torch.equal(decode(data), decode(still))


def test_exif_orientation_is_ignored(photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(photo, "JPEG", exif=exif)
    assert torch.equal(decode(turned), decode(encoded(photo, "JPEG")))


@pytest.mark.parametrize("cut", [0, 3, 40, 0.5, 0.95])
def test_whatever_is_cut_off_is_unreadable(photo, cut):
    data = encoded(photo, "JPEG")
    data = data[: cut if isinstance(cut, int) else int(cut * len(data))]
    with pytest.raises(UnreadableImage):
        decode(data)


def test_bombs_are_refused_before_they_are_decoded(photo, monkeypatch):
    monkeypatch.setattr(module, "PIXEL_LIMIT", 100)
    with pytest.raises(UnreadableImage, match="pixels are too many"):
        decode(encoded(photo, "PNG"))


def test_resized_crops_are_pillows(photo):
    boxes = [(3, 5, 33, 41), (0, 0, 48, 20)]
    found = decode_crops(encoded(photo, "PNG"), boxes, 16, resize="bilinear")
    for box, crop in zip(boxes, found, strict=True):
        expected = np.array(photo.crop(box).resize((16, 16), Image.Resampling.BILINEAR))
        assert np.array_equal(crop.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("resize", ["bilinear", "area"])
def test_pixels_outside_of_the_box_do_not_show(photo, resize):
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
