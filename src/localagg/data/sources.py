"""Where images come from: one small protocol over folders, Parquet, saved ``datasets`` and digits.

A source is random access over encoded (or, for the built-in digits, decoded) images with a dense,
stable index: the sorted relative path of a folder's files, or the order of records. It does not
decode. ``open_images`` chooses the kind from the URI.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..config import UserError, nearest

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
# Names under which a split may be stored, the asked one first.
_ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "test"),
    "test": ("test", "val", "validation", "valid"),
}
_SPLIT_NAMES = ("train", "training", "val", "validation", "valid", "test")
_FINGERPRINT_SAMPLES = 64


class Sample(NamedTuple):
    """One image of a source."""

    index: int
    """Its row in the memory bank: 0..N-1."""
    image: bytes | Tensor
    """Encoded bytes, or decoded uint8 [3, H, W]."""
    label: int | None


class Source(Protocol):
    """What every source offers."""

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

    def fingerprint(self) -> str:
        """Hash of (index -> content): the same only if every index still means the same image."""
        ...


def open_images(uri: str | os.PathLike[str], split: str = "train") -> Source:
    """Open a data URI.

    Args:
        uri: ``digits``; a folder of images with or without class folders, with or without
            ``train/`` and ``val/``; a Parquet file or a folder of them; a folder written by
            ``datasets.save_to_disk``.
        split: "train", "val" or "test". Without splits everything is "train".

    Raises:
        UserError: no such path, no images in it, or no such split.
    """
    uri = os.fspath(uri)
    if split not in _ALIASES:
        raise UserError(f"There is no split '{split}'; there are train, val and test.")
    if uri == "digits":
        return Digits(split)
    root = Path(uri).expanduser()
    if not root.exists():
        raise UserError(
            f"There is no file or folder '{uri}'; --data takes a path, or 'digits'."
            f"{nearest(uri, ['digits'])}"
        )
    if root.is_file():
        if root.suffix != ".parquet":
            raise UserError(f"'{uri}' is a file; --data takes a folder or a .parquet file.")
        return _parquet(uri, {"train": [root]}, split)
    if (root / "dataset_dict.json").exists() or (root / "state.json").exists():
        return _saved_dataset(uri, root, split)
    if tables := _parquet_by_split(root):
        return _parquet(uri, tables, split)
    return _folder(uri, root, split)


def open_evaluation(uri: str | os.PathLike[str]) -> Source | None:
    """The split to measure on ("val", under any of its names), or None where there is none."""
    try:
        return open_images(uri, "val")
    except MissingSplit:
        return None


class MissingSplit(UserError):
    """The data exist but have no such split."""


def _choose(uri: str, available: Sequence[str], split: str) -> str:
    for name in _ALIASES[split]:
        if name in available:
            return name
    raise MissingSplit(f"'{uri}' has no split '{split}'; it has {', '.join(available)}.")


# --- digits ---------------------------------------------------------------------------------------


class Digits:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, built in: 1,400 and 397 of them.

    The split is by a fixed shuffle, so that both parts hold all 43 writers.
    """

    _TRAIN = 1400

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits

        raw: Any = load_digits()
        order = np.random.RandomState(0).permutation(len(raw.target))
        order = order[: self._TRAIN] if split == "train" else order[self._TRAIN :]
        pixels = np.rint(raw.images[order] * (255 / 16)).astype(np.uint8)
        self.uri = "digits"
        self.pixels = torch.from_numpy(pixels).unsqueeze(1).expand(-1, 3, -1, -1)
        self.labels: Tensor | None = torch.from_numpy(raw.target[order].astype(np.int64))
        self.classes: list[str] | None = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Sample:
        assert self.labels is not None
        return Sample(index, self.pixels[index], int(self.labels[index]))

    def name(self, index: int) -> str:
        """See :class:`Source`."""
        return f"digit {index}"

    def fingerprint(self) -> str:
        """See :class:`Source`."""
        return hashlib.sha256(self.pixels.numpy().tobytes()).hexdigest()


# --- folders --------------------------------------------------------------------------------------


class Folder:
    """Image files under a root, sorted by relative path; the first folder of a path is its class.

    Labels exist only where every file lies in a class folder and there are at least two of them.
    """

    def __init__(self, uri: str, root: Path, files: list[tuple[str, int]]) -> None:
        self.uri, self.root = uri, root
        self._sizes = [size for _, size in files]
        self.paths = [path for path, _ in files]
        self.classes: list[str] | None = None
        self.labels: Tensor | None = None
        tops = [path.split("/")[0] if "/" in path else None for path in self.paths]
        names = sorted({top for top in tops if top is not None})
        if len(names) > 1 and None not in tops:
            number = {name: label for label, name in enumerate(names)}
            self.classes = names
            self.labels = torch.tensor([number[top] for top in tops if top is not None])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        label = None if self.labels is None else int(self.labels[index])
        return Sample(index, (self.root / self.paths[index]).read_bytes(), label)

    def name(self, index: int) -> str:
        """See :class:`Source`."""
        return self.paths[index]

    def fingerprint(self) -> str:
        """Over all paths and sizes, and the bytes of 64 files."""
        records = (f"{p}\0{s}" for p, s in zip(self.paths, self._sizes, strict=True))
        return _fingerprint(self, records)


