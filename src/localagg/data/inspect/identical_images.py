"""Images whose bytes are identical, within a split and from one split to the other."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...io.console import ProgressCallback
from ..images.decode import READ_ERRORS
from ..images.headers import HEAD, FileEnds, read_ends, stored_bytes
from ..sources.open import Source

_LENGTH = 16  # bytes of a digest: that two of a million different images share one is 1 in 1e24
_NAMED = 1_000  # groups, or images, that are named


def digest(head: bytes, tail: bytes = b"", size: int | None = None) -> bytes:
    """16 bytes that differ where the arguments do (BLAKE2b). The last one is not zero: numpy's byte
    strings would drop it."""
    hashed = hashlib.blake2b(head, digest_size=_LENGTH - 1)
    hashed.update(tail + (len(head) if size is None else size).to_bytes(8, "little"))
    return hashed.digest() + b"\1"


def compare(
    sources: Sequence[Source],
    digests: Sequence[np.ndarray],
    sizes: Sequence[np.ndarray],
    on_progress: ProgressCallback,
) -> None:
    """Make the digests of equal images equal, and no others.

    Images of any of the sources whose beginning, end and size agree are read whole.

    Args:
        sources: the images.
        digests: of each source S16 [N]: :func:`digest` of the ends of each image, empty where it is
            unreadable. Overwritten.
        sizes: of each source int64 [N]: bytes of each image.
        on_progress: called as images are read whole.
    """
    starts = np.cumsum([0, *map(len, digests)])
    again = np.concatenate(groups(np.concatenate(digests)) or [np.empty(0, np.int64)])
    again = again[np.concatenate(sizes)[again] > HEAD]  # of others the beginning is all there is
    for done, row in enumerate(again.tolist(), 1):
        which = int(np.searchsorted(starts, row, side="right")) - 1
        index = row - int(starts[which])
        digests[which][index] = _whole(sources[which], index)
        on_progress(done, len(again))


def _whole(source: Source, index: int) -> bytes:
    try:
        ends = read_ends(source, index)
        assert isinstance(ends, FileEnds)
        return digest(stored_bytes(source, index, ends))
    except READ_ERRORS:  # it could be read a moment ago
        return b""


def groups(digests: np.ndarray) -> list[np.ndarray]:
    """The rows of each digest that occurs more than once, in order, by their first row."""
    order = np.argsort(digests, kind="stable")
    ordered = digests[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])) if len(order) else order
    parts = np.split(order, starts[1:])
    found = [part for part in parts if len(part) > 1 and digests[part[0]] != b""]
    return sorted(found, key=lambda part: int(part[0]))


def repetitions(source: Source, digests: np.ndarray) -> dict[str, Any]:
    """{"images": repetitions of an earlier image, "groups", "labels_differ": groups whose images
    are labelled differently, "named": up to 1,000 groups of names}."""
    found, labels = groups(digests), source.labels
    differ = 0
    if labels is not None:
        differ = sum(len(set(labels[group].tolist())) > 1 for group in found)
    return {
        "images": sum(map(len, found)) - len(found),
        "groups": len(found),
        "labels_differ": differ,
        "named": [[source.name(int(row)) for row in group] for group in found[:_NAMED]],
    }


def shared(source: Source, digests: np.ndarray, others: np.ndarray) -> dict[str, Any]:
    """{"images": those that are in another split too, "named": up to 1,000 of them}."""
    rows = np.flatnonzero(np.isin(digests, others) & (digests != b"")).tolist()
    return {"images": len(rows), "named": [source.name(row) for row in rows[:_NAMED]]}
