"""The reference's TFRecord files as a source, and written.

A file is a row of records ``length (uint64) | masked CRC-32C of it | data | masked CRC-32C of it``;
the data is a ``tf.train.Example`` with the features ``images`` (encoded bytes), ``labels`` and
``index`` (int64). The reference reads ``train-*`` and ``validation-*``: its ImageNet script names
``train-00000-of-01024``, its Places205 script ``train-00000-01024``, with one more file for the
remainder; files may be empty.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ...errors import UserError
from ...io.files import atomic_write
from .labels import class_names, write_class_names
from .source import ImageRecord, Sample, Source, Splits, encoded_bytes
from .tf_example import write_example
from .tfrecord_index import (
    RECORD_LIMIT,
    TFRecordIndex,
    cached_index,
    files_by_split,
    frame,
    read_example,
    read_image,
    read_record,
)

PREFIXES = {"train": "train", "val": "validation"}


class TFRecords(Source):
    """The images of one split, ordered by their stored index (or as they lie, if none is stored).

    Holds no open file, so worker processes can share it. Each read verifies the checksums again.
    """

    def __init__(self, uri: str, folder: Path, prefix: str, index: TFRecordIndex) -> None:
        self.uri, self.folder, self._index = uri, folder, index
        self.labels: Tensor | None = None
        self.classes: list[str] | None = None
        if index.label is not None:
            self.labels = torch.from_numpy(index.label.copy())
            self.classes = class_names(folder, prefix, self.labels)

    def __len__(self) -> int:
        return len(self._index.file)

    def __getitem__(self, index: int) -> Sample:
        """See :class:`~localagg.data.sources.source.Source`.

        Raises:
            UserError: the record was damaged or replaced since the index was built.
        """
        path, offset = self._place(index)
        label = None if self.labels is None else int(self.labels[index])
        if (image := read_image(path, self._index, index)) is not None:
            return Sample(index, image, label)
        with open(path, "rb") as file:
            file.seek(offset)
            example = read_example(read_record(file, path, offset)[0], path, offset)
        if example.index not in (None, index):
            raise UserError(
                "TODO",
                f"'{path}' stores at byte {offset:,} the index {example.index}, but {index} when it"
                " was opened; open the data again.",
            )
        return Sample(index, example.image, label)

    def _place(self, index: int) -> tuple[Path, int]:
        name = self._index.files[self._index.file[index]]
        return self.folder / name, int(self._index.offset[index])

    def name(self, index: int) -> str:
        """See :class:`~localagg.data.sources.source.Source`."""
        path, offset = self._place(index)
        return f"{path.name} at byte {offset:,}"

    def fingerprint(self) -> str:
        """Over the checksums of all records (their image, label and index) in order."""
        digest = hashlib.sha256(f"{len(self)}\n".encode())
        digest.update(self._index.crc.astype("<u4").tobytes())
        return digest.hexdigest()

    def stored_bytes(self) -> int:
        """See :class:`~localagg.data.sources.source.Source`."""
        return int(self._index.length.sum())


def find_tfrecords(uri: str, folder: Path) -> Splits | None:
    """The TFRecord files in a folder, by their names."""
    if not folder.is_dir() or not (splits := files_by_split(folder)):
        return None
    return Splits(list(splits), lambda prefix: _open(uri, folder, prefix, splits[prefix]))


def _open(uri: str, folder: Path, prefix: str, files: list[str]) -> TFRecords:
    index = cached_index(folder, prefix, files)
    if not len(index.file):
        raise UserError("TODO", f"The {len(files):,} {prefix} files in '{folder}' hold no records.")
    return TFRecords(uri, folder, prefix, index)


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
        raise UserError(
            "TODO", f"TFRecords have no split '{split}'; the reference reads train and val."
        )
    if files < 1:
        raise UserError("TODO", f"{files} files cannot hold a split; write at least 1.")
    prefix = PREFIXES[split]
    folder.mkdir(parents=True, exist_ok=True)
    if prefix in files_by_split(folder):
        raise UserError("TODO", f"'{folder}' holds {prefix} files already; name another folder.")
    names = [tfrecord_name(split, number, files) for number in range(files)]
    for number, name in enumerate(names):
        rows = tfrecord_rows(len(source), number, files)
        with atomic_write(folder / name) as beside:
            write_tfrecord(beside, _records(source, rows, on_image))
    if source.classes is not None:
        write_class_names(folder, prefix, source.classes)
    return names


def tfrecord_name(split: str, number: int, files: int) -> str:
    """What a file is called; the split is train or val."""
    return f"{PREFIXES[split]}-{number:05d}-of-{files:05d}"


def tfrecord_rows(count: int, number: int, files: int) -> range:
    """Which images go into a file: as many as into every other, so the last may be empty."""
    each = -(-count // files)
    return range(min(number * each, count), min((number + 1) * each, count))


def write_tfrecord(path: Path, records: Iterable[ImageRecord]) -> None:
    """Write one file.

    Raises:
        UserError: an image is over 256 MiB.
    """
    with open(path, "wb") as file:
        for record in records:
            data = write_example(record.image, record.label, record.index)
            if len(data) > RECORD_LIMIT:
                raise UserError(
                    "TODO",
                    f"{record.name} has {len(record.image):,} bytes, too many for a record; leave"
                    " it out.",
                )
            file.write(frame(data))


def _records(
    source: Source, rows: range, on_image: Callable[[int, bytes], None] | None
) -> Iterator[ImageRecord]:
    for i in rows:
        _, image, label = source[i]
        record = ImageRecord(i, source.name(i), encoded_bytes(image), label)
        yield record
        if on_image is not None:  # asked for the next one: this one is written
            on_image(i, record.image)
