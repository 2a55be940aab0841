"""Files that are whole or not there: written beside, flushed to disk, renamed."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

_WINDOW = 1 << 25  # bytes


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to. It takes the place of ``path`` when the block has ended;
    where the block fails it is removed, and ``path`` stays as it was.

    After a loss of power ``path`` is the old file or the new one: the bytes reach the disk before
    the name does, and the name before the block's successor runs.

    Raises:
        OSError: the disk is full or not to be written; its ``filename`` is set.
    """
    beside = path.with_name(f".{path.name}.tmp")
    try:
        yield beside
        sync_to_disk(beside)
        os.replace(beside, path)
        sync_to_disk(path.parent)
    except OSError as error:
        if error.filename is None:  # of a write, which knows a handle alone
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def sync_to_disk(path: Path) -> None:
    """Force a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write bytes and force them to disk, 32 MB at a time.

    What has reached the disk leaves the page cache, so a large checkpoint does not push the images
    out of it that a run learns from; and where memory is scarce (or lent out lazily, as to virtual
    machines) it is several times as fast as one write of everything, which waits for new pages.
    """
    done = 0  # bytes on disk
    with open(path, "wb", buffering=0) as file:

        def flush_window() -> None:
            nonlocal done
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), done, file.tell() - done, os.POSIX_FADV_DONTNEED)
            done = file.tell()

        for part in parts:
            left = memoryview(part)
            while left:
                left = left[file.write(left[: done + _WINDOW - file.tell()]) :]
                if file.tell() == done + _WINDOW:
                    flush_window()
        flush_window()
