"""Write files atomically: to a temporary name, synced to disk, then renamed."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import UserError

_LONGEST_NAME = 255  # bytes, on nearly all file systems
_ADVICE = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "change its permissions"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
    errno.EAGAIN: "raise the limit of processes (ulimit -u)",
    errno.ENOMEM: "free memory",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def disk_advice(error: OSError) -> str:
    """Return what a user can do about an error of the file system."""
    return _ADVICE.get(error.errno or 0, "check the disk")


def reason_of(error: OSError) -> str:
    """Return the system's words for an error; some libraries replace them by their own."""
    return os.strerror(error.errno) if error.errno else str(error.strerror or error)


def check_writable(path: str | Path, way: str = "name another") -> None:
    """Check, before the work for it, that a file or folder can be made or replaced.

    Tries to make a file without a name in the folder, or in the nearest folder that exists: modes
    alone show neither read-only mounts nor the rules of network file systems. A parent that is no
    folder is left to the command.

    Args:
        path: the file or folder.
        way: the way out besides the permissions.

    Raises:
        UserError: no permission, a read-only or full disk, or a name that is too long or has a NUL.
    """
    place = Path(path).absolute()
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(place)
        folder = place if place.is_dir() else place.parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
    except NotADirectoryError:
        return
    except ValueError:  # a NUL
        raise UserError(
            "option-invalid", f"'{path}' cannot be a name of a file; choose another."
        ) from None
    except OSError as error:
        raise UserError(
            "environment", f"'{path}': {reason_of(error)}; {disk_advice(error)}, or {way}."
        ) from None


def hidden_beside(path: Path, suffix: str) -> Path:
    """Return ``.NAME.SUFFIX`` beside a file, shortened where that is too long for a name."""
    name = os.fsencode(path.name)[: _LONGEST_NAME - len(suffix) - 1]
    return path.with_name(f".{os.fsdecode(name)}{suffix}")


def check_unicode(path: Path) -> None:
    """Check that a path is UTF-8: safetensors opens no other.

    Raises:
        UserError: it is not.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise UserError(
            "unsupported", f"The name '{path}' is not valid UTF-8; rename it, or choose another."
        ) from None


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary name in the same folder; rename it to ``path`` when the block ends.

    If the block fails, the temporary file is removed and ``path`` stays unchanged. After a loss of
    power ``path`` is the old file or the new one: the contents are synced before the rename, and
    the rename before this returns.

    Raises:
        OSError: disk full or no permission; its ``filename`` is set.
    """
    temporary = hidden_beside(path, ".tmp")
    try:
        yield temporary
        sync_to_disk(temporary)
        os.replace(temporary, path)
        sync_to_disk(path.parent)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # no name: by a write to an open file
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_to_disk(path: Path) -> None:
    """Force a file, or the entries of a folder, to disk; Windows opens no folders."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_inside(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """Return whether a path, which need not exist, lies in an existing folder."""
    place = Path(os.path.realpath(Path(path).expanduser()))
    return os.path.isdir(folder) and place.is_relative_to(os.path.realpath(folder))


def absolute_place(place: str) -> str | None:
    """Return a data URI of paths (PATH, or FILE.csv:ROOT) with absolute paths; None for others."""
    parts = [place] if os.path.exists(place) else place.split(":")
    return ":".join(map(os.path.abspath, parts)) if all(map(os.path.exists, parts)) else None


def noted_place(place: str, absolute: str | None) -> str:
    """Return the place that a run noted; from another working directory, its absolute path."""
    return absolute if absolute is not None and absolute_place(place) is None else place


def read_at(file: int, length: int, offset: int) -> bytes:
    """Read up to ``length`` bytes of an open file at an offset. Windows has no ``os.pread``."""
    if hasattr(os, "pread"):
        return os.pread(file, length, offset)
    os.lseek(file, offset, os.SEEK_SET)
    return os.read(file, length)


def write_synced(
    path: Path, parts: Iterable[bytes | memoryview], *, window: int = 32 * 2**20
) -> None:
    """Write bytes and force them to disk, ``window`` bytes at a time.

    Synced bytes are dropped from the page cache, so a large checkpoint does not evict the training
    images. Where memory is scarce or given to a virtual machine on demand, this is several times as
    fast as one large write, which waits for new pages.
    """
    synced = 0
    with open(path, "wb", buffering=0) as file:

        def sync() -> None:
            nonlocal synced
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                size = file.tell() - synced
                os.posix_fadvise(file.fileno(), synced, size, os.POSIX_FADV_DONTNEED)
            synced = file.tell()

        for part in parts:
            left = memoryview(part)
            while left:
                left = left[file.write(left[: synced + window - file.tell()]) :]
                if file.tell() == synced + window:
                    sync()
        sync()
