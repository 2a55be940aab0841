"""The folder of an unfinished pack: ``DST.partial``.

    data/            becomes DST
    state/key.json   the source and options of the pack
    state/NAME.json  facts of a file in data/; written when the file is complete
    state/NAME.sha256  hashes of its images, 32 bytes each
    .lock            held by the process that packs

The last step renames ``data/``; the rest can be removed then. A folder of that name that no pack
has made is neither written nor removed.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import Interrupted, UserError
from ...io.files import atomic_write, disk_advice, sync_to_disk
from ...io.run_lock import LOCK_NAME, lock_run
from ..inspect.identical_images import group_identical

_SPACE_FACTOR, _SPACE_BYTES = 1.02, 1 << 24  # files take this much more than their images
_HASH = 32  # bytes
_EMPTY = hashlib.sha256(b"").digest()
_KEY = {"data", "format", "shrink", "splits"}  # the keys of key.json


def check_destination(destination: Path) -> None:
    """Raise UserError unless the destination is missing or an empty folder, and ``DST.partial`` is
    missing or made by a pack."""
    root = _partial_root(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        if root.is_dir() and not (root / "data").exists() and _is_made_by_pack(root):
            _remove(root)  # killed after the rename
        raise UserError("exists", f"'{destination}' exists and is not empty; name another folder.")
    if root.exists() and not _is_made_by_pack(root):
        raise UserError(
            "exists",
            f"This pack would work in '{root}', but that folder was not made by pack; move it, or"
            " name another destination.",
        )


def _partial_root(destination: Path) -> Path:
    return destination.with_name(f"{destination.name}.partial")


def _is_made_by_pack(root: Path) -> bool:
    """Whether a folder has a pack's key, or is as empty as before its key was written, and after it
    was removed."""
    key = root / "state" / "key.json"
    if key.is_file():
        try:
            stored = json.loads(key.read_bytes())
        except (OSError, ValueError):
            return False
        return isinstance(stored, dict) and stored.keys() == _KEY
    return root.is_dir() and all(map(_may_lie_beside_no_key, root.rglob("*")))


def _may_lie_beside_no_key(path: Path) -> bool:
    if path.is_symlink():
        return False
    if path.is_dir():
        return path.name in ("data", "state")
    if path.name == LOCK_NAME:
        return bool(re.fullmatch(rb"(\d+ on \S+)?", path.read_bytes()))
    # Earlier versions named the lock "lock".
    return path.name == ".key.json.tmp" or (path.name == "lock" and path.stat().st_size == 0)


def _remove(root: Path) -> None:
    """Remove the files of a pack, and nothing that was put beside them. The key goes last, so that
    a folder left by a kill is still recognized."""
    state = root / "state"
    shutil.rmtree(root / "data", ignore_errors=True)
    with contextlib.suppress(OSError):  # of a folder that is read-only or not empty
        for path in list(state.glob("*")):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != "key.json":
                path.unlink()
        shutil.rmtree(state, ignore_errors=True)
        for name in (LOCK_NAME, "lock"):
            (root / name).unlink(missing_ok=True)
        root.rmdir()


def check_free_space(folder: Path, size: int) -> None:
    """Raise UserError unless ``size`` bytes, and a little more, are free."""
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    need, free = int(max(0, size) * _SPACE_FACTOR) + _SPACE_BYTES, shutil.disk_usage(parent).free
    if free < need:
        raise UserError(
            "too-large",
            f"Packing needs {need / 2**30:,.2f} GiB, but '{parent}' has {free / 2**30:,.2f} GiB"
            " free; free some space, or name another folder.",
        )


class PartialFolder:
    """An unfinished pack. Its methods need the lock of :meth:`open`.

    Args:
        destination: the folder that it becomes.
        key: source and options of the pack; JSON with the keys data, format, shrink and splits.
    """

    def __init__(self, destination: Path, key: dict[str, Any]) -> None:
        self.destination, self._key = destination, key
        self.root = _partial_root(destination)
        self.folder, self._state = self.root / "data", self.root / "state"
        self.finished: set[str] = set()

    @property
    def next_step(self) -> str:
        """How to continue, for a message."""
        if not self.finished:
            return "no file was finished; run the same command again."
        return f"finished files are kept in '{self.root}': run the same command to continue."

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Lock and create the folder, and find the complete files of an earlier pack.

        Without any finished file the folder is removed in the end. UserError: another process packs
        there, the folder belongs to another pack, or writing fails. Interrupted: Ctrl-C.
        """
        try:
            with lock_run(self.root):
                self._load()
                try:
                    yield
                finally:
                    if not self.finished or not self.folder.exists():
                        _remove(self.root)
        except KeyboardInterrupt:
            raise Interrupted(f"stopped; {self.next_step}") from None
        except OSError as error:
            raise UserError(
                "environment",
                f"Packing '{self._key['data']}' into '{self.destination}' failed"
                f" ({error.strerror or error}); {disk_advice(error)}; {self.next_step}",
            ) from None

    def _load(self) -> None:
        for folder in (self.folder, self._state):
            folder.mkdir(parents=True, exist_ok=True)
        key, text = self._state / "key.json", json.dumps(self._key)
        if not key.exists():
            with atomic_write(key) as beside:
                beside.write_text(text)
        elif key.read_text() != text:
            raise UserError(
                "mismatch",
                f"'{self.root}' contains an unfinished pack of other data or with other options;"
                " finish it by that command, or remove the folder.",
            )
        for path in self._state.rglob("*.json"):
            name = path.relative_to(self._state).as_posix().removesuffix(".json")
            if path != key and self._is_complete(name):
                self.finished.add(name)

    def _is_complete(self, name: str) -> bool:
        """Whether a file is finished and contains no lost image, which may be readable today."""
        file, facts = self.folder / name, self.facts(name)
        return file.is_file() and file.stat().st_size == facts["size"] and not facts["lost"]

    def add(self, name: str, facts: dict[str, Any], digests: list[bytes]) -> None:
        """Store the facts and image hashes of a complete file."""
        state = self._state / name
        state.parent.mkdir(exist_ok=True)
        with atomic_write(state.with_name(f"{state.name}.sha256")) as beside:
            beside.write_bytes(b"".join(digests))
        size = (self.folder / name).stat().st_size
        with atomic_write(state.with_name(f"{state.name}.json")) as beside:
            beside.write_text(json.dumps({**facts, "size": size}))
        self.finished.add(name)

    def forget(self, names: list[str]) -> None:
        """Make the next pack write these files again."""
        for name in names:
            (self._state / f"{name}.json").unlink(missing_ok=True)

    def facts(self, name: str) -> dict[str, Any]:
        """Return the stored facts of a file."""
        return json.loads((self._state / f"{name}.json").read_bytes())

    def digests(self, name: str) -> np.ndarray:
        """Return the SHA-256 of each image of a file, uint8 [images, 32]."""
        return np.fromfile(self._state / f"{name}.sha256", np.uint8).reshape(-1, _HASH)

    def written_bytes(self) -> int:
        """Return the bytes of the finished files."""
        return sum((self.folder / name).stat().st_size for name in self.finished)

    def identical_images(self, files: list[list[str]]) -> list[list[tuple[int, int]]]:
        """Return groups of images with the same bytes as (split, index), ordered by their first.

        ``files`` names the files of each split. Empty images are skipped.
        """
        splits = [np.concatenate([self.digests(name) for name in names]) for names in files]
        starts = np.cumsum([0, *map(len, splits)])
        digests = np.concatenate(splits).view(f"S{_HASH}").ravel()
        digests[digests == _EMPTY] = b""
        groups = []
        for rows in group_identical(digests):
            split = np.searchsorted(starts, rows, side="right") - 1
            groups.append(list(zip(split.tolist(), (rows - starts[split]).tolist(), strict=True)))
        return groups

    def finish(self) -> None:
        """Rename the folder to its destination."""
        for unfinished in self.folder.rglob(".*.tmp"):  # of an index
            unfinished.unlink()
        for path in (*self.folder.rglob("*"), self.folder):
            sync_to_disk(path)
        os.rename(self.folder, self.destination)  # also over an empty folder
        sync_to_disk(self.destination.parent)
