"""A folder of image files, with or without class folders, with or without ``train/`` and ``val/``.

ImageNet's ``train/`` and ``val/`` of wnid folders are such: labels number the sorted folder names,
as the reference's packing script does.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..config import UserError
from .protocol import ALIASES, SPLIT_NAMES, Sample, Stored, fingerprint

EXTENSIONS = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".png",
        ".bmp",
        ".gif",
        ".ppm",
        ".pgm",
        ".pbm",
        ".tif",
        ".tiff",
        ".webp",
        ".avif",
    ]
)


class Folder:
    """Image files under a root, sorted by relative path; the first folder of a path is its class.

    Labels exist only where every file lies in a class folder and there are at least two of them; or
    where one of them is among ``known``, the class folders of training. Then files outside of any
    have the label -1.
    """

    def __init__(
        self,
        uri: str,
        root: Path,
        files: list[tuple[str, int]],
        known: frozenset[str] = frozenset(),
    ) -> None:
        self.uri, self.root = uri, root
        self._sizes = [size for _, size in files]
        self.paths = [path for path, _ in files]
        self.classes: list[str] | None = None
        self.labels: Tensor | None = None
        tops = [path.split("/")[0] if "/" in path else None for path in self.paths]
        names = sorted({top for top in tops if top is not None})
        if (len(names) > 1 and None not in tops) or not known.isdisjoint(names):
            number = {name: label for label, name in enumerate(names)}
            self.classes = names
            self.labels = torch.tensor([-1 if top is None else number[top] for top in tops])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        label = None if self.labels is None else int(self.labels[index])
        return Sample(index, (self.root / self.paths[index]).read_bytes(), label)

    def name(self, index: int) -> str:
        """See :class:`~localagg.data.protocol.Source`."""
        return self.paths[index]

    def fingerprint(self) -> str:
        """Over all paths and sizes, and the bytes of 64 files."""
        return fingerprint(
            self, (f"{p}\0{s}" for p, s in zip(self.paths, self._sizes, strict=True))
        )

    def stored_bytes(self) -> int:
        """See :class:`~localagg.data.protocol.Source`."""
        return sum(self._sizes)


def find_folder(uri: str, root: Path) -> Stored:
    """Any folder is taken for one of images; :class:`~localagg.config.UserError` if it has none."""
    splits = [name for name in SPLIT_NAMES if (root / name).is_dir()]
    train = next((name for name in ALIASES["train"] if name in splits), None)
    if train is None:
        return Stored(["train"], lambda split: _open(uri, root))

    def open_split(split: str) -> Folder:
        known = frozenset() if split == train else _class_folders(root / train)
        return _open(uri, root / split, known)

    return Stored(splits, open_split)


def _class_folders(train: Path) -> frozenset[str]:
    """The classes of training, from the names at its root alone; none where there are not two."""
    with os.scandir(train) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and entry.name[0] != "."]
    return frozenset(names if len(names) > 1 else ())


def _open(uri: str, root: Path, known: frozenset[str] = frozenset()) -> Folder:
    files = sorted(_walk(root, ""))
    if not files:
        kinds = " ".join(sorted(EXTENSIONS))
        raise UserError(f"'{root}' holds no images (looked for {kinds}); is it the right folder?")
    return Folder(uri, root, files, known)


def _walk(root: Path, prefix: str) -> Iterator[tuple[str, int]]:
    """(relative path with '/', size) of every image file.

    Hidden files and folders are left out, and links from a folder to one that holds it. Links that
    lead nowhere count as images of no size: to read one tells so.
    """
    with os.scandir(root / prefix) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = prefix + entry.name
            if entry.is_dir():
                if not (entry.is_symlink() and _holds(entry.path, root / prefix)):
                    yield from _walk(root, path + "/")
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                yield path, _size(entry)


def _holds(folder: str, inner: Path) -> bool:
    """Whether ``inner`` lies in ``folder``, or is it, whatever links say."""
    return inner.resolve().is_relative_to(os.path.realpath(folder))


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return 0
