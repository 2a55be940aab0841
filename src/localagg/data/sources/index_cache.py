"""An index of data files, kept so that it is built once.

It lies in a hidden file beside the data, or in the user's cache folder where the data are
read-only. Names, sizes and modification times of the data files are stored with it; if any of them
changed it is built again.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ...io.console import notify

Columns = dict[str, np.ndarray]


def cached_columns(
    folder: Path,
    name: str,
    files: list[str],
    version: int,
    build: Callable[[], Columns],
    valid: Callable[[Columns], bool],
) -> Columns:
    """The index of files in a folder: from its cache if they did not change, else built and cached.

    Args:
        folder: where the files are.
        name: of the index, in file names.
        files: their names in the folder.
        version: of what ``build`` makes.
        build: makes the arrays; called where there is no cache of these files.
        valid: whether arrays found in a cache can be of these files.

    Raises:
        OSError: the files cannot be read.
    """
    folder = folder.resolve()
    stats = [(folder / file).stat() for file in files]
    state = [[n, s.st_size, s.st_mtime_ns] for n, s in zip(files, stats, strict=True)]
    key = json.dumps({"version": version, "files": state})
    places = _places(folder, f"localagg-index-{name}.safetensors")
    for place in places:
        if (columns := _load(place, key)) is not None and valid(columns):
            return columns
    columns = build()
    _save(places, key, columns)
    return columns


def _places(folder: Path, name: str) -> list[Path]:
    """Where the index may lie, best first: beside the data unless the folder is read-only."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]
    places = [folder / f".{name}", home / "localagg" / "indices" / digest / name]
    # An administrator may write anywhere; a folder without a write bit is still meant to stay.
    writable = os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222
    return places if writable else places[::-1]


def _load(place: Path, key: str) -> Columns | None:
    """The arrays in a cache file; None if there is none, or it is of other files, or damaged."""
    try:
        with safe_open(place, framework="np") as cache:
            if (cache.metadata() or {}).get("localagg") != key:
                return None
            return {name: cache.get_tensor(name) for name in cache.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


def _save(places: list[Path], key: str, columns: Columns) -> None:
    """Write the cache beside its name and rename it, so that other processes see all or nothing."""
    arrays = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    content = save(arrays, metadata={"localagg": key})
    for place in places:
        beside = place.with_name(f"{place.name}.{os.getpid()}.tmp")
        try:
            if not place.parent.is_dir():
                place.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(content)
            os.replace(beside, place)
            return
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
    where = " or ".join(f"'{place.parent}'" for place in places)
    notify(f"The index of the images cannot be written to {where}; it is built each time.")
