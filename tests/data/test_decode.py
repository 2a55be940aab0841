import io

import numpy as np
import pytest
import torch
from PIL import Image

from localagg.data import decode as module
from localagg.data.decode import UnreadableImage, decode, decode_resized, image_size


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
    gray = torch.from_numpy(np.array(photo.convert("L"))).float()
    mixed = (0.299 * pixels[0] + 0.587 * pixels[1] + 0.114 * pixels[2]).float()
    assert (mixed - gray).abs().mean() < (70 if mode == "1" else 12)


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


def test_a_resized_crop_is_pillows(photo):
    box = (3.0, 5.0, 33.0, 41.0)
    expected = np.array(photo.crop((3, 5, 33, 41)).resize((16, 16), Image.Resampling.BILINEAR))
    found = decode_resized(encoded(photo, "PNG"), box, 16).permute(1, 2, 0).numpy()
    assert abs(found.astype(int) - expected).max() <= 1
