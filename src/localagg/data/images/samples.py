"""Read the samples of images deeper than Pillow's: TIFF of any variant, 16-bit PNG, DICOM."""

import io
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from ...config import ViewConfig
from ...errors import UserError
from ...io.console import notify
from ..sources.file_kinds import kind_of
from ..sources.source import Source
from .levels import Samples, UnreadableImage, choose_bands, describe_samples

_MEASURED = 64  # images whose samples give --range auto
_PERCENTILES = (0.5, 99.5)
_EVERY = 997  # of the samples of an image, one in this number is looked at from a million on
_LIMIT = 1 << 30  # bytes of samples of one image
_TAGS = {"width": 256, "height": 257, "bits": 258, "compression": 259, "photometric": 262}
_TAGS |= {"samples": 277, "planar": 284, "format": 339}
_KINDS = {1: "u", 2: "i", 3: "f"}  # TIFF's sample formats as numpy's kinds
_RGB, _PALETTE, _CMYK = 2, 3, 5


class TiffTags:
    """Tags of a page that decide how its samples are read."""

    def __init__(self, data: bytes, page: int = 0) -> None:
        tags: Any = _read_tags(data, page)
        found = {name: tags.get(number) for name, number in _TAGS.items()}
        self.width, self.height = int(found["width"] or 0), int(found["height"] or 0)
        bits = found["bits"] or (1,)
        self.bits = int((bits if isinstance(bits, tuple) else (bits,))[0])
        self.samples = int(found["samples"] or 1)
        self.photometric, self.planar = found["photometric"], found["planar"] or 1
        format = found["format"] or (1,)
        self.kind = _KINDS.get((format if isinstance(format, tuple) else (format,))[0], "u")

    @property
    def is_pillows(self) -> bool:
        """Whether Pillow's pixels are right; tests compare every variant with tifffile's."""
        if self.kind != "u":
            return False
        if self.photometric in (0, 1):
            if self.samples == 2:  # the second one is alpha
                return self.photometric == 1 and self.planar == 1 and self.bits == 8
            deep = self.photometric == 1 and self.bits in (12, 16)
            return self.samples == 1 and (self.bits <= 8 or deep)
        if self.photometric == _RGB:
            return self.samples in (3, 4) and (
                self.bits == 8 or (self.bits == 16 and self.planar == 1)
            )
        return self.planar == 1 and (self.bits <= 8 or self.photometric == _CMYK)

    @property
    def text(self) -> str:
        """``13 bands of 16 bits``."""
        dtype = np.dtype(f"{self.kind}{max(1, self.bits // 8)}")
        return describe_samples(self.samples, dtype, self.bits)


def _read_tags(data: bytes, page: int) -> Any:
    try:
        file, big = io.BytesIO(data), data[2:4] in (b"+\0", b"\0+")
        tags: Any = TiffImagePlugin.ImageFileDirectory_v2(file.read(16 if big else 8))
        for _ in range(page + 1):
            file.seek(tags.next)
            tags.load(file)
        return tags
    except Exception as error:  # Pillow's parser raises errors of any kind
        raise UnreadableImage(f"its TIFF tags are damaged ({error})") from None


def used_levels(data: bytes) -> tuple[Samples, float, float] | None:
    """Return the samples of a deep image, and their lowest and highest value; else None."""
    samples = read_samples(data)
    if samples is None or samples.values.dtype in (bool, np.uint8):
        return None
    values = samples.values[np.isfinite(samples.values)]
    return (samples, float(values.min()), float(values.max())) if len(values) else None


def read_samples(data: bytes) -> Samples | None:
    """Return the samples of an encoded image; None if 8 bits a sample are all that it has.

    Args:
        data: the image; ``data.page`` is the page of an ``ImagePage``.

    Raises:
        UnreadableImage: damaged, too large, or an extra is missing.
    """
    page, kind = getattr(data, "page", 0), kind_of(data[:512])
    if kind == "DICOM":
        return read_dicom(data, page)
    if kind == "TIFF":
        tags = TiffTags(data, page)
        if tags.is_pillows and (tags.bits <= 8 or tags.samples == 1):
            return _pillows_gray(data, page, tags.bits) if tags.bits > 8 else None
        return read_tiff(data, page)
    if kind == "PNG" and data[24:25] == b"\x10":
        return _sixteen_bit_png(data)
    return None


def _pillows_gray(data: bytes, page: int, bits: int) -> Samples:
    try:
        with Image.open(io.BytesIO(data), formats=["TIFF"]) as image:
            image.seek(page)
            return Samples(np.asarray(image)[:, :, None].astype(np.uint16), bits)
    except Exception as error:
        raise UnreadableImage(str(error) or type(error).__name__) from None


