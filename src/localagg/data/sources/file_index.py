"""Sources of many images in few files: an index of their positions, built once and cached.

The cache is a hidden file beside the data, or a file in the user's cache folder if the data are
read-only. It holds the names, sizes and modification times of the data files; the index is built
again if any of them changed.
"""

import contextlib
import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from ...errors import UserError
from ...io.console import notify, show_progress
from .labels import read_class_names
from .source import Source

Columns = dict[str, np.ndarray]
POSITIONS = {"file": "int32", "offset": "int64", "length": "int64"}
_SHOW_EVERY = 256  # images


class IndexedFiles(Source):
    """Images at known positions in files. Holds no open file, so worker processes can share it.

    Args:
        uri: the data's name for messages.
        folder: the files' folder.
        split: name of the split as in the names of its files.
        files: file names relative to the folder.
        index: columns [N] "file" (position in ``files``), "offset" and "length" (bytes); perhaps
            "label" int64 [N] and the JSON list "classes" uint8.
    """

    def __init__(
        self, uri: str, folder: Path, split: str, files: list[str], index: Columns
    ) -> None:
        self.uri, self.folder, self.files, self.index = uri, folder, files, index
        self.labels: Tensor | None = None
        self.classes: list[str] | None = None
        if "label" in index:
            self.labels = torch.from_numpy(index["label"].copy())
            names = index.get("classes")
            self.classes = (
                read_class_names(folder, split, self.labels)
                if names is None
                else json.loads(names.tobytes())
            )

    def __len__(self) -> int:
        return len(self.index["file"])

    def position(self, index: int) -> tuple[str, int, int]:
        """Return (file, offset in bytes, length in bytes) of an image."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        columns = self.index
        path = os.path.join(self.folder, self.files[columns["file"][index]])
        return path, int(columns["offset"][index]), int(columns["length"][index])

    def stored_bytes(self) -> int:
        """Return the size of all images in bytes, as they are stored."""
        return int(self.index["length"].sum())


def scan_files(
    folder: Path,
    files: Sequence[str],
    scan: Callable[[Path], Iterable[tuple[int, ...]]],
    names: Sequence[str],
) -> Columns:
    """Scan files in order, with a progress bar; return an int64 column of each value.

    Args:
        folder: the files' folder.
        files: file names relative to the folder.
        scan: yields a row of integers for each image of a file, its offset first.
        names: name of each integer. The column "file" is added.
    """
    columns = {name: array("q") for name in ("file", *names)}
    sizes = [(folder / name).stat().st_size for name in files]
    done = 0
    with show_progress(f"indexing {files[0]}") as show:
        for number, (name, size) in enumerate(zip(files, sizes, strict=True)):
            for row in scan(folder / name):
                for column, value in zip(columns.values(), (number, *row), strict=True):
                    column.append(value)
                if len(columns["file"]) % _SHOW_EVERY == 0:
                    show(done + row[0], sum(sizes))
            done += size
    return {name: np.frombuffer(column, np.int64) for name, column in columns.items()}


def damaged(path: str | Path, offset: int, reason: str) -> UserError:
    """Return the error for a damaged data file."""
    message = f"'{path}' is damaged at byte {offset:,}: {reason}; copy or pack this file again."
    return UserError("damaged", message)


def cached_index(
    folder: Path,
    name: str,
    files: list[str],
    version: int,
    dtypes: Mapping[str, str],
    build: Callable[[], Columns],
) -> Columns:
    """Return the index of files in a folder: the cached one if no file changed, else a new one.

    Args:
        folder: the files' folder.
        name: the index's name, for the cache file.
        files: file names relative to the folder.
        version: version of the index that ``build`` returns.
        dtypes: dtype of each column [N]; of byte arrays of other lengths "uint8".
        build: builds the index. It may have a column "label" int64 [N], too.

    Raises:
        UserError: the files cannot be read, or an error of ``build``.
    """
    folder = folder.resolve()
    try:
        stats = [(folder / file).stat() for file in files]
        state = [[n, s.st_size, s.st_mtime_ns] for n, s in zip(files, stats, strict=True)]
        key = json.dumps({"version": version, "files": state})
        places = _places(folder, f"localagg-index-{name}.safetensors")
        sizes = np.array([s.st_size for s in stats])
        for place in places:
            if (columns := _load(place, key, dtypes, sizes)) is not None:
                return columns
        columns = build()
    except OSError as error:
        raise UserError("environment", f"Cannot read the files in '{folder}': {error}.") from None
    _save(places, key, columns)
    return columns


def _places(folder: Path, name: str) -> list[Path]:
    """Return the possible cache files, best first: beside the data unless they are read-only."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]
    places = [folder / f".{name}", home / "localagg" / "indices" / digest / name]
    # root may write anywhere; a folder without a write bit is still meant to stay unchanged.
    writable = os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222
    return places if writable else places[::-1]


def _load(place: Path, key: str, dtypes: Mapping[str, str], sizes: np.ndarray) -> Columns | None:
    """Return the index in a cache file; None if it is missing, damaged, or of other files."""
    try:
        with safe_open(place, framework="np") as cache:
            if (cache.metadata() or {}).get("localagg") != key:
                return None
            columns = {name: cache.get_tensor(name) for name in cache.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    due = {**dtypes, "label": "int64"} if "label" in columns else dtypes
    if any(name not in columns or columns[name].dtype != dtype for name, dtype in due.items()):
        return None
    if len({columns[name].shape for name, dtype in due.items() if dtype != "uint8"}) > 1:
        return None
    file, offset, length = (columns[name] for name in POSITIONS)
    sound = not len(file) or (0 <= file.min() <= file.max() < len(sizes))
    sound = sound and bool(((offset >= 0) & (length >= 0)).all())
    return columns if sound and bool((length <= sizes[file] - offset).all()) else None


def _save(places: list[Path], key: str, columns: Columns) -> None:
    """Write the cache. Ranks may write it at the same time, so each renames a file of its own."""
    arrays = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    content = save(arrays, metadata={"localagg": key})
    for place in places:
        own = place.with_name(f"{place.name}.{os.getpid()}.tmp")
        try:
            if not place.parent.is_dir():
                place.parent.mkdir(parents=True, exist_ok=True)
            own.write_bytes(content)
            os.replace(own, place)
            return
        except OSError:
            with contextlib.suppress(OSError):
                own.unlink(missing_ok=True)
    folders = " or ".join(f"'{place.parent}'" for place in places)
    notify(f"The index of the images cannot be written to {folders}; it is built each time.")