def _folder(uri: str, root: Path, split: str) -> Folder:
    splits = [name for name in _SPLIT_NAMES if (root / name).is_dir()]
    if any(name in splits for name in _ALIASES["train"]):
        root = root / _choose(uri, splits, split)
    elif split != "train":
        raise MissingSplit(f"'{uri}' has no split '{split}'; all of its images are 'train'.")
    files = sorted(_walk(root, ""))
    if not files:
        kinds = " ".join(sorted(EXTENSIONS))
        raise UserError(f"'{root}' holds no images (looked for {kinds}); is it the right folder?")
    return Folder(uri, root, files)


def _walk(root: Path, prefix: str) -> Iterator[tuple[str, int]]:
    """(relative path with '/', size) of every image file; hidden files and folders are left out."""
    with os.scandir(root / prefix) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = prefix + entry.name
            if entry.is_dir():
                yield from _walk(root, path + "/")
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                yield path, entry.stat().st_size


# --- Parquet and saved datasets: both are a Hugging Face dataset ----------------------------------


class Records:
    """A table of encoded images: any ``datasets.Dataset`` with an image and perhaps a label column.

    The image column is the first of type Image, or a struct with ``bytes``, or binary; the label
    column is the first named label, labels, fine_label, class or target.
    """

    _LABELS = ("label", "labels", "fine_label", "class", "target")

    def __init__(self, uri: str, dataset) -> None:
        import datasets

        image = _image_column(uri, dataset)
        if isinstance(dataset.features[image], datasets.Image):
            dataset = dataset.cast_column(image, datasets.Image(decode=False))
        label = next((name for name in self._LABELS if name in dataset.column_names), None)
        self.uri, self._image = uri, image
        self._images = dataset.select_columns([image])
        self.classes: list[str] | None = None
        self.labels: Tensor | None = None
        if label is not None:
            self.labels, self.classes = _labels(dataset, label)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:
        image = self._images[int(index)][self._image]
        if isinstance(image, dict):
            image = image["bytes"] or Path(image["path"] or "").read_bytes()
        label = None if self.labels is None else int(self.labels[index])
        return Sample(index, image or b"", label)

    def name(self, index: int) -> str:
        """See :class:`Source`."""
        return f"record {index} of {self.uri}"

    def fingerprint(self) -> str:
        """Over all labels and the bytes of 64 records."""
        labels = self.labels.tolist() if self.labels is not None else []
        return _fingerprint(self, (str(label) for label in labels))


def _image_column(uri: str, dataset) -> str:
    import datasets

    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image) or (
            isinstance(feature, dict) and "bytes" in feature
        ):
            return name
    for name, feature in dataset.features.items():
        if getattr(feature, "dtype", None) in ("binary", "large_binary"):
            return name
    columns = ", ".join(dataset.column_names)
    raise UserError(f"'{uri}' has no column of images; its columns are {columns}.")


def _labels(dataset, column: str) -> tuple[Tensor, list[str]]:
    values = np.asarray(dataset.with_format("numpy", columns=[column])[column][:])
    names = getattr(dataset.features[column], "names", None)
    if names is not None:
        return torch.from_numpy(values.astype(np.int64)), list(names)
    found, labels = np.unique(values, return_inverse=True)
    return torch.from_numpy(labels.astype(np.int64)), [str(name) for name in found]


def _parquet_by_split(root: Path) -> dict[str, list[Path]]:
    """Parquet files under a folder, or in its split folders, by the split of their name."""
    tables: dict[str, list[Path]] = {}
    for path in sorted(root.glob("*.parquet")):
        stem = path.stem.split("-")[0]
        tables.setdefault(stem if stem in _SPLIT_NAMES else "train", []).append(path)
    for name in _SPLIT_NAMES:
        if files := sorted((root / name).glob("*.parquet")):
            tables.setdefault(name, []).extend(files)
    return tables


def _parquet(uri: str, tables: dict[str, list[Path]], split: str) -> Records:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    files: Any = [str(path) for path in tables[_choose(uri, list(tables), split)]]
    datasets.disable_progress_bars()
    try:
        return Records(uri, datasets.Dataset.from_parquet(files))
    except (OSError, ValueError, DatasetGenerationError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"'{uri}' cannot be read as Parquet: {reason}") from None


def _saved_dataset(uri: str, root: Path, split: str) -> Records:
    import datasets

    try:
        saved = datasets.load_from_disk(str(root))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"'{uri}' cannot be read as a saved dataset: {reason}") from None
    if isinstance(saved, datasets.DatasetDict):
        return Records(uri, saved[_choose(uri, [str(name) for name in saved], split)])
    if split != "train":
        raise MissingSplit(f"'{uri}' has no split '{split}'; all of its images are 'train'.")
    return Records(uri, saved)


def _fingerprint(source: Source, records: Iterator[str]) -> str:
    digest = hashlib.sha256(f"{len(source)}\n".encode())
    for record in records:
        digest.update(record.encode("utf-8", "surrogateescape") + b"\n")
    for i in np.linspace(0, len(source) - 1, min(_FINGERPRINT_SAMPLES, len(source))).astype(int):
        image = source[int(i)].image
        digest.update(image if isinstance(image, bytes) else image.numpy().tobytes())
    return digest.hexdigest()
