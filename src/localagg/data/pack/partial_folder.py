"""The folder of a pack that is not finished: ``DST.partial``.

    data/            becomes DST
    state/key.json   what is being packed, and how
    state/NAME.json  what is known of a file in data/; written when the file is whole
    state/NAME.sha256  the hashes of its images, 32 bytes each
    lock             held by the process that packs

The last step gives ``data/`` its name; what is left then can go. A folder of that name that no
pack has made is neither written to nor removed.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ...errors import UserError
from ...io.files import atomic_write, sync_to_disk

_ROOM = 1.02  # what is written, over what the images take; and a little
_ROOM_BYTES = 1 << 24
_HASH = 32  # bytes
_EMPTY = hashlib.sha256(b"").digest()
_KEY = {"data", "format", "shrink", "splits"}  # what stands in key.json


def check_destination(destination: Path) -> None:
    """That the destination does not exist yet, or is an empty folder, and that there is room beside
    it for the folder of an unfinished pack.

    Raises:
        UserError: it is something else, or a folder that no pack has made has the name of that.
    """
    root = _root(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        if root.is_dir() and not (root / "data").exists() and _is_ours(root):
            _remove(root)  # killed in the last moment
        raise UserError("TODO", f"'{destination}' exists and is not empty; name another folder.")
    _check_ours(root)


def _root(destination: Path) -> Path:
    return destination.with_name(f"{destination.name}.partial")


def _check_ours(root: Path) -> None:
    if root.exists() and not _is_ours(root):
        raise UserError(
            "TODO",
            f"'{root}' is where this pack would work, but no pack has made it; move it, or name"
            " another destination.",
        )


def _is_ours(root: Path) -> bool:
    """Whether a pack has made a folder: its key tells, or it is as empty as before its key was
    written, and after it was removed."""
    key = root / "state" / "key.json"
    if key.is_file():
        try:
            told = json.loads(key.read_bytes())
        except (OSError, ValueError):
            return False
        return isinstance(told, dict) and told.keys() == _KEY
    return root.is_dir() and all(map(_is_bare, root.rglob("*")))


def _is_bare(path: Path) -> bool:
    """Whether it may be in a pack's folder that has no key."""
    if path.is_symlink():
        return False
    if path.is_dir():
        return path.name in ("data", "state")
    return path.name == ".key.json.tmp" or (path.name == "lock" and path.stat().st_size == 0)


def _remove(root: Path) -> None:
    """Remove what a pack has made, and nothing that was put beside it. The key goes last, so that
    what a kill leaves is still known for its own."""
    state = root / "state"
    shutil.rmtree(root / "data", ignore_errors=True)
    with contextlib.suppress(OSError):  # of a folder that cannot be written; or is not empty
        for path in list(state.glob("*")):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != "key.json":
                path.unlink()
        shutil.rmtree(state, ignore_errors=True)
        (root / "lock").unlink(missing_ok=True)
        root.rmdir()


def room(folder: Path, size: int) -> None:
    """That so many bytes, and a little more, are free.

    Raises:
        UserError: they are not.
    """
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    need, free = int(max(0, size) * _ROOM) + _ROOM_BYTES, shutil.disk_usage(parent).free
    if free < need:
        raise UserError(
            "TODO",
            f"Packing needs {need / 2**30:,.2f} GiB, but '{parent}' has {free / 2**30:,.2f} GiB"
            " free; make room, or name another folder.",
        )


