"""The files that ``pack`` writes: how each format names, fills and completes them."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..sources.labels import write_class_names
from ..sources.source import ImageRecord, Source
from ..sources.tfrecord import PREFIXES, tfrecord_name, tfrecord_rows, write_tfrecord
from ..sources.webdataset import write_tar

_BATCH_BYTES = 1 << 25  # of images in a record batch of Arrow
_BATCH_ROWS = 1000


class Format(NamedTuple):
    """How the images of a split become files."""

    overhead: int
    """About how many bytes an image takes beyond its own."""
    name: Callable[[str, int, int], str]
    """(split, number, files) -> a file's name inside the folder."""
    rows: Callable[[int, int, int], range]
    """(images, number, files) -> which images go into it."""
    write: Callable[[Path, Iterable[ImageRecord], Source], None]
    """Write a file of a source's records. Its bytes depend on these alone."""
    complete: Callable[[Path, str, list[str], Source], None]
    """(folder, split, names of the files, source): write what goes beside the files."""


def _even_rows(count: int, number: int, files: int) -> range:
    return range(count * number // files, count * (number + 1) // files)


# --- Arrow, as datasets.save_to_disk writes it ----------------------------------------------------


def _schema(source: Source) -> Any:
    """The features of ``datasets``: an image, and a label where there are any."""
    import datasets

    columns: dict[str, Any] = {"image": datasets.Image()}
    if source.labels is not None and source.classes is not None:
        columns["label"] = datasets.ClassLabel(names=source.classes)
    return datasets.Features(columns)


def _write_arrow(path: Path, records: Iterable[ImageRecord], source: Source) -> None:
    import pyarrow as pa

    schema = _schema(source).arrow_schema
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        images: list[dict[str, Any]] = []
        labels: list[int | None] = []
        held = 0

        def flush() -> None:
            columns = {"image": images, "label": labels}
            arrays = [pa.array(columns[field.name], type=field.type) for field in schema]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            images.clear()
            labels.clear()

        for record in records:
            images.append({"bytes": record.image, "path": _text(record.path)})
            labels.append(record.label)
            held += len(record.image)
            if held >= _BATCH_BYTES or len(images) == _BATCH_ROWS:
                flush()
                held = 0
        if images:
            flush()


def _text(path: str | None) -> str | None:
    """A path as Arrow can store it: file names may hold bytes that are no text."""
    return (
        None if path is None else path.encode("utf-8", "surrogateescape").decode(errors="replace")
    )


def _complete_arrow(folder: Path, split: str, names: list[str], source: Source) -> None:
    import datasets

    info = datasets.DatasetInfo(features=_schema(source))
    info.write_to_directory(str(folder / split))
    state = {
        "_data_files": [{"filename": Path(name).name} for name in names],
        "_fingerprint": source.fingerprint()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / split / "state.json").write_text(json.dumps(state, indent=2))
    splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
    order = sorted(splits, key=lambda name: ("train", "val", "test").index(name))
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": order}))


# --- The others -----------------------------------------------------------------------------------


def _complete_tfrecord(folder: Path, split: str, names: list[str], source: Source) -> None:
    if source.classes is not None:
        write_class_names(folder, PREFIXES[split], source.classes)


def _complete_tar(folder: Path, split: str, names: list[str], source: Source) -> None:
    if source.classes is not None:
        write_class_names(folder, split, source.classes)


FORMATS = {
    "arrow": Format(
        128,
        lambda split, number, files: f"{split}/data-{number:05d}-of-{files:05d}.arrow",
        _even_rows,
        _write_arrow,
        _complete_arrow,
    ),
    "tfrecord": Format(
        128,
        tfrecord_name,
        tfrecord_rows,
        lambda path, records, _: write_tfrecord(path, records),
        _complete_tfrecord,
    ),
    "webdataset": Format(
        2560,  # two headers, and each file filled up to 512 bytes
        lambda split, number, files: f"{split}-{number:06d}.tar",
        _even_rows,
        lambda path, records, _: write_tar(path, records),
        _complete_tar,
    ),
}
