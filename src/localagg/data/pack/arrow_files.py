"""Arrow files and their JSON, as ``datasets.DatasetDict.save_to_disk`` writes them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..sources.source import ImageRecord, Source

_BATCH_BYTES = 1 << 25  # of images in a record batch
_BATCH_ROWS = 1000


def write_arrow(path: Path, records: Iterable[ImageRecord], source: Source) -> None:
    """Write one file with the columns ``image`` and, if there are labels, ``label``."""
    import pyarrow as pa

    schema = _features(source).arrow_schema
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        images: list[dict[str, Any]] = []
        labels: list[int | None] = []
        size = 0

        def flush() -> None:
            columns = {"image": images, "label": labels}
            arrays = [pa.array(columns[field.name], type=field.type) for field in schema]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            images.clear()
            labels.clear()

        for record in records:
            images.append({"bytes": record.image, "path": _replace_raw_bytes(record.path)})
            labels.append(record.label)
            size += len(record.image)
            if size >= _BATCH_BYTES or len(images) == _BATCH_ROWS:
                flush()
                size = 0
        if images:
            flush()


def complete_arrow(folder: Path, split: str, names: list[str], source: Source) -> None:
    """Write the JSON files of a split, and the list of all splits."""
    import datasets

    datasets.DatasetInfo(features=_features(source)).write_to_directory(str(folder / split))
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
    splits = [name for name in ("train", "val", "test") if (folder / name / "state.json").exists()]
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": splits}))


def _features(source: Source) -> Any:
    import datasets

    columns: dict[str, Any] = {"image": datasets.Image()}
    if source.labels is not None and source.classes is not None:
        columns["label"] = datasets.ClassLabel(names=source.classes)
    return datasets.Features(columns)


def _replace_raw_bytes(path: str | None) -> str | None:
    """Return a path that Arrow can store: file names may hold bytes that are not text."""
    if path is None:
        return None
    return path.encode("utf-8", "surrogateescape").decode(errors="replace")