class PartialFolder:
    """A pack in the making, locked while it is one; a context manager.

    Where nothing was finished, nothing is left behind.

    Args:
        destination: the folder that it becomes.
        key: what is packed, and how; JSON with the keys data, format, shrink and splits.

    Raises:
        UserError: another process packs there now, another pack was begun there, or no pack has
            made the folder that is there.
    """

    def __init__(self, destination: Path, key: dict[str, Any]) -> None:
        self.destination, self._key = destination, key
        self.root = _root(destination)
        self.folder, self._state = self.root / "data", self.root / "state"
        self.finished: set[str] = set()

    @property
    def way_on(self) -> str:
        """How to go on, for a message."""
        if not self.finished:
            return "nothing was finished; run the same command again."
        return f"what is finished is kept in '{self.root}': run the same command to go on."

    def __enter__(self) -> "PartialFolder":
        _check_ours(self.root)
        try:
            for folder in (self.folder, self._state):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.root / "lock", "wb")
        except OSError as error:
            raise UserError("TODO", f"'{self.root}' cannot be written: {error}.") from None
        try:
            # Unlike flock's, this lock is not the workers' too, so it ends with a killed process.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(
                "TODO", f"Another process is packing into '{self.root}'; wait for it."
            ) from None
        try:
            self._recall()
        except BaseException:
            self._lock.close()
            raise
        return self

    def _recall(self) -> None:
        """What a pack before this one has finished."""
        key = self._state / "key.json"
        text = json.dumps(self._key)
        if key.exists():
            if key.read_text() != text:
                raise UserError(
                    "TODO",
                    f"'{self.root}' holds an unfinished pack of other data or with other options;"
                    " run that command to go on with it, or remove the folder.",
                )
        else:
            with atomic_write(key) as beside:
                beside.write_text(text)
        for path in self._state.rglob("*.json"):
            name = path.relative_to(self._state).as_posix().removesuffix(".json")
            if path != key and self._is_whole(name):
                self.finished.add(name)

    def _is_whole(self, name: str) -> bool:
        """Whether a file is finished, and there is no image in it that may be read today."""
        file, facts = self.folder / name, self.facts(name)
        return file.is_file() and file.stat().st_size == facts["size"] and not facts["lost"]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.finished or not self.folder.exists():
            _remove(self.root)
        self._lock.close()

    # --- Files ---

    def add(self, name: str, facts: dict[str, Any], digests: list[bytes]) -> None:
        """Note that a file is whole, and what is in it."""
        state = self._state / name
        state.parent.mkdir(exist_ok=True)
        hashes = state.with_name(f"{state.name}.sha256")
        with atomic_write(hashes) as beside:
            beside.write_bytes(b"".join(digests))
        size = (self.folder / name).stat().st_size
        with atomic_write(state.with_name(f"{state.name}.json")) as beside:
            beside.write_text(json.dumps({**facts, "size": size}))
        self.finished.add(name)

    def forget(self, names: list[str]) -> None:
        """Have files written again by the next pack."""
        for name in names:
            (self._state / f"{name}.json").unlink(missing_ok=True)

    def facts(self, name: str) -> dict[str, Any]:
        """What was noted of a file."""
        return json.loads((self._state / f"{name}.json").read_bytes())

    def digests(self, name: str) -> list[bytes]:
        """The hashes of a file's images."""
        data = (self._state / f"{name}.sha256").read_bytes()
        return [data[i : i + _HASH] for i in range(0, len(data), _HASH)]

    def written(self) -> int:
        """Bytes of the finished files."""
        return sum((self.folder / name).stat().st_size for name in self.finished)

    def duplicates(self, files: list[list[str]]) -> list[list[tuple[int, int]]]:
        """Groups of images with the same bytes, as (split, index), in the order of their first.

        Empty images are not counted.

        Args:
            files: the names of the files of each split.
        """
        hashes, places = [], []
        for split, names in enumerate(files):
            data = b"".join((self._state / f"{name}.sha256").read_bytes() for name in names)
            found = np.frombuffer(data, f"S{_HASH}")
            hashes.append(found)
            places += [np.stack([np.full(len(found), split), np.arange(len(found))], axis=1)]
        whole_hash, place = np.concatenate(hashes), np.concatenate(places)
        _, group, count = np.unique(whole_hash, return_inverse=True, return_counts=True)
        rows = np.flatnonzero(count[group] > 1)
        groups: dict[int, list[tuple[int, int]]] = {}
        for row in rows.tolist():
            if whole_hash[row] != _EMPTY:
                split, index = place[row].tolist()
                groups.setdefault(int(group[row]), []).append((split, index))
        return list(groups.values())

    def finish(self) -> None:
        """Give the folder its name."""
        for left in self.folder.rglob(".*.tmp"):  # of an index that was not finished
            left.unlink()
        for path in (*self.folder.rglob("*"), self.folder):
            sync_to_disk(path)
        os.rename(self.folder, self.destination)  # over an empty folder too
        sync_to_disk(self.destination.parent)
