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
from .image_files import is_folder, is_image_file, is_system_folder, walk_images
from .labels import number_labels
from .source import Sample, Source, content_hash
from .splits import ALIASES, Splits, check_mixed_splits, split_folders

_LISTED = 5  # folders in a message
_LEVELS = 2  # of folders without images of their own between a URI and its splits


class ImageFolder(Source):
    """Image files under a root, sorted by relative path; the first folder of a path is its class.

    Folders that all files share are no classes. Labels exist only if every file lies in a class
    folder and there are at least two of them, or if one of them is among ``training_classes``. Then
    files outside of class folders have label -1.
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
        tops, names, shared = _class_folders(self.paths, training_classes)
        if _are_shards(root / shared, names):
            return
        if (len(names) > 1 and None not in tops) or not training_classes.isdisjoint(names):
            code = {name: position for position, name in enumerate(names)}
            codes = np.array([-1 if top is None else code[top] for top in tops])
            if found := number_labels(names, codes, self.name):
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


def _class_folders(
    paths: list[str], training_classes: frozenset[str]
) -> tuple[list[str | None], list[str], str]:
    """Return each file's class folder or None, their sorted names, and the folder they share."""
    shared = ""
    while True:
        tops = [_top(path[len(shared) :]) for path in paths]
        names = sorted({top for top in tops if top is not None})
        alone = len(names) == 1 and None not in tops and training_classes.isdisjoint(names)
        if not alone:
            return tops, names, shared
        shared += names[0] + "/"


def _top(path: str) -> str | None:
    return path.partition("/")[0] if "/" in path else None


def _are_shards(root: Path, names: list[str]) -> bool:
    """Return whether folders are numbered parts of a download, as img2dataset writes: 00000/."""
    numbered = bool(names) and all(name.isdigit() for name in names)
    return numbered and any(
        (root / f"{names[0]}{end}").is_file() for end in (".parquet", "_stats.json", ".csv")
    )


def find_image_folder(uri: str, root: Path) -> Splits | None:
    """Return the splits of a folder of images: its sub-folders named like splits, else "train".

    A folder that holds nothing but another one stands for it: flowers/flowers/train.

    Raises:
        UserError: other sub-folders beside those of splits hold images too, or splits lie inside of
            classes. Reading either kind alone would lose images, or train on held-out ones.
    """
    if not any(walk_images(root)):
        return None
    splits = _find_split_folders(root)
    if not splits:
        return Splits(
            ["train"], lambda _: _open(uri, root), root, lambda p: is_image_file(root / p)
        )
    place = next(iter(splits.values())).parent
    named = {folder.name for folder in splits.values()}
    others = [name for name in _folders(place) if name not in named and _holds_own(place, name)]
    if others:
        more = f" and {len(others) - _LISTED:,} more" if len(others) > _LISTED else ""
        raise UserError(
            "mismatch",
            f"'{place}' has images in folders named like splits, {', '.join(sorted(named))}, and in"
            f" others, {', '.join(others[:_LISTED])}{more}. If all are classes, move them into a"
            " folder 'train'; otherwise move the others elsewhere.",
        )
    train = next((name for name in ALIASES["train"] if name in splits), None)

    def open_split(split: str) -> ImageFolder:
        if train is None or split == train:
            return _open(uri, splits[split])
        return _open(uri, splits[split], frozenset(_training_classes(splits[train])))

    inside = tuple(folder.relative_to(root).as_posix() + "/" for folder in splits.values())
    return Splits(
        [*splits],
        open_split,
        root,
        lambda path: path.startswith(inside) and is_image_file(root / path),
    )


def _find_split_folders(root: Path) -> dict[str, Path]:
    """Return the split folders of a folder, or of the only folder of images in it."""
    for _ in range(_LEVELS + 1):
        if splits := split_folders(root):
            return {name: folder for name, folder in splits.items() if any(walk_images(folder))}
        holding = [name for name in _folders(root) if _holds_own(root, name)]
        with os.scandir(root) as entries:
            images = any(is_image_file(e.path) for e in entries if not e.name.startswith("."))
        if len(holding) != 1 or images:
            break
        root = root / holding[0]
    return {}


def _training_classes(folder: Path) -> list[str]:
    """Return the names of the class folders of training; none for fewer than two."""
    while len(names := _folders(folder)) == 1:
        folder = folder / names[0]
    return names


def _folders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if not is_system_folder(e.name) and is_folder(e))


def _holds_own(root: Path, name: str) -> bool:
    """Return whether a sub-folder holds images of its own, not by a link within the root."""
    folder, home = root / name, root.resolve()
    target = folder.resolve()
    back = home.is_relative_to(target) or target.is_relative_to(home)
    return not (folder.is_symlink() and back) and any(walk_images(folder))


def _open(uri: str, root: Path, training_classes: frozenset[str] = frozenset()) -> ImageFolder:
    files = sorted(walk_images(root))
    check_mixed_splits(uri, {path.rpartition("/")[0] for path, _ in files})
    return ImageFolder(uri, root, files, training_classes)
