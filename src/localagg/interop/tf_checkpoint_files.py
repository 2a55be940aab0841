"""Find a TensorFlow checkpoint's files: beside its prefix, in a folder, or in a tar archive."""

import contextlib
import glob
import gzip
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ..errors import UserError, suggest

MOST_INDEX_BYTES = 64 << 20  # an index takes some 80 bytes a variable

_MOST_BYTES = 16 << 30  # total size of an archive's members
_MOST_MEMBERS = 10_000
_MOST_READ_BYTES = 1 << 20  # tarfile reads an extended header at once, whatever size it claims
_SUFFIX = re.compile(r"\.(index|meta|data-\d{5}-of-\d{5})$")
_PYTORCH = (b"PK", b"\x80\x02")  # first bytes of a file by torch.save
_FIX = "name the prefix (such as model.ckpt-10), its .index file, or a folder or .tar that holds it"


def index_file(prefix: Path) -> Path:
    """Return the file that lists a checkpoint's variables."""
    return prefix.with_name(prefix.name + ".index")


def find_prefix(path: Path) -> Path:
    """Return the prefix of the checkpoint that a path names; see ``open_tf_checkpoint``.

    Raises:
        UserError: no V2 checkpoint, or several and no state file.
    """
    prefix = path.with_name(_SUFFIX.sub("", path.name)) if path.name else path
    if path.name and index_file(prefix).is_file():
        return prefix
    if path.is_dir():
        return _find_in_folder(path)
    if path.name == "checkpoint" and path.is_file():
        return _find_in_folder(path.parent)
    if prefix != path or list(path.parent.glob(f"{glob.escape(path.name)}.data-*-of-*")):
        raise UserError(
            "not-found",
            f"'{index_file(prefix)}' is missing; a checkpoint is its .index and its .data files"
            " together, so copy it beside them.",
        )
    if path.is_file():
        raise UserError(
            "unsupported",
            f"'{path}' is not a TensorFlow V2 checkpoint (V1 and PyTorch files are not); {_FIX}.",
        )
    others = [file.with_suffix("").name for file in path.parent.glob("*.index")]
    raise UserError(
        "not-found",
        f"There is no TensorFlow V2 checkpoint '{path}'; {_FIX}.{suggest(path.name, others)}",
    )


def _find_in_folder(folder: Path) -> Path:
    found = sorted(file.with_suffix("") for file in folder.glob("*.index"))
    state = folder / "checkpoint"
    if state.is_file():
        with open(state, "rb") as file:
            text = file.read(1 << 16).decode(errors="replace")
        named = re.search(r'^model_checkpoint_path:\s*"([^"\n]+)"', text, re.MULTILINE)
        # The path may be that of the training machine, so only its last part counts.
        if named and (prefix := folder / PurePosixPath(named[1]).name) in found:
            return prefix
    if not found:
        raise UserError("not-found", f"'{folder}' holds no TensorFlow V2 checkpoint; {_FIX}.")
    if len(found) > 1:
        listed = ", ".join(prefix.name for prefix in found[:5]) + ", ..." * (len(found) > 5)
        raise UserError(
            "option-conflict", f"'{folder}' holds several checkpoints ({listed}); name one of them."
        )
    return found[0]


def is_archive(path: Path) -> bool:
    """Return whether a file is a ``.tar`` or ``.tar.gz`` by its first bytes or its name."""
    if not path.is_file() or index_file(path).is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(512)
    if start[257:262] == b"ustar" or start[:2] == b"\x1f\x8b":
        return True
    # The PyTorch port names its files checkpoint.pth.tar.
    return path.name.endswith((".tar", ".tar.gz", ".tgz")) and start[:2] not in _PYTORCH


def unpack(archive: Path, folder: Path) -> Path:
    """Write the only checkpoint of an archive into a folder and return its prefix there.

    Only the checkpoint's files are written, without their folders.

    Raises:
        UserError: not an archive, damaged, too large, no or several checkpoints, or a member that
            is a link or device or leaves the folder.
    """
    homes: set[PurePosixPath] = set()
    total, last_offset = 0, -1
    try:
        with _open_tar(archive) as tar:
            for count, member in enumerate(tar):
                # A negative size would make tarfile read the same members forever.
                if member.size < 0 or member.offset <= last_offset:
                    raise tarfile.ReadError(f"the size of {member.name!r} is wrong")
                total, last_offset = total + member.size, member.offset
                if total > _MOST_BYTES or count >= _MOST_MEMBERS:
                    raise UserError(
                        "too-large",
                        f"'{archive}' holds more than {_MOST_BYTES >> 30} GiB or"
                        f" {_MOST_MEMBERS:,} members; pack only the checkpoint's files.",
                    )
                path = _check_path(member, archive)
                if member.isreg() and (path.name == "checkpoint" or _SUFFIX.search(path.name)):
                    homes.add(path.parent)
                    with tar.extractfile(member) as source, open(folder / path.name, "wb") as file:  # type: ignore[union-attr]
                        shutil.copyfileobj(source, file, _MOST_READ_BYTES)
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            "damaged", f"The archive '{archive}' cannot be read ({reason}); copy or pack it again."
        ) from None
    if len(homes) > 1:
        listed = ", ".join(sorted(map(str, homes))[:5])
        raise UserError(
            "option-conflict",
            f"'{archive}' holds checkpoints in several folders ({listed}); unpack it and name one.",
        )
    if not homes:
        raise UserError(
            "not-found", f"'{archive}' holds no TensorFlow checkpoint; pack its .index and .data."
        )
    return _find_in_folder(folder)


@contextlib.contextmanager
def _open_tar(archive: Path) -> Iterator[tarfile.TarFile]:
    with open(archive, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        plain: Any = _BoundedReader(gzip.GzipFile(fileobj=file) if compressed else file)
        with tarfile.open(fileobj=plain, mode="r:") as tar:
            yield tar


def _check_path(member: tarfile.TarInfo, archive: Path) -> PurePosixPath:
    """Return a member's path; raise UserError for links, devices and paths out of the folder."""
    path = PurePosixPath(member.name)
    outside = path.is_absolute() or ".." in path.parts or "\\" in member.name
    if outside or not (member.isreg() or member.isdir()) or member.issparse():
        raise UserError(
            "unsafe",
            f"'{archive}' has a member that leaves its folder or is a link, a device or sparse:"
            f" {member.name!r}; pack plain files only.",
        )
    return path


class _BoundedReader:
    """A file that rejects the huge reads a wrong header would make tarfile ask for."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MOST_READ_BYTES:
            raise tarfile.ReadError("a header claims an impossible size")
        return self._file.read(size)
