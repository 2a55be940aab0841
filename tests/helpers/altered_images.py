"""Pictures of random textures, and altered copies of them."""

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps


def texture(seed: int, side: int = 96) -> Image.Image:
    """A picture of random colors at several scales."""
    draws, total = np.random.default_rng(seed), np.zeros((side, side, 3))
    for cells in (3, 6, 12, 24, 48, 96):
        coarse = Image.fromarray(draws.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.float64)
    return Image.fromarray((total / 6).astype(np.uint8))


def _captioned(image: Image.Image) -> Image.Image:
    image = image.copy()
    box = (0, int(image.height * 0.87), int(image.width * 0.4), image.height)
    ImageDraw.Draw(image).rectangle(box, fill="white")
    return image


def _cropped(image: Image.Image) -> Image.Image:
    width, height = image.size
    return image.crop((width // 16, height // 12, width * 15 // 16, height * 31 // 32))


ALTERATIONS = {
    "resaved": lambda image: image,  # at low quality
    "shrunk": lambda image: image.resize((image.width // 2, image.height // 2)),
    "cropped": _cropped,
    "flipped": ImageOps.mirror,
    "brightened": lambda image: ImageEnhance.Brightness(image).enhance(1.3),
    "gray": lambda image: ImageOps.grayscale(image).convert("RGB"),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(image.width / 100)),
    "captioned": _captioned,
}
"""Eight kinds of copies: {kind: function of an RGB image}."""


def save_altered(image: Image.Image, kind: str, path) -> None:
    """Write an altered copy as JPEG."""
    ALTERATIONS[kind](image).save(path, "JPEG", quality=25 if kind == "resaved" else 90)
