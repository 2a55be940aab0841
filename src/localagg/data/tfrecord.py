"""The reference's TFRecord files as a source, and written.

A file is a row of records ``length (uint64) | masked CRC-32C of it | data | masked CRC-32C of it``;
the data is a ``tf.train.Example`` with the features ``images`` (encoded bytes), ``labels`` and
``index`` (int64). The reference reads ``train-*`` and ``validation-*``: its ImageNet script names
``train-00000-of-01024``, its Places205 script ``train-00000-01024``, with one more file for the
remainder; files may be empty.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..config import UserError
from ..files import whole
from .example import write_example
from .protocol import Sample, Source, Stored, encoded
from .tfrecord_index import (
    RECORD_LIMIT,
    Index,
    cached_index,
    files_by_split,
    frame,
    read_example,
    read_record,
)

PREFIXES = {"train": "train", "val": "validation"}
# Ours, beside the files: the class names that TFRecords cannot store. The reference's program looks
# for train-* and validation-*, so the split comes last.
_CLASSES = "classes-{}.json"
_CLASSES_LIMIT = 1 << 26  # bytes


class TFRecords:
    """The images of one split, ordered by their stored index (or as they lie, if none is stored).

    Holds no open file, so worker processes can share it. Each read verifies the checksums again.
    """

    def __init__(
        self, uri: str, folder: Path, index: Index, classes: list[str] | None = None
    ) -> None:
        self.uri, self.folder, self._index = uri, folder, index
        self.labels: Tensor | None = None
        self.classes: list[str] | None = None
        if index.label is not None:
            self.labels = torch.from_numpy(index.label.copy())
            count = int(self.labels.max()) + 1
            if classes is not None and len(classes) < count:
                raise UserError(
                    f"'{folder}' names {len(classes):,} classes in its {_CLASSES.format('*')}, but"
                    f" has labels up to {count - 1:,}; remove that file, or name all."
                )
            self.classes = classes or [str(label) for label in range(count)]

    def __len__(self) -> int:
        return len(self._index.file)

    def __getitem__(self, index: int) -> Sample:
        """See :class:`~localagg.data.protocol.Source`.

        Raises:
            UserError: the record was damaged or replaced since the index was built.
        """
        path, offset = self._place(index)
        with open(path, "rb") as file:
            file.seek(offset)
            example = read_example(read_record(file, path, offset)[0], path, offset)
        if example.index not in (None, index):
            raise UserError(
                f"'{path}' stores at byte {offset:,} the index {example.index}, but {index} when it"
                " was opened; open the data again."
            )
        label = None if self.labels is None else int(self.labels[index])
        return Sample(index, example.image, label)

    def _place(self, index: int) -> tuple[Path, int]:
        name = self._index.files[self._index.file[index]]
        return self.folder / name, int(self._index.offset[index])

    def name(self, index: int) -> str:
        """See :class:`~localagg.data.protocol.Source`."""
        path, offset = self._place(index)
        return f"{path.name} at byte {offset:,}"

    def fingerprint(self) -> str:
        """Over the checksums of all records (their image, label and index) in order."""
        digest = hashlib.sha256(f"{len(self)}\n".encode())
        digest.update(self._index.crc.astype("<u4").tobytes())
        return digest.hexdigest()

    def stored_bytes(self) -> int:
        """See :class:`~localagg.data.protocol.Source`."""
        return int(self._index.length.sum())


def find_tfrecords(uri: str, folder: Path) -> Stored | None:
    """The TFRecord files in a folder, by their names."""
    if not folder.is_dir() or not (splits := files_by_split(folder)):
        return None
    return Stored(list(splits), lambda prefix: _open(uri, folder, prefix, splits[prefix]))


def _open(uri: str, folder: Path, prefix: str, files: list[str]) -> TFRecords:
    index = cached_index(folder, prefix, files)
    if not len(index.file):
        raise UserError(f"The {len(files):,} {prefix} files in '{folder}' hold no records.")
    return TFRecords(uri, folder, index, _class_names(folder / _CLASSES.format(prefix)))


def _class_names(path: Path) -> list[str] | None:
    try:
        with open(path, "rb") as file:
            names = json.loads(file.read(_CLASSES_LIMIT))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' cannot be read: {error}; remove or mend it.") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"'{path}' is not a JSON list of class names; remove or mend it.")
    return names


def write_tfrecords(
    source: Source,
    folder: Path,
    *,
    split: str,
    files: int,
    on_image: Callable[[int, bytes], None] | None = None,
) -> list[str]:
    """Write a source as the reference's packing script would, in the order of its index.

    ceil(N / files) records a file, so the last files may be empty. Each file is written beside its
    name and renamed. Class names go to ``classes-*.json``.

    Args:
        source: any; decoded pixels are written as PNG.
        folder: where to; made if need be.
        split: "train" or "val".
        files: how many files.
        on_image: called with the index and bytes of each image once it is written.

    Returns:
        Names of the files.

    Raises:
        UserError: the folder has TFRecords of this split, or an image is over 256 MiB.
    """
    if split not in PREFIXES:
        raise UserError(f"TFRecords have no split '{split}'; the reference reads train and val.")
    if files < 1:
        raise UserError(f"{files} files cannot hold a split; write at least 1.")
    prefix = PREFIXES[split]
    folder.mkdir(parents=True, exist_ok=True)
    if prefix in files_by_split(folder):
        raise UserError(f"'{folder}' holds {prefix} files already; name another folder.")
    each = -(-len(source) // files)
    names = [f"{prefix}-{number:05d}-of-{files:05d}" for number in range(files)]
    for number, name in enumerate(names):
        with whole(folder / name) as beside, open(beside, "wb") as file:
            for i in range(number * each, min((number + 1) * each, len(source))):
                _write_image(file, source, i, on_image)
    if source.classes is not None:
        (folder / _CLASSES.format(prefix)).write_text(json.dumps(source.classes))
    return names


def _write_image(
    file: BinaryIO, source: Source, index: int, on_image: Callable[[int, bytes], None] | None
) -> None:
    _, image, label = source[index]
    image = encoded(image)
    record = write_example(image, label, index)
    if len(record) > RECORD_LIMIT:
        raise UserError(
            f"{source.name(index)} has {len(image):,} bytes, too many for a record; leave it out."
        )
    file.write(frame(record))
    if on_image is not None:
        on_image(index, image)
