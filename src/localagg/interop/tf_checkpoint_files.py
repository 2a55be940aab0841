"""Where a TensorFlow checkpoint lies: beside its prefix, in a folder, or in a tar archive."""

import gzip
import re
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO

from ..errors import UserError, suggest
from .leveldb_table import TABLE_MAGIC

MOST_INDEX_BYTES = 64 << 20  # an index needs some 80 bytes a variable

_MOST_BYTES = 16 << 30  # of an archive's members together
_MOST_MEMBERS = 10_000
_MOST_HEADER = 1 << 20  # tarfile reads extended headers whole, whatever size they claim
_PARTS = re.compile(r"\.(index|meta|data-\d{5}-of-\d{5})$")
_WAY_OUT = (
    "name the prefix (such as model.ckpt-10), its .index file, or a folder or .tar that holds one"
)


def index_file(prefix: Path) -> Path:
    """The table of a checkpoint's variables."""
    return prefix.with_name(prefix.name + ".index")


def find_prefix(path: Path) -> Path:
    """The prefix that a path stands for.

    Args:
        path: a prefix, one of the files that begin with it (``.index``, ``.meta``, ``.data-*``), a
            folder that holds one checkpoint or whose state file ``checkpoint`` names one, or that
            state file.

    Raises:
        UserError: no V2 checkpoint is there, or several and none is named.
    """
    prefix = path.with_name(_PARTS.sub("", path.name)) if _PARTS.search(path.name) else path
    if path.name and index_file(prefix).is_file():
        return prefix
    if path.is_dir():
        return _in_folder(path)
    if path.name == "checkpoint" and path.is_file():
        return _in_folder(path.parent)
    if prefix != path or list(path.parent.glob(f"{_escaped(path.name)}.data-*-of-*")):
        raise UserError(
            "TODO",
            f"'{index_file(prefix)}' is missing; a checkpoint is its .index and its .data files"
            " together, so copy it beside them.",
        )
    if path.is_file():
        raise UserError("TODO", f"'{path}' {_what_it_is(path)}.")
    if list(path.parent.glob(f"{_escaped(path.name)}-{'[0-9]' * 5}-of-{'[0-9]' * 5}")):
        raise UserError("TODO", f"'{path}' {_V1}.")
    found = [file.with_suffix("").name for file in path.parent.glob("*.index")]
    raise UserError(
        "TODO",
        f"There is no TensorFlow checkpoint '{path}'; {_WAY_OUT}.{suggest(path.name, found)}",
    )


_V1 = (
    "is a V1 checkpoint, which is not read; load it in TensorFlow and save it again with a"
    " tf.train.Saver(write_version=2)"
)


def _what_it_is(path: Path) -> str:
    with open(path, "rb") as file:
        start = file.read(4)
        file.seek(-min(8, path.stat().st_size), 2)
        if file.read(8) == TABLE_MAGIC:
            return _V1
    if start[:2] in (b"PK", b"\x80\x02"):
        return "holds PyTorch weights, not a TensorFlow checkpoint; read_torch_port reads those"
    return f"is not a TensorFlow checkpoint; {_WAY_OUT}"


def _in_folder(folder: Path) -> Path:
    found = sorted(file.with_suffix("") for file in folder.glob("*.index"))
    state = folder / "checkpoint"
    if state.is_file():
        with open(state, "rb") as file:
            text = file.read(1 << 16).decode(errors="replace")
        named = re.search(r'^model_checkpoint_path:\s*"([^"\n]+)"', text, re.MULTILINE)
        if named:  # perhaps with the folders of the machine that trained: the last part counts
            prefix = folder / PurePosixPath(named[1]).name
            if prefix in found:
                return prefix
            if prefix.is_file() and not found:
                raise UserError("TODO", f"'{prefix}' {_what_it_is(prefix)}.")
    if len(found) != 1:
        some = ", ".join(prefix.name for prefix in found[:5]) + ", ..." * (len(found) > 5)
        what = f"holds several checkpoints ({some}): name one of them" if found else None
        raise UserError(
            "TODO", f"'{folder}' {what or f'holds no TensorFlow checkpoint; {_WAY_OUT}'}."
        )
    return found[0]


