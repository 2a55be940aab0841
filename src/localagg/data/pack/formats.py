"""The formats that ``pack`` writes. A new one is a file like ``arrow_files`` and an entry here."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from ..sources.labels import write_class_names
from ..sources.source import ImageRecord, Source
from ..sources.tars.webdataset import write_tar
from ..sources.tfrecords.tfrecord import PREFIXES, tfrecord_name, tfrecord_rows, write_tfrecord
from .arrow_files import complete_arrow, write_arrow


class PackFormat(NamedTuple):
    """How the images of a split become files."""

    overhead: int
    """Approximate bytes that an image takes beyond its own."""
    name: Callable[[str, int, int], str]
    """(split, number, files) -> a file's name inside the folder."""
    rows: Callable[[int, int, int], range]
    """(images, number, files) -> the images of a file."""
    write: Callable[[Path, Iterable[ImageRecord], Source], None]
    """Write a file; its bytes depend on the records alone."""
    complete: Callable[[Path, str, list[str], Source], None]
    """(folder, split, names of the files, source): write the files beside them."""


def split_evenly(count: int, number: int, files: int) -> range:
    """Return the images of a file when ``count`` images are split evenly over files."""
    return range(count * number // files, count * (number + 1) // files)


def _write_classes(folder: Path, prefix: str, source: Source) -> None:
    if source.classes is not None:
        write_class_names(folder, prefix, source.classes)


FORMATS = {
    "arrow": PackFormat(
        overhead=128,
        name=lambda split, number, files: f"{split}/data-{number:05d}-of-{files:05d}.arrow",
        rows=split_evenly,
        write=write_arrow,
        complete=complete_arrow,
    ),
    "tfrecord": PackFormat(
        overhead=128,
        name=tfrecord_name,
        rows=tfrecord_rows,
        write=lambda path, records, _: write_tfrecord(path, records),
        complete=lambda folder, split, _, source: _write_classes(folder, PREFIXES[split], source),
    ),
    "webdataset": PackFormat(
        overhead=2560,  # two headers, and each file filled up to 512 bytes
        name=lambda split, number, _: f"{split}-{number:06d}.tar",
        rows=split_evenly,
        write=lambda path, records, _: write_tar(path, records),
        complete=lambda folder, split, _, source: _write_classes(folder, split, source),
    ),
}
