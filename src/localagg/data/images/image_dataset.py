"""A torch ``Dataset``, or another indexed collection of images, in the form of a source."""

import os
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...errors import UserError
from ..sources.labels import MAX_CLASSES
from ..sources.open import GIVEN, open_images
from ..sources.source import Sample, Source, content_hash
from .image_list import ImageList

_LISTS = (list, tuple, str, bytes, bytearray, memoryview, Mapping)
_IMAGE_KEYS = ("image", "img")


class ImageDataset:
    """Images that are read one by one from an object with ``len()`` and ``[i]``.

    An item is an image as in :class:`ImageList`, a tuple that begins with one, or a dict with
    "image" or "img". Labels are those of the attribute ``targets`` or ``labels``, of the second
    tensor of a ``TensorDataset``, or of the data set behind a ``Subset``.

    Args:
        dataset: picklable, if workers read it.
        upright: turn PIL images by their EXIF orientation.

    Raises:
        UserError: no length, no image, an item of another kind, or one that differs when it is
            read again, by random transforms.
    """

    uri = GIVEN

    def __init__(self, dataset: Any, *, upright: bool = False) -> None:
        if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
            raise UserError(
                "option-invalid",
                f"The images are a {type(dataset).__name__} without len() and [i]; pass a map-style"
                " Dataset or a list.",
            )
        if not len(dataset):
            raise UserError("no-images", f"The {type(dataset).__name__} is empty.")
        self.dataset: Any = dataset
        self.upright = upright
        self.labels, self.classes = _labels(dataset)
        first, again = (self[0].image for _ in range(2))
        if not (
            torch.equal(first, again)
            if isinstance(first, Tensor) and isinstance(again, Tensor)
            else first == again
        ):
            raise UserError(
                "mismatch",
                f"Item 0 of the {type(dataset).__name__} differs when it is read again; remove its"
                " random transforms: localagg makes the views (see views=).",
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        item = self.dataset[index]
        if isinstance(item, Mapping):
            item = next((item[key] for key in _IMAGE_KEYS if key in item), item)
        elif isinstance(item, tuple | list) and item:
            item = item[0]
        return Sample(index, ImageList([item], upright=self.upright)[0].image, self.label(index))

    def name(self, index: int) -> str:
        """Return the image's number."""
        return f"image {index}"

    def file(self, index: int) -> Path | None:
        """Return None, as the data set reads the images."""
        return None

    def label(self, index: int) -> int | None:
        """Return the image's label, or None without labels."""
        return None if self.labels is None else int(self.labels[index])

    def fingerprint(self) -> str:
        """Hash the number of images, their labels, and 64 images."""
        return content_hash(self, [] if self.labels is None else [self.labels.numpy()])

    def stored_bytes(self) -> int:
        """Estimate the size of all images from the first."""
        first = self[0].image
        return len(self) * (first.nbytes if isinstance(first, Tensor) else len(first))


def open_data(data: Any) -> tuple[Source, str]:
    """Return the training images, and their data URI or :data:`.GIVEN`.

    Args:
        data: data URI, or images for :func:`as_source`.
    """
    if isinstance(data, str | os.PathLike):
        return open_images(data), os.fspath(data)
    return as_source(data), GIVEN


def as_source(images: Any, *, upright: bool = False) -> Source:
    """Return images as a source: one from :func:`~localagg.open_images` as it is, a list, or a
    data set.

    Raises:
        UserError: as :class:`ImageList` and :class:`ImageDataset`.
    """
    if hasattr(images, "fingerprint"):
        return images
    several = isinstance(images, Dataset) or (
        isinstance(images, Sized)
        and hasattr(images, "__getitem__")
        and not hasattr(images, "__array__")
        and not isinstance(images, _LISTS)
    )
    return (ImageDataset if several else ImageList)(images, upright=upright)


def _labels(dataset: Any) -> tuple[Tensor | None, list[str] | None]:
    """Return labels int64 [N] and class names, or None without labels."""
    if hasattr(dataset, "indices") and hasattr(dataset, "dataset"):  # torch's Subset
        labels, classes = _labels(dataset.dataset)
        return None if labels is None else labels[list(dataset.indices)], classes
    tensors = getattr(dataset, "tensors", ())
    found = getattr(dataset, "targets", getattr(dataset, "labels", None))
    found = tensors[1] if found is None and len(tensors) == 2 else found
    try:
        values = np.asarray(found)
    except (ValueError, TypeError):
        return None, None
    if values.shape != (len(dataset),) or values.dtype.kind not in "iu":
        return None, None
    names = getattr(dataset, "classes", None)
    if not isinstance(names, list | tuple) or len(names) <= values.max():
        if values.max() >= MAX_CLASSES:
            raise UserError(
                "unsupported",
                f"The dataset's labels go up to {values.max():,}; number its classes from 0, at"
                f" most {MAX_CLASSES:,}.",
            )
        names = range(int(values.max()) + 1)
    return torch.from_numpy(values.astype(np.int64)), [str(name) for name in names]
