"""Parquet and saved ``datasets``: both are a Hugging Face table of encoded images."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import UserError
from .protocol import SPLIT_NAMES, Sample, Stored, fingerprint


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
            here = image["bytes"]
            image = Path(image["path"] or "").read_bytes() if here is None else here
        label = None if self.labels is None else int(self.labels[index])
        return Sample(index, image or b"", label)

    def name(self, index: int) -> str:
        """See :class:`~localagg.data.protocol.Source`."""
        return f"record {index} of {self.uri}"

    def fingerprint(self) -> str:
        """Over all labels and the bytes of 64 records."""
        labels = self.labels.tolist() if self.labels is not None else []
        return fingerprint(self, (str(label) for label in labels))

    def stored_bytes(self) -> int:
        """See :class:`~localagg.data.protocol.Source`; files that a table only names count too."""
        table = self._images.data
        total = table.nbytes
        for chunk in table.column(0).chunks:
            if hasattr(chunk, "field") and chunk.field("bytes").null_count:
                named = chunk.filter(chunk.field("bytes").is_null()).field("path")
                total += sum(os.path.getsize(path) for path in named.to_pylist() if path)
        return total


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


def find_parquet(uri: str, root: Path) -> Stored | None:
    """A Parquet file, or those under a folder or its split folders, by the split of their name."""
    tables: dict[str, list[Path]] = {}
    if root.is_file():
        tables["train"] = [root]
    for path in sorted(root.glob("*.parquet")):
        stem = path.stem.split("-")[0]
        tables.setdefault(stem if stem in SPLIT_NAMES else "train", []).append(path)
    for name in SPLIT_NAMES:
        if files := sorted((root / name).glob("*.parquet")):
            tables.setdefault(name, []).extend(files)
    return Stored(list(tables), lambda split: _parquet(uri, tables[split])) if tables else None


def _parquet(uri: str, paths: list[Path]) -> Records:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    files: Any = [str(path) for path in paths]
    datasets.disable_progress_bars()
    try:
        return Records(uri, datasets.Dataset.from_parquet(files))
    except (OSError, ValueError, DatasetGenerationError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"'{uri}' cannot be read as Parquet: {reason}") from None


def find_saved_dataset(uri: str, root: Path) -> Stored | None:
    """A folder written by ``datasets.save_to_disk``."""
    if not ((root / "dataset_dict.json").exists() or (root / "state.json").exists()):
        return None
    import datasets

    try:
        saved = datasets.load_from_disk(str(root))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"'{uri}' cannot be read as a saved dataset: {reason}") from None
    if isinstance(saved, datasets.DatasetDict):
        splits = {str(name): part for name, part in saved.items()}
        return Stored(list(splits), lambda split: Records(uri, splits[split]))
    return Stored(["train"], lambda split: Records(uri, saved))
