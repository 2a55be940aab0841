"""Find images whose bytes are identical, within a split and between splits."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...io.console import ProgressCallback
from ..images.decode import READ_ERRORS
from ..images.headers import HEAD, FileEnds, read_ends, stored_bytes
from ..sources.open import Source

_LENGTH = 16  # bytes of a digest: two of a million different images share one with odds of 1e-24
_NAMED = 1_000  # groups, or images, that are named


def digest(head: bytes, tail: bytes = b"", size: int | None = None) -> bytes:
    """Return a BLAKE2b digest of 16 bytes, of which the last is not zero: numpy's byte strings
    would drop it."""
    hashed = hashlib.blake2b(head, digest_size=_LENGTH - 1)
    hashed.update(tail + (len(head) if size is None else size).to_bytes(8, "little"))
    return hashed.digest() + b"\1"


def digest_candidates(
    sources: Sequence[Source],
    digests: Sequence[np.ndarray],
    sizes: Sequence[np.ndarray],
    on_progress: ProgressCallback,
) -> None:
    """Make digests equal for identical images only, by reading candidates whole.

    Candidates are images of any source whose beginning, end and size agree.

    Args:
        sources: the images.
        digests: of each source S16 [N]: :func:`digest` of the ends of each image, empty where it is
            unreadable. Overwritten.
        sizes: of each source int64 [N]: bytes of each image.
        on_progress: called with (candidates done, candidates).
    """
    starts = np.cumsum([0, *map(len, digests)])
    rows = np.concatenate([np.empty(0, np.int64), *group_identical(np.concatenate(digests))])
    rows = rows[np.concatenate(sizes)[rows] > HEAD]  # shorter images were read whole
    for done, row in enumerate(rows.tolist(), 1):
        split = int(np.searchsorted(starts, row, side="right")) - 1
        index = row - int(starts[split])
        digests[split][index] = _digest_whole(sources[split], index)
        on_progress(done, len(rows))


def _digest_whole(source: Source, index: int) -> bytes:
    try:
        ends = read_ends(source, index)
        assert isinstance(ends, FileEnds)
        return digest(stored_bytes(source, index, ends))
    except READ_ERRORS:  # it was readable a moment ago
        return b""


def group_identical(digests: np.ndarray) -> list[np.ndarray]:
    """Return the rows of each digest that occurs more than once, ordered by their first row.

    Empty digests are skipped.
    """
    order = np.argsort(digests, kind="stable")
    ordered = digests[order]
    parts = np.split(order, np.flatnonzero(ordered[1:] != ordered[:-1]) + 1)
    groups = [part for part in parts if len(part) > 1 and digests[part[0]] != b""]
    return sorted(groups, key=lambda part: int(part[0]))


def summarize_duplicates(source: Source, digests: np.ndarray) -> dict[str, Any]:
    """Return {"images": images identical to an earlier one, "groups", "labels_differ": groups with
    different labels, "named": up to 1,000 groups of names}."""
    groups, labels = group_identical(digests), source.labels
    differ = 0
    if labels is not None:
        differ = sum(len(set(labels[group].tolist())) > 1 for group in groups)
    return {
        "images": sum(map(len, groups)) - len(groups),
        "groups": len(groups),
        "labels_differ": differ,
        "named": [[source.name(int(row)) for row in group] for group in groups[:_NAMED]],
    }


def summarize_shared(source: Source, digests: np.ndarray, others: np.ndarray) -> dict[str, Any]:
    """Return {"images": images that another split contains too, "named": up to 1,000 of them}."""
    rows = np.flatnonzero(np.isin(digests, others) & (digests != b"")).tolist()
    return {"images": len(rows), "named": [source.name(row) for row in rows[:_NAMED]]}
