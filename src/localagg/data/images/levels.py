"""Map samples of any depth and number of bands to 8 bits and three channels."""

from typing import NamedTuple

import numpy as np

from ...config import ViewConfig


class UnreadableImage(Exception):
    """Bytes that are not a whole image; the message gives the reason in a few words."""


class Levels(NamedTuple):
    """How samples become 8-bit levels."""

    bands: tuple[int, ...] | None = None
    """Bands, from 1, that become red, green and blue, or gray. Default: as the file says."""
    range: tuple[float, float] | None = None
    """Samples that become 0 and 255; only of more than 8 bits, signed or floating samples."""


STORED = Levels()


class Samples(NamedTuple):
    """Samples of an image as they are stored."""

    values: np.ndarray
    """[H, W, bands], of any dtype."""
    bits: int
    """Significant bits of unsigned integers."""
    white_is_zero: bool = False
    color: bool = False
    """Whether the first three bands are red, green and blue."""
    turn: int = 1
    """Orientation as in EXIF."""

    @property
    def text(self) -> str:
        """``4 bands of 16 bits``, signed or floating where they are."""
        return describe_samples(self.values.shape[2], self.values.dtype, self.bits)


def describe_samples(bands: int, dtype: np.dtype, bits: int) -> str:
    """Return the number of bands and the kind of their samples in words."""
    kind = {"i": "signed ", "f": "floating-point "}.get(dtype.kind, "")
    size = bits if dtype.kind == "u" else dtype.itemsize * 8
    return f"{bands} bands of {kind}{size} bits" if bands > 1 else f"{kind}{size} bits a sample"


def levels_of(views: ViewConfig) -> Levels:
    """Return the mapping of a configuration, in which ``auto`` is resolved."""
    if views.range is None:
        return Levels(views.bands)
    low, high = (float(limit) for limit in views.range)
    return Levels(views.bands, (low, high))


def levels_for_sizes(views: ViewConfig) -> Levels:
    """Return levels with which sizes are read, also before the range ``auto`` is measured."""
    return Levels(views.bands, None if views.range is None else (0.0, 1.0))


def to_rgb_levels(samples: Samples, levels: Levels = STORED) -> np.ndarray:
    """Return samples as uint8 [H, W, 3].

    Without a range the upper 8 of the significant bits are kept.

    Raises:
        UnreadableImage: a choice of bands or a range is missing.
    """
    values = choose_bands(samples, levels.bands)
    if values.dtype == bool:
        values = values.astype(np.uint8) * np.uint8(255)
    elif values.dtype != np.uint8:
        if levels.range is not None:
            low, high = levels.range
            values = np.nan_to_num((values.astype(np.float64) - low) / (high - low), nan=0.0)
            values = np.rint(values.clip(0, 1) * 255).astype(np.uint8)
        elif values.dtype.kind != "u" or values.dtype.itemsize > 2:
            raise UnreadableImage(
                f"{samples.text} have no agreed range; map them with --range LOW HIGH or auto"
            )
        else:
            values = (values >> max(0, samples.bits - 8)).clip(0, 255).astype(np.uint8)
    if samples.white_is_zero:
        values = 255 - values
    return np.ascontiguousarray(np.broadcast_to(values, (*values.shape[:2], 3)))


def choose_bands(samples: Samples, bands: tuple[int, ...] | None) -> np.ndarray:
    """Return one or three bands, [H, W, 1 or 3].

    Raises:
        UnreadableImage: a choice is missing, or names a band that does not exist.
    """
    values, count = samples.values, samples.values.shape[2]
    if bands is not None:
        if max(bands) > count:
            raise UnreadableImage(f"it has {samples.text}, but --bands names {max(bands)}")
        return values[:, :, [band - 1 for band in bands]]
    if samples.color or count == 3:
        return values[:, :, :3]
    if count > 2:
        raise UnreadableImage(f"it has {samples.text}; choose one or three with --bands 3 2 1")
    return values[:, :, :1]
