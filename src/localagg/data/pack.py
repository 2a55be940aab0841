"""Any source to one folder: Arrow as ``datasets`` keeps it, or the reference's TFRecords.

Encoded images are kept byte for byte, decoded ones become PNG. The folder is written beside its
name and renamed when it is whole.
"""

import contextlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from ..config import UserError
from ..files import flush
from ..logbook import showing
from .decode import UnreadableImage, decode, image_size
from .protocol import Source, encoded
from .sources import open_images, stored_splits
from .tfrecord import write_tfrecords

REPORT = "pack-report.json"
_BATCH_BYTES = 1 << 25  # of images in a record batch of Arrow
_BATCH_ROWS = 1000
_ROOM = 1.02  # what is written, over what the images take; and a little
_ROOM_BYTES = 1 << 24

OnImage = Callable[[int, bytes], None]


def pack(
    uri: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    format: Literal["arrow", "tfrecord"] = "arrow",
    shard_bytes: int = 1 << 28,
    malformed: Literal["skip", "error"] = "skip",
    verify: bool = False,
) -> dict[str, Any]:
    """Copy all splits of a source into one folder.

    Images that cannot be decoded are copied like all others, and named in the report.

    Args:
        uri: data URI.
        destination: a folder that does not exist or is empty.
        format: ``arrow`` is what ``datasets.DatasetDict.save_to_disk`` writes, with the columns
            ``image`` (bytes and path) and ``label`` where there are labels; ``tfrecord`` is what
            the reference's program reads.
        shard_bytes: about how large one file may become.
        malformed: lines of a listing that are not ``path label``: left out and named in the report,
            or an error.
        verify: read everything back and compare.

    Returns:
        What ``pack-report.json`` in the folder holds: {"data", "destination", "format", "images",
        "bytes", "seconds", "verified", "splits": {split: {"images", "bytes", "classes" (how many,
        or None), "formats": {name: images}, "unreadable": [{"name", "reason"}],
        "malformed_lines": [numbers], "files": [names]}}}.

    Raises:
        UserError: the source cannot be opened or read, the destination is not empty, too little
            space, or (``verify``) what was read back differs.
    """
    start, uri = time.monotonic(), os.fspath(uri)
    destination = Path(os.path.abspath(Path(destination).expanduser()))
    _check(destination, format, shard_bytes)
    sources = {name: open_images(uri, name, malformed=malformed) for name in stored_splits(uri)}
    targets = _targets(uri, list(sources), format)
    with _written_beside(uri, destination) as folder:
        sizes = {name: source.stored_bytes() for name, source in sources.items()}
        _check_room(destination, sum(sizes.values()))
        folder.mkdir(parents=True)
        splits = {}
        for name, source in sources.items():
            target, shards = targets[name], max(1, min(len(source), -(-sizes[name] // shard_bytes)))
            splits[target] = _pack_split(source, folder, format, target, shards)
        if format == "arrow":
            (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
        for name, source in sources.items() if verify else ():
            _verify(source, open_images(folder, targets[name]), targets[name])
        report: dict[str, Any] = {"data": uri, "destination": str(destination), "format": format}
        report |= {key: sum(facts[key] for facts in splits.values()) for key in ("images", "bytes")}
        report["seconds"] = round(time.monotonic() - start, 3)
        report |= {"verified": verify, "splits": splits}
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    return report


@contextlib.contextmanager
def _written_beside(uri: str, destination: Path) -> Iterator[Path]:
    """A folder to be made and filled, that becomes ``destination`` if all went well, else goes."""
    folder = destination.with_name(f".{destination.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
        _flush(folder)
        os.rename(folder, destination)  # over an empty folder too
    except OSError as error:
        raise UserError(f"'{uri}' cannot be packed into '{destination}': {error}.") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check(destination: Path, format: str, shard_bytes: int) -> None:
    if shard_bytes < 1:
        raise UserError(f"Files of {shard_bytes} bytes are too small; allow at least 1.")
    if format not in ("arrow", "tfrecord"):
        raise UserError(f"There is no format '{format}'; there are arrow and tfrecord.")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"'{destination}' exists and is not empty; name another folder.")


def _targets(uri: str, splits: list[str], format: str) -> dict[str, str]:
    """Under which name each split is written: TFRecords know only train and val."""
    if format == "arrow" or "test" not in splits:
        return {name: name for name in splits}
    if "val" in splits:
        raise UserError(
            f"'{uri}' has the splits {', '.join(splits)}, but TFRecords hold train and val only;"
            " pack it as arrow."
        )
    return {name: "val" if name == "test" else name for name in splits}


def _check_room(destination: Path, size: int) -> None:
    parent = next(folder for folder in destination.parents if folder.exists())
    need, free = int(size * _ROOM) + _ROOM_BYTES, shutil.disk_usage(parent).free
    if free < need:
        raise UserError(
            f"Packing needs {need / 2**30:,.2f} GiB, but '{parent}' has {free / 2**30:,.2f} GiB"
            " free; make room, or name another folder."
        )


def _flush(folder: Path) -> None:
    for path in [*(p for p in folder.rglob("*") if p.is_file()), folder]:
        flush(path)


def _pack_split(
    source: Source, folder: Path, format: str, split: str, shards: int
) -> dict[str, Any]:
    """Write one split; returns its part of the report."""
    formats: Counter[str] = Counter()
    unreadable: list[dict[str, str]] = []
    total = 0
    with showing(f"packing {split}") as show:

        def on_image(index: int, image: bytes) -> None:
            nonlocal total
            total += len(image)
            try:
                formats[image_size(image)[2]] += 1
                decode(image)
            except UnreadableImage as error:
                unreadable.append({"name": source.name(index), "reason": str(error)})
            show(index + 1, len(source))

        if format == "tfrecord":
            files = write_tfrecords(source, folder, split=split, files=shards, on_image=on_image)
        else:
            files = write_arrow(source, folder / split, shards=shards, on_image=on_image)
    return {
        "images": len(source),
        "bytes": total,
        "classes": None if source.classes is None else len(source.classes),
        "formats": dict(formats.most_common()),
        "unreadable": unreadable,
        "malformed_lines": list(getattr(source, "malformed", [])),
        "files": files,
    }


def _verify(source: Source, packed: Source, split: str) -> None:
    """Compare count, classes, and every image and label."""
    same = len(source) == len(packed) and source.classes == packed.classes
    with showing(f"verifying {split}") as show:
        for i in range(len(source) if same else 0):
            (_, image, label), (_, image_packed, label_packed) = source[i], packed[i]
            if encoded(image) != image_packed or label != label_packed:
                raise UserError(
                    f"{source.name(i)} was read back differently from the packed {split}; the disk"
                    " or the source changed, pack again."
                )
            show(i + 1, len(source))
    if not same:
        raise UserError(f"The packed {split} has other images or classes; pack again.")


# --- Arrow ----------------------------------------------------------------------------------------


def write_arrow(
    source: Source, folder: Path, *, shards: int, on_image: OnImage | None = None
) -> list[str]:
    """Write a source as ``datasets.Dataset.save_to_disk`` would: files of Arrow record batches.

    They are written as they are filled, where ``datasets`` would first make a copy in its cache.

    Args:
        source: any; decoded pixels are written as PNG.
        folder: where to; made if need be.
        shards: files with equally many images.
        on_image: called with the index and bytes of each image once it is written.

    Returns:
        Names of the Arrow files.
    """
    import datasets

    columns: dict[str, Any] = {"image": datasets.Image()}
    if source.labels is not None and source.classes is not None:
        columns["label"] = datasets.ClassLabel(names=source.classes)
    features = datasets.Features(columns)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{shard:05d}-of-{shards:05d}.arrow" for shard in range(shards)]
    for shard, name in enumerate(names):
        first, last = (len(source) * s // shards for s in (shard, shard + 1))
        _write_shard(source, range(first, last), folder / name, features.arrow_schema, on_image)
    datasets.DatasetInfo(features=features).write_to_directory(str(folder))
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": source.fingerprint()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    return names


def _write_shard(
    source: Source, indices: range, path: Path, schema: Any, on_image: OnImage | None
) -> None:
    import pyarrow

    paths: list[str] | None = getattr(source, "paths", None)
    images: list[dict[str, Any]] = []
    labels: list[int | None] = []
    held = 0
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        for i in indices:
            _, image, label = source[i]
            image = encoded(image)
            images.append({"bytes": image, "path": paths[i] if paths else None})
            labels.append(label)
            held += len(image)
            if held >= _BATCH_BYTES or len(images) == _BATCH_ROWS or i == indices[-1]:
                batch = {"image": images, "label": labels}
                arrays = [pyarrow.array(batch[field.name], type=field.type) for field in schema]
                writer.write_batch(pyarrow.record_batch(arrays, schema=schema))
                images, labels, held = [], [], 0
            if on_image is not None:
                on_image(i, image)
