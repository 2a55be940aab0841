"""The reference's TFRecord files: a source, and the writer of ``pack``.

A file is a sequence of records: length (uint64), its masked CRC-32C, data, their masked CRC-32C.
The data are a ``tf.train.Example`` with the features ``images`` (encoded bytes), ``labels`` and
``index`` (int64). The reference reads ``train-*`` and ``validation-*``: its ImageNet script names
``train-00000-of-01024``, its Places205 script ``train-00000-01024``, with one more file for the
remainder. Files may be empty.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from ....errors import UserError
from ..file_index import IndexedFiles
from ..source import ImageRecord, Sample
from ..splits import Splits
from .tf_example import write_example
from .tfrecord_index import (
    RECORD_LIMIT,
    check_first_record,
    files_by_split,
    frame,
    open_index,
    read_example,
)

PREFIXES = {"train": "train", "val": "validation"}


class TFRecords(IndexedFiles):
    """The images of one split, ordered by their stored index, or by position if none is stored.

    Each read verifies the checksums again.
    """

    def __getitem__(self, index: int) -> Sample:
        """Read an image.

        Raises:
            UserError: the record was damaged or replaced since the index was built.
        """
        path, offset, length = self.position(index)
        file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            example, _, _ = read_example(file, path, offset, length)
        finally:
            os.close(file)
        if example.index not in (None, index):
            raise UserError(
                "mismatch",
                f"'{path}' now stores at byte {offset:,} the index {example.index}, and before"
                f" {index}; open the data again.",
            )
        return Sample(index, example.image, self.label(index))

    def name(self, index: int) -> str:
        """Return the record's file and offset."""
        path, offset, _ = self.position(index)
        return f"{os.path.basename(path)} at byte {offset:,}"

    def fingerprint(self) -> str:
        """Hash the checksums of all records in order; they cover image, label and index."""
        digest = hashlib.sha256(f"{len(self)}\n".encode())
        digest.update(self.index["crc"].astype("<u4").tobytes())
        return digest.hexdigest()


def find_tfrecords(uri: str, folder: Path) -> Splits | None:
    """Return the splits of the TFRecord files in a folder, or None without such files.

    Raises:
        UserError: files of two packings, a missing file, or a first record without an image.
    """
    if not folder.is_dir() or not (files := files_by_split(folder)):
        return None
    check_first_record(folder, files)
    used = {name for names in files.values() for name in names}
    used |= {f"classes-{prefix}.json" for prefix in files}
    return Splits(
        [*files],
        lambda prefix: _open(uri, folder, prefix, files[prefix]),
        folder,
        used.__contains__,
    )


def _open(uri: str, folder: Path, prefix: str, files: list[str]) -> TFRecords:
    index = open_index(folder, prefix, files)
    if not len(index["file"]):
        raise UserError("no-images", f"The {prefix} files in '{folder}' have no records.")
    return TFRecords(uri, folder, prefix, files, index)


def tfrecord_name(split: str, number: int, files: int) -> str:
    """Return the name of a file of the split train or val."""
    return f"{PREFIXES[split]}-{number:05d}-of-{files:05d}"


def tfrecord_rows(count: int, number: int, files: int) -> range:
    """Return the images of a file: ceil(count / files) in each, so the last may be empty."""
    each = -(-count // files)
    return range(min(number * each, count), min((number + 1) * each, count))


def write_tfrecord(path: Path, records: Iterable[ImageRecord]) -> None:
    """Write one file, as the reference's packing script would.

    Raises:
        UserError: an image is over 256 MiB.
    """
    with open(path, "wb") as file:
        for record in records:
            data = write_example(record.image, record.label, record.index)
            if len(data) > RECORD_LIMIT:
                size = f"{len(record.image):,} bytes, more than the limit of {RECORD_LIMIT:,}"
                raise UserError("too-large", f"{record.name} has {size}; exclude this image.")
            file.write(frame(data))