def is_archive(path: Path) -> bool:
    """Whether a file is, or by its name should be, a ``.tar`` or ``.tar.gz``."""
    if not path.is_file() or index_file(path).is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(512)
    return start[257:262] == b"ustar" or start[:2] == b"\x1f\x8b" or _named_tar(path, start)


def _named_tar(path: Path, start: bytes) -> bool:
    pytorch = start[:2] in (b"PK", b"\x80\x02")  # the port's checkpoint.pth.tar is no tar
    return path.name.endswith((".tar", ".tar.gz", ".tgz")) and not pytorch


def unpack(archive: Path, folder: Path) -> Path:
    """Write the one checkpoint of an archive into a folder.

    Only its own files are written, under their last names; every member is checked before.

    Returns:
        Its prefix in ``folder``.

    Raises:
        UserError: not an archive, damaged, too large, no or several checkpoints in it, or a member
            that is a link or device or whose path leaves the folder.
    """
    try:
        with open(archive, "rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            plain = gzip.GzipFile(fileobj=file) if compressed else file
            with tarfile.open(fileobj=_Bounded(plain), mode="r:") as tar:  # type: ignore[arg-type]
                return _unpack(tar, archive, folder)
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            "TODO", f"The archive '{archive}' cannot be read ({reason}); copy or pack it again."
        ) from None


def _unpack(tar: tarfile.TarFile, archive: Path, folder: Path) -> Path:
    members = _checked(tar, archive)
    tables = [name for name in members if name.suffix == ".index"]
    homes = {name.parent for name in tables}
    if len(homes) > 1:
        some = ", ".join(str(name.with_suffix("")) for name in tables[:5])
        raise UserError(
            "TODO",
            f"'{archive}' holds several checkpoints ({some}): unpack it and name one of them.",
        )
    home = homes.pop() if homes else PurePosixPath()
    for name in [*tables, home / "checkpoint"]:
        if name in members:
            if members[name].size > MOST_INDEX_BYTES:
                raise UserError(
                    "TODO", f"'{name}' in '{archive}' is too large for an index: refused."
                )
            _write(tar, members[name], folder / name.name)
    if not tables:
        raise UserError(
            "TODO", f"'{archive}' holds no TensorFlow checkpoint; pack its .index and .data."
        )
    prefix = _in_folder(folder)
    for name, member in members.items():
        if name.parent == home and name.name.startswith(prefix.name + ".data-"):
            _write(tar, member, folder / name.name)
    return prefix


def _checked(tar: tarfile.TarFile, archive: Path) -> dict[PurePosixPath, tarfile.TarInfo]:
    """The files of an archive by path, once every member was found harmless."""
    members: dict[PurePosixPath, tarfile.TarInfo] = {}
    total, at = 0, -1
    for count, member in enumerate(tar):
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts or "\\" in member.name:
            raise UserError(
                "TODO", f"'{archive}' has a member that leaves its folder: {member.name!r}."
            )
        if not (member.isreg() or member.isdir()) or member.issparse():
            raise UserError(
                "TODO",
                f"'{archive}' has a member that is a link, a device or sparse: {member.name!r};"
                " pack plain files only.",
            )
        # A size below zero would make tarfile read the same members for ever.
        if member.size < 0 or member.offset <= at:
            raise tarfile.ReadError(f"the size of {member.name!r} is wrong")
        total, at = total + member.size, member.offset
        if total > _MOST_BYTES or count >= _MOST_MEMBERS:
            raise UserError(
                "TODO",
                f"'{archive}' holds more than {_MOST_BYTES >> 30} GiB or {_MOST_MEMBERS:,} members:"
                " pack the checkpoint's own files only.",
            )
        if member.isreg():
            members[name] = member
    return members


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    source = tar.extractfile(member)
    left = member.size
    with open(target, "wb") as file:
        while source and left:
            piece = source.read(min(left, _MOST_HEADER))
            if not piece:
                raise tarfile.ReadError(f"{member.name!r} is truncated")
            file.write(piece)
            left -= len(piece)


class _Bounded:
    """A file for tarfile that refuses to read much at once, as a false header would have it."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MOST_HEADER:
            raise tarfile.ReadError("a header of it claims an impossible size")
        return self._file.read(size)


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)
