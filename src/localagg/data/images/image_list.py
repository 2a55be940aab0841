"""Images given as Python objects: files, encoded bytes, Pillow's images, arrays and tensors."""

import os
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...errors import UserError
from ..sources.open import GIVEN
from ..sources.source import Sample, content_hash
from .decode import decode_opened

_KINDS = "a path, encoded bytes, a PIL image, an array [H, W, 3] or a tensor [3, H, W]"
_ROUNDING = 1e-4  # by which resized floats may leave 0-1


class ImageList:
    """Images in the form of a source.

    All of them are checked at once, so that a wrong one is reported before any work.

    Args:
        images: one image, or several: paths, encoded bytes, PIL images, arrays [H, W], [H, W, 3]
            or [H, W, 4], tensors [1, H, W], [3, H, W] or [4, H, W]; also an array [N, H, W, 3] or
            a tensor [N, 3, H, W]. Pixels are uint8 in 0-255, or floating in 0-1, which are rounded
            to 256 levels. Alpha is dropped.
        upright: turn PIL images by their EXIF orientation.

    Raises:
        UserError: no image, no such file, an object of another kind, shape, dtype or range.
    """

    uri = GIVEN
    classes: list[str] | None = None
    labels: Tensor | None = None

    def __init__(self, images: Any, *, upright: bool = False) -> None:
        self.images, self.upright = _as_list(images), upright
        if not self.images:
            raise UserError("no-images", f"The list of images is empty; pass {_KINDS}.")
        for number, image in enumerate(self.images):
            self._check(number, image)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        image = self.images[index]
        if isinstance(image, str | os.PathLike):
            return Sample(index, _path(image).read_bytes(), None)
        if isinstance(image, bytes | bytearray | memoryview):
            return Sample(index, bytes(image), None)
        if isinstance(image, Image.Image):
            return Sample(index, decode_opened(image, upright=self.upright), None)
        return Sample(index, _pixels(image), None)

    def name(self, index: int) -> str:
        """Return the image's path, or its place in the list."""
        image = self.images[index]
        return str(_path(image)) if isinstance(image, str | os.PathLike) else f"image {index}"

    def file(self, index: int) -> Path | None:
        """Return the image's file, if it is one."""
        image = self.images[index]
        return _path(image) if isinstance(image, str | os.PathLike) else None

    def label(self, index: int) -> int | None:
        """Return None, as these images have no labels."""
        return None

    def fingerprint(self) -> str:
        """Return a hash that stays the same only while every index means the same image."""
        return content_hash(self, [self.name(i) for i in range(len(self))])

    def stored_bytes(self) -> int:
        """Return the size of files, bytes and pixels together."""
        samples = (self[i].image for i in range(len(self)))
        return sum(s.nbytes if isinstance(s, Tensor) else len(s) for s in samples)

    def _check(self, number: int, image: Any) -> None:
        """Raise UserError unless :meth:`__getitem__` can read an image (or its decoder will)."""
        if isinstance(image, str | os.PathLike):
            _check_file(image)
        elif isinstance(image, Image.Image):
            if 0 in image.size:
                raise UserError("option-invalid", f"Image {number} of the list has no pixels.")
        elif isinstance(image, np.ndarray | Tensor) or hasattr(image, "__array__"):
            if problem := _pixel_problem(image):
                raise UserError("option-invalid", f"Image {number} of the list {problem}.")
        elif not isinstance(image, bytes | bytearray | memoryview):
            raise UserError(
                "option-invalid",
                f"Image {number} of the list is of type {type(image).__name__}; pass {_KINDS}.",
            )


def _check_file(image: str | os.PathLike[str]) -> None:
    """Raise UserError unless a path is a file; pipes and devices, which may never end, are none."""
    try:
        path = _path(image)
        if path.is_file():
            return
        folder = path.is_dir() and str(image) != ""
    except (OSError, RuntimeError) as error:  # a name too long, no permission, no such user
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            "not-found", f"The image '{image}' cannot be found ({reason}); correct the path."
        ) from None
    if folder:
        raise UserError(
            "not-found",
            f"'{path}' is a folder; pass its files, or localagg.open_images('{path}').",
        )
    raise UserError("not-found", f"There is no image file '{image}'; correct the path.")


def _as_list(images: Any) -> list[Any]:
    one = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)
    if isinstance(images, one):
        return [images]
    if hasattr(images, "__array__") and hasattr(images, "dtype"):
        listed = getattr(images.dtype, "kind", "") in tuple("OSUT")  # objects and texts
        if images.ndim == 0 or (images.ndim < 4 and not listed):
            return [images]
    elif (
        not isinstance(images, Iterable)
        or isinstance(images, Mapping | Set)
        or any(hasattr(images, name) for name in ("read", "columns"))  # open files, data frames
    ):
        raise UserError(
            "option-invalid",
            f"The images are of type {type(images).__name__}; pass a list, of which each is"
            f" {_KINDS}.",
        )
    return list(images)


def _path(image: Any) -> Path:
    return Path(image).expanduser()


def _pixel_problem(image: Any) -> str | None:
    """Describe what is wrong with an array or tensor, and the fix; None if nothing is."""
    channels_first = isinstance(image, Tensor)
    if channels_first and (image.layout != torch.strided or image.device.type == "meta"):
        return "is a sparse tensor or one without values; pass a dense tensor [3, H, W]"
    try:
        values = image.detach() if isinstance(image, Tensor) else np.asarray(image)
    except Exception as error:  # of any kind: the object's own method failed
        return f"is a {type(image).__name__} that gives no array ({error}); pass {_KINDS}"
    shape, kind = tuple(values.shape), str(values.dtype).removeprefix("torch.")
    bands = shape[0 if channels_first else -1] if len(shape) == 3 else 1
    if len(shape) not in (2, 3) or bands not in (1, 3, 4) or 0 in shape:
        expected = "a tensor is [3, H, W]" if channels_first else "an array is [H, W, 3]"
        return f"has shape {list(shape)}; {expected} (or of 1 or 4 channels)"
    if kind == "uint8":
        return None
    if "float" not in kind:
        return f"is of dtype {kind}; pass uint8 in 0-255, or floating values in 0-1"
    low, high = float(values.min()), float(values.max())
    if not -_ROUNDING <= low <= high <= 1 + _ROUNDING:  # also NaN
        return (
            f"has floating values from {low:.4g} to {high:.4g}; pass floating values in 0-1, or"
            " uint8 in 0-255"
        )
    return None


def _pixels(image: Any) -> Tensor:
    """Return an array or tensor as uint8 [3, H, W]."""
    if isinstance(image, Tensor):
        pixels = image.detach().cpu()
    else:
        array = np.asarray(image)
        pixels = torch.from_numpy(np.array(array))  # a copy: arrays may be read-only
        pixels = pixels.permute(2, 0, 1) if array.ndim == 3 else pixels
    if pixels.ndim == 2:
        pixels = pixels.unsqueeze(0)
    if pixels.dtype != torch.uint8:
        pixels = (pixels.double() * 255).round().clamp(0, 255).to(torch.uint8)
    pixels = pixels[:3] if len(pixels) == 4 else pixels
    return pixels.expand(3, -1, -1).contiguous()
