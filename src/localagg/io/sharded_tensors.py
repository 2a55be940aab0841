"""Tensors of a checkpoint that are split over ranks, one file a rank.

Rank 1 of 4 writes ``bank-1-of-4.safetensors``. The rows of a file follow those of the files before
it, so any number of ranks can read them.
"""

import errno
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .read_errors import RESTORE, convert_damage


def shard_path(folder: Path, name: str, rank: int = 0, ranks: int = 1) -> Path:
    """Return the file of a rank."""
    return folder / f"{name}-{rank}-of-{ranks}.safetensors"


def find_shards(folder: Path, name: str) -> list[Path]:
    """Return the files of all ranks in order; an empty list if there are none.

    Raises:
        FileNotFoundError: some files are missing.
    """
    found = next(folder.glob(f"{name}-*-of-*.safetensors"), None)
    if found is None:
        return []
    ranks = int(found.stem.split("-of-")[1])
    files = [shard_path(folder, name, rank, ranks) for rank in range(ranks)]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(errno.ENOENT, "", str(file))
    return files


def read_shards(
    files: list[Path],
    tensor: str,
    *,
    dim: int = 0,
    part: range | None = None,
    fix: str = RESTORE,
) -> Tensor:
    """Read a tensor that is split along ``dim``, or only a part of it.

    Args:
        files: from :func:`find_shards`.
        tensor: name in the files.
        dim: 0 or 1.
        part: indices along ``dim``. Default: all.
        fix: the way out of damage, for messages.

    Raises:
        UserError: a file is damaged or cannot be read.
        ValueError: ``part`` ends after the last index.
    """
    found, start = [], 0
    for file in files:
        with convert_damage(file, fix), safe_open(file, framework="pt") as opened:
            stored = opened.get_slice(tensor)
            stop = start + stored.get_shape()[dim]
            low, high = (start, stop) if part is None else (part.start, part.stop)
            low, high = max(low, start) - start, min(high, stop) - start
            if low < high:
                found.append(stored[low:high] if dim == 0 else stored[:, low:high])
            start = stop
    if part is not None and part.stop > start:
        raise ValueError(f"'{tensor}' has {start:,} rows, but {part.stop:,} are needed")
    if not found:  # a rank without rows
        with safe_open(files[0], framework="pt") as opened:
            stored = opened.get_slice(tensor)
            return stored[:0] if dim == 0 else stored[:, :0]
    return found[0] if len(found) == 1 else torch.cat(found, dim=dim)
