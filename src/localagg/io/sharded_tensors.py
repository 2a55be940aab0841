"""Tensors of a checkpoint that are split over the ranks: one file a rank, read by any number.

``bank-1-of-4.safetensors`` is what the second of four ranks has written. Which rows it holds
follows from the rows of the files before it.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


def shard_path(folder: Path, name: str, rank: int = 0, ranks: int = 1) -> Path:
    """The file of a rank."""
    return folder / f"{name}-{rank}-of-{ranks}.safetensors"


def find_shards(folder: Path, name: str) -> list[Path]:
    """All files of a name, in the order of the ranks that have written them; none where there are
    none.

    Raises:
        FileNotFoundError: some are missing.
    """
    found = [path.stem.split("-of-")[1] for path in folder.glob(f"{name}-*-of-*.safetensors")]
    if not found:
        return []
    files = [shard_path(folder, name, rank, int(found[0])) for rank in range(int(found[0]))]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"'{file.name}' is missing")
    return files


def read_shards(
    files: list[Path], tensor: str, *, dim: int = 0, part: range | None = None
) -> Tensor:
    """A tensor that is split along ``dim`` over files, or a part of it.

    No more is read than is asked for.

    Args:
        files: of :func:`find_shards`.
        tensor: its name in them.
        dim: 0 or 1.
        part: which rows (or columns); None: all.

    Raises:
        ValueError: there are fewer.
    """
    found, start = [], 0
    for file in files:
        with safe_open(file, framework="pt") as opened:
            stored = opened.get_slice(tensor)
            stop = start + stored.get_shape()[dim]
            low, high = (start, stop) if part is None else (part.start, part.stop)
            low, high = max(low, start) - start, min(high, stop) - start
            if low < high:
                found.append(stored[low:high] if dim == 0 else stored[:, low:high])
            start = stop
    if part is not None and part.stop > start:
        raise ValueError(f"'{tensor}' has {start:,} rows, not the {part.stop:,} that are asked for")
    if not found:  # a rank without rows
        with safe_open(files[0], framework="pt") as opened:
            stored = opened.get_slice(tensor)
            return stored[:0] if dim == 0 else stored[:, :0]
    return found[0] if len(found) == 1 else torch.cat(found, dim=dim)
