"""A folder of image files, with or without class folders, with or without ``train/`` and ``val/``.

ImageNet's ``train/`` and ``val/`` of wnid folders are such: labels number the sorted folder names,
as the reference's packing script does.
"""

import os
from pathlib import Path

import torch
from torch import Tensor

from ...errors import UserError
from .image_files import EXTENSIONS, is_folder, walk_images
from .source import ALIASES, Sample, Source, Splits, fingerprint, split_folders

_NAMED = 5  # folders in a message


class ImageFolder(Source):
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
        """See :class:`~localagg.data.sources.source.Source`."""
        return self.paths[index]

    def file(self, index: int) -> Path:
        """Return the path of the image's file."""
        return self.root / self.paths[index]

    def fingerprint(self) -> str:
        """Over all paths and sizes, and the bytes of 64 files."""
        return fingerprint(
            self, (f"{p}\0{s}" for p, s in zip(self.paths, self._sizes, strict=True))
        )

    def stored_bytes(self) -> int:
        """See :class:`~localagg.data.sources.source.Source`."""
        return sum(self._sizes)


def find_folder(uri: str, root: Path) -> Splits:
    """Any folder is taken for one of images, of splits where its sub-folders are called so.

    Raises:
        UserError: images in sub-folders of both kinds, which would be lost or learned from.
    """
    splits = split_folders(root)
    if not splits:
        return Splits(["train"], lambda split: _open(uri, root))
    named = {folder.name for folder in splits.values()}
    with os.scandir(root) as entries:
        folders = sorted(e.name for e in entries if e.name[0] != "." and is_folder(e))
    if others := [name for name in folders if name not in named and _holds_own(root, name)]:
        more = f" and {len(others) - _NAMED:,} more" if len(others) > _NAMED else ""
        raise UserError(
            "TODO",
            f"'{root}' holds images in {', '.join(sorted(named))}, called as splits are, and in"
            f" {', '.join(others[:_NAMED])}{more}, which are not; if all are classes move them into"
            " a folder 'train' in it, else move the others out of it.",
        )
    train = next((name for name in ALIASES["train"] if name in splits), None)

    def open_split(split: str) -> ImageFolder:
        known = frozenset()
        if train is not None and split != train:
            known = _class_folders(splits[train])
        return _open(uri, splits[split], known)

    return Splits(list(splits), open_split)


def _class_folders(train: Path) -> frozenset[str]:
    """The classes of training, from the names at its root alone; none where there are not two."""
    with os.scandir(train) as entries:
        names = [entry.name for entry in entries if entry.name[0] != "." and is_folder(entry)]
    return frozenset(names if len(names) > 1 else ())


def _holds_own(root: Path, name: str) -> bool:
    """Whether a sub-folder holds images; none of its own if it is a link to others of the root."""
    folder, home = root / name, root.resolve()
    target = folder.resolve()
    back = home.is_relative_to(target) or target.is_relative_to(home)
    return not (folder.is_symlink() and back) and any(walk_images(folder))


def _open(uri: str, root: Path, known: frozenset[str] = frozenset()) -> ImageFolder:
    files = sorted(walk_images(root))
    if not files:
        kinds = " ".join(sorted(EXTENSIONS))
        raise UserError(
            "TODO", f"'{root}' holds no images (looked for {kinds}); is it the right folder?"
        )
    return ImageFolder(uri, root, files, known)
