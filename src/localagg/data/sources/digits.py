"""The built-in handwritten digits of scikit-learn, at the URI ``digits``."""

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .source import Sample, Source
from .splits import Splits

_TRAIN = 1400


class Digits(Source):
    """scikit-learn's 1,797 digits of 8 x 8 pixels: 1,400 for training, 397 held out.

    A fixed shuffle splits them, so that both parts hold digits of all 43 writers.
    """

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits

        raw: Any = load_digits()
        order = np.random.RandomState(0).permutation(len(raw.target))
        order = order[:_TRAIN] if split == "train" else order[_TRAIN:]
        pixels = np.rint(raw.images[order] * (255 / 16)).astype(np.uint8)
        self.uri = "digits"
        self.pixels = torch.from_numpy(pixels).unsqueeze(1).expand(-1, 3, -1, -1)
        self.labels: Tensor | None = torch.from_numpy(raw.target[order].astype(np.int64))
        self.classes: list[str] | None = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Sample:
        return Sample(index, self.pixels[index], self.label(index))

    def name(self, index: int) -> str:
        """Return the digit's position."""
        return f"digit {index}"

    def fingerprint(self) -> str:
        """Return the hash of all pixels."""
        return hashlib.sha256(self.pixels.numpy().tobytes()).hexdigest()

    def stored_bytes(self) -> int:
        """Return the number of pixel values."""
        return self.pixels.numel()


def find_digits(uri: str) -> Splits | None:
    """Return the splits of the built-in digits for the URI ``digits``, else None."""
    return Splits(["train", "val"], Digits) if uri == "digits" else None
