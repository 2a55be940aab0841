"""A folder of image files, with or without class folders, with or without ``train/`` and ``val/``.

Labels number the sorted names of the class folders, as the reference's packing script does for
ImageNet's wnid folders.
"""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from .image_files import EXTENSIONS, is_folder, walk_images
from .labels import number_labels
from .source import Sample, Source, content_hash
from .splits import ALIASES, Splits, split_folders

_LISTED = 5  # folders in a message


class ImageFolder(Source):
    """Image files under a root, sorted by relative path; the first folder of a path is its class.

    Labels exist only if every file lies in a class folder and there are at least two of them, or
    if one of them is among ``training_classes``. Then files outside of class folders have label -1.
    """

    def __init__(
        self,
        uri: str,
        root: Path,
        files: list[tuple[str, int]],
        training_classes: frozenset[str] = frozenset(),
    ) -> None:
        self.uri, self.root = uri, root
        self._sizes = [size for _, size in files]
        self.paths = [path for path, _ in files]
        self.classes: list[str] | None = None
        self.labels: Tensor | None = None
        tops = [path.partition("/")[0] if "/" in path else None for path in self.paths]
        names = sorted({top for top in tops if top is not None})
        if (len(names) > 1 and None not in tops) or not training_classes.isdisjoint(names):
            code = {name: position for position, name in enumerate(names)}
            codes = np.array([-1 if top is None else code[top] for top in tops])
            if found := number_labels(names, codes, self.name, partial=True):
                self.labels, self.classes = torch.from_numpy(found[0]), found[1]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        return Sample(index, self.file(index).read_bytes(), self.label(index))

    def name(self, index: int) -> str:
        """Return the path relative to the root."""
        return self.paths[index]

    def file(self, index: int) -> Path:
        """Return the image's file."""
        return self.root / self.paths[index]

    def fingerprint(self) -> str:
        """Hash all paths and sizes, and the bytes of 64 files."""
        lines = zip(self.paths, self._sizes, strict=True)
        return content_hash(self, (f"{path}\0{size}" for path, size in lines))

    def stored_bytes(self) -> int:
        """Return the size of all files in bytes."""
        return sum(self._sizes)


def find_image_folder(uri: str) -> Splits | None:
    """Return the splits of any folder: its sub-folders named like splits, else "train".

    Raises:
        UserError: other sub-folders beside those of splits hold images too. Reading either kind
            alone would lose images, or train on held-out ones.
    """
    root = Path(uri).expanduser()
    if not root.is_dir():
        return None
    splits = split_folders(root)
    if not splits:
        return Splits(["train"], lambda split: _open(uri, root))
    named = {folder.name for folder in splits.values()}
    others = [name for name in _folders(root) if name not in named and _holds_own(root, name)]
    if others:
        more = f" and {len(others) - _LISTED:,} more" if len(others) > _LISTED else ""
        raise UserError(
            "mismatch",
            f"'{root}' has images in folders named like splits, {', '.join(sorted(named))}, and in"
            f" others, {', '.join(others[:_LISTED])}{more}. If all are classes, move them into a"
            " folder 'train'; otherwise move the others elsewhere.",
        )
    train = next((name for name in ALIASES["train"] if name in splits), None)

    def open_split(split: str) -> ImageFolder:
        if train is None or split == train:
            return _open(uri, splits[split])
        classes = _folders(splits[train])
        return _open(uri, splits[split], frozenset(classes if len(classes) > 1 else ()))

    return Splits(list(splits), open_split)


def _folders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.name[0] != "." and is_folder(e))


def _holds_own(root: Path, name: str) -> bool:
    """Return whether a sub-folder holds images of its own, not by a link within the root."""
    folder, home = root / name, root.resolve()
    target = folder.resolve()
    back = home.is_relative_to(target) or target.is_relative_to(home)
    return not (folder.is_symlink() and back) and any(walk_images(folder))


def _open(uri: str, root: Path, training_classes: frozenset[str] = frozenset()) -> ImageFolder:
    files = sorted(walk_images(root))
    if not files:
        extensions = " ".join(sorted(EXTENSIONS))
        raise UserError("no-images", f"'{root}' has no images ({extensions}); name another folder.")
    return ImageFolder(uri, root, files, training_classes)