def _sixteen_bit_png(data: bytes) -> Samples:
    import torch
    from torchvision.io import ImageReadMode, decode_image

    try:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        pixels = decode_image(buffer, ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()
    except RuntimeError as error:
        raise UnreadableImage(str(error).partition("\n")[0]) from None
    color = pixels.shape[2] > 2
    return Samples(pixels[:, :, :3] if color else pixels[:, :, :1], 16, color=color)


def read_tiff(data: bytes, page: int = 0) -> Samples:
    """Return the samples of a TIFF page, by tifffile.

    Raises:
        UnreadableImage: damaged, truncated, too large, or tifffile is not installed.
    """
    tags = TiffTags(data, page)
    if tags.width * tags.height * tags.samples * max(1, tags.bits // 8) > _LIMIT:
        raise UnreadableImage(
            f"{tags.width:,} x {tags.height:,} pixels of {tags.text} exceed 1 GiB"
        )
    try:
        import tifffile
    except ImportError:
        reason = f"TIFF with {tags.text}"
        raise UnreadableImage(f"{reason} needs pip install 'localagg[scientific]'") from None
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            found: Any = file.pages[page]
            ends = [a + b for a, b in zip(found.dataoffsets, found.databytecounts, strict=True)]
            if max(ends, default=0) > len(data) or 0 in found.databytecounts:
                raise UnreadableImage("its data end before the image does")
            if found.photometric == _PALETTE or found.photometric not in (0, 1, 2):
                raise UnreadableImage(f"TIFF with {tags.text} as {found.photometric!r}")
            values = found.asarray()
            turn = found.tags.get(274)
    except UnreadableImage:
        raise
    except Exception as error:  # tifffile and its decoders raise errors of any kind
        raise UnreadableImage(f"TIFF with {tags.text}: {error}".partition("\n")[0]) from None
    if values.ndim == 2:
        values = values[:, :, None]
    elif tags.planar == 2 and values.shape[0] == tags.samples:
        values = np.moveaxis(values, 0, 2)
    if values.shape != (tags.height, tags.width, tags.samples):
        raise UnreadableImage(f"TIFF of shape {values.shape} is not an image")
    return Samples(
        values,
        tags.bits,
        tags.photometric == 0,
        tags.photometric == _RGB,
        int(turn.value) if turn is not None else 1,
    )


def read_dicom(data: bytes, page: int = 0) -> Samples:
    """Return the samples of a DICOM frame, in the units of its rescale slope and intercept.

    A file with a display window becomes 8 bits through it, unless it is color already.

    Raises:
        UnreadableImage: damaged, without pixels, compressed by a codec that is not installed, or
            pydicom is not installed.
    """
    try:
        import pydicom
        from pydicom.pixels.processing import apply_modality_lut, convert_color_space
        from pydicom.pixels.utils import pixel_array
    except ImportError:
        raise UnreadableImage("DICOM needs pip install 'localagg[dicom]'") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = pydicom.dcmread(io.BytesIO(data))
            size = int(header.Rows) * int(header.Columns) * int(header.get("SamplesPerPixel", 1))
            if size * 2 > _LIMIT:
                raise UnreadableImage(f"{header.Rows:,} x {header.Columns:,} pixels exceed 1 GiB")
            frames = int(header.get("NumberOfFrames", 1) or 1)
            values = pixel_array(header, index=min(page, frames - 1))
            kind = str(header.PhotometricInterpretation)
            if kind.startswith("YBR"):
                values = convert_color_space(values, "YBR_FULL", "RGB")
            if values.ndim == 3:
                return Samples(values, int(header.BitsStored), color=True)
            stored = int(header.BitsStored)
            rescaled = np.asarray(apply_modality_lut(values, header))
    except UnreadableImage:
        raise
    except Exception as error:  # pydicom raises errors of any kind
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UnreadableImage(f"DICOM: {reason}") from None
    return Samples(rescaled[:, :, None], stored, kind == "MONOCHROME1")


def dicom_window(data: bytes) -> tuple[float, float] | None:
    """Return the lowest and highest value of a DICOM file's first display window, or None."""
    import pydicom

    header = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)
    center, width = header.get("WindowCenter"), header.get("WindowWidth")
    try:
        center, width = (float(x[0] if hasattr(x, "__len__") else x) for x in (center, width))
    except (TypeError, ValueError, IndexError):
        return None
    return (center - width / 2, center + width / 2) if width > 0 else None


def measure_range(source: Source, bands: tuple[int, ...] | None) -> tuple[float, float]:
    """Return the 0.5 and 99.5 % percentiles of the deep samples of 64 images, and print them.

    Raises:
        UserError: none of the images has samples of more than 8 bits, or all samples are equal.
    """
    found: list[np.ndarray] = []
    refused: UnreadableImage | None = None
    for index in np.linspace(0, len(source) - 1, min(_MEASURED, len(source))).astype(int).tolist():
        try:
            image = source[index].image
            samples = read_samples(image) if isinstance(image, bytes) else None
        except (UnreadableImage, OSError, UserError):
            continue
        if samples is not None and samples.values.dtype not in (bool, np.uint8):
            try:
                chosen = choose_bands(samples, bands).ravel()
            except UnreadableImage as error:  # the run counts such images, or refuses them
                refused = error
                continue
            found.append(chosen[:: 1 if len(chosen) < 10**6 else _EVERY])
    if refused is not None and not found:
        raise UserError("option-conflict", f"--range auto finds no samples: {refused}.")
    if not found:
        raise UserError(
            "option-invalid",
            f"--range auto finds no image of more than 8 bits a sample in '{source.uri}'; omit it.",
        )
    values = np.concatenate([np.asarray(part, np.float64) for part in found])
    low, high = (float(value) for value in np.nanpercentile(values, _PERCENTILES))
    if not low < high:
        raise UserError(
            "option-invalid", f"--range auto finds only the value {low:g}; set LOW HIGH."
        )
    notify(f"--range auto: {low:g} to {high:g}, from the samples of {len(found):,} images.")
    return low, high


def with_measured_range(views: ViewConfig, source: Source) -> ViewConfig:
    """Return the views with ``--range auto`` replaced by the range of a source.

    Raises:
        UserError: as :func:`measure_range`.
    """
    if views.range != ("auto",):
        return views
    return replace(views, range=measure_range(source, views.bands))
