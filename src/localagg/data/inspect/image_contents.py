"""Recognize images by their content, whatever their names and order."""

import numpy as np
from torch import Tensor

from ...io.console import ProgressCallback
from ..images.decode import READ_ERRORS
from ..images.headers import read_ends
from ..sources.open import Source
from .identical_images import digest


def content_digests(
    source: Source, on_progress: ProgressCallback = lambda done, of: None
) -> np.ndarray:
    """Return a digest of each image: S16 [N], empty where it cannot be read.

    It covers the size and both ends of a file (33 KB), which differ for different photos, or all
    decoded pixels.
    """
    found = np.zeros(len(source), "S16")
    for index in range(len(source)):
        try:
            ends = read_ends(source, index)
            whole = isinstance(ends, Tensor)
            found[index] = digest(ends.numpy().tobytes()) if whole else digest(*ends)
        except READ_ERRORS:
            pass
        on_progress(index + 1, len(source))
    return found


def match_contents(digests: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return for each image a known one with its content, -1 if there is none: int64 [N].

    Identical images match known ones in order: the first the first, the second the second.

    Args:
        digests: S16 [N], from :func:`content_digests`.
        known: S16 [M].
    """
    places: dict[bytes, list[int]] = {}
    for row in range(len(known) - 1, -1, -1):
        places.setdefault(bytes(known[row]), []).append(row)
    places.pop(b"", None)  # unreadable
    found = np.full(len(digests), -1)
    for index, content in enumerate(digests.tolist()):
        if rows := places.get(content):
            found[index] = rows.pop() if len(rows) > 1 else rows[0]
    return found
