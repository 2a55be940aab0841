"""What every source of images offers, and what the kinds of sources share."""

import errno
import hashlib
import io
import os
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from ...errors import UserError

# Names under which a split may be stored, the asked one first.
ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "test"),
    "test": ("test", "val", "validation", "valid"),
}
SPLIT_NAMES = ("train", "training", "val", "validation", "valid", "test")
MOST_CLASSES = 1_000_000  # a larger label is damage, not a class; bounds the lists made from labels
_FINGERPRINT_SAMPLES = 64


class Sample(NamedTuple):
    """One image of a source."""

    index: int
    """Its row in the memory bank: 0..N-1."""
    image: bytes | Tensor
    """Encoded bytes, or decoded uint8 [3, H, W]."""
    label: int | None


class ImageRecord(NamedTuple):
    """One image on its way into a packed file."""

    index: int
    name: str
    """What to call it in a message."""
    image: bytes
    label: int | None
    path: str | None = None
    """Where it lay, relative to its folder; None where it lay in no file of its own."""
    format: str = ""
    """As Pillow calls it (``JPEG``); empty where it is not known."""


class Source(Protocol):
    """What every source offers. It can be pickled, so that worker processes read from it."""

    uri: str
    classes: list[str] | None
    """Class names by label; None where there are no labels."""
    labels: Tensor | None
    """int64 [N], or None."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...
    def name(self, index: int) -> str:
        """What to call the image in a message: its path, or its record."""
        ...

    def file(self, index: int) -> Path | None:
        """Return the file that holds only this image, of which a part can be read, or None."""
        return None

    def fingerprint(self) -> str:
        """Hash of (index -> content): the same only if every index still means the same image."""
        ...

    def stored_bytes(self) -> int:
        """Bytes that all images take where they are stored (of a table: its whole)."""
        ...


class MissingSplit(UserError):
    """The data exist but have no such split."""


class Splits(NamedTuple):
    """Data of some kind that were found at a URI, not opened yet."""

    splits: Sequence[str]
    """Names of its splits as they are stored."""
    open: Callable[[str], Source]
    """Opens one of them by that name."""


def choose(uri: str, available: Sequence[str], split: str) -> str:
    """The stored name of a split that is asked for as train, val or test.

    Raises:
        MissingSplit: there is none.
    """
    for name in ALIASES[split]:
        if name in available:
            return name
    if list(available) == ["train"]:
        raise MissingSplit(
            "TODO", f"'{uri}' has no split '{split}'; all of its images are 'train'."
        )
    raise MissingSplit("TODO", f"'{uri}' has no split '{split}'; it has {', '.join(available)}.")


def split_in_name(stem: str) -> str:
    """The split that a file's name (without its extension) says; train where it says none.

    A part of it between digits, blanks and ``-_.`` is a split's name, in any case, as ``datasets``
    takes it, or that name and ``set``: ``val_0``, ``test0``, ``imagenet-validation-00003``,
    ``TestSet``, but not ``values``. The first such part counts.
    """
    parts = (part.removesuffix("set") for part in re.split(r"[-_. 0-9]+", stem.lower()))
    return next((part for part in parts if part in SPLIT_NAMES), "train")


def split_folders(root: Path) -> dict[str, Path]:
    """The sub-folders that are called as splits are, in any case, by the split's name.

    Raises:
        UserError: two that differ by case alone.
    """
    found: dict[str, Path] = {}
    for own in sorted(os.listdir(root)) if root.is_dir() else ():
        name = own.lower()
        if name not in SPLIT_NAMES or not (root / own).is_dir():
            continue
        if name in found:
            raise UserError(
                "TODO",
                f"'{root}' holds {found[name].name} and {own}, both the split {name}; make them one"
                " folder, or rename one.",
            )
        found[name] = root / own
    return {name: found[name] for name in SPLIT_NAMES if name in found}


def fingerprint(source: Source, facts: Iterable[str | np.ndarray]) -> str:
    """Hash of the count, of what is known of each image, and of the bytes of 64 images.

    Args:
        source: the images.
        facts: a line for each image, or arrays over all images; or both.
    """
    digest = hashlib.sha256(f"{len(source)}\n".encode())
    for fact in facts:
        if isinstance(fact, str):
            digest.update(fact.encode("utf-8", "surrogateescape") + b"\n")
        else:
            digest.update(np.ascontiguousarray(fact).data)
    for i in np.linspace(0, len(source) - 1, min(_FINGERPRINT_SAMPLES, len(source))).astype(int):
        try:
            image = source[int(i)].image
        except (OSError, UserError):  # a file that is gone, or damaged, is another content
            image = b"\0missing"
        digest.update(image if isinstance(image, bytes) else image.numpy().tobytes())
    return digest.hexdigest()


def open_file(path: str | os.PathLike[str]) -> io.FileIO:
    """A file that foreign data name, open for reading.

    Raises:
        OSError: it cannot be opened; or it is a pipe, of which one would wait without end, a device
            or a folder.
    """

    def at_once(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    try:
        file = open(path, "rb", buffering=0, opener=at_once)  # noqa: SIM115 - handed out
    except ValueError:
        raise OSError(errno.EINVAL, "Not a path", os.fspath(path)) from None  # a NUL in it
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))


def read_file(path: str | os.PathLike[str]) -> bytes:
    """All of a file that foreign data name; see :func:`open_file`."""
    with open_file(path) as file:
        return file.readall()


def encoded_bytes(image: bytes | Tensor) -> bytes:
    """The bytes of a sample's image: as they are, or decoded pixels [3, H, W] as PNG."""
    if isinstance(image, bytes):
        return image
    from torchvision.io import encode_png

    return encode_png(image.contiguous()).numpy().tobytes()
