"""Add columns to a table that let viewers such as embedding-atlas and Spotlight show pictures.

``x``, ``y`` (float32): the map. ``neighbors`` (struct of ``ids``, zero-based rows, and
``distances``, cosine distances): the exact 15 nearest, as embedding-atlas documents it. ``image``
(struct of ``bytes`` and ``path``, as Hugging Face datasets store images): a JPEG thumbnail.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ...data.images.decode import READ_ERRORS, decode
from ...data.sources.source import Source
from ...errors import UserError
from ...io.console import show_progress
from ...io.files import atomic_write
from ..map import map_rows
from ..neighbors import nearest_others
from ..open_table import open_table_pictures
from ..table import EmbeddingTable

if TYPE_CHECKING:
    import pyarrow as pa

_NEIGHBORS = 15
_SIDE = 128  # pixels, the longer side of a thumbnail


def check_viewer_columns(out: str | Path, *, layers: int, map: bool) -> None:
    """Raise UserError if a table of this name, with so many layers, cannot hold such columns."""
    if Path(out).suffix.lower() not in (".parquet", ".pq"):
        raise UserError(
            "option-conflict", f"--map and --images need --out FILE.parquet, not {out}."
        )
    if map and layers > 1:
        raise UserError(
            "option-conflict", "--map is of one embedding: name one --layer, or omit --map."
        )


def add_viewer_columns(path: str | Path, *, map: bool, images: bool) -> None:
    """Rewrite a table with further columns, atomically; the others stay as they are.

    Args:
        path: table written by ``localagg embed``.
        map: add x, y and neighbors.
        images: add thumbnails.

    Raises:
        UserError: not such a table, one without the column embedding, or images that changed.
        OSError: disk full or no permission.
    """
    import pyarrow.parquet as pq

    check_viewer_columns(path, layers=1, map=map)
    columns = {"path", "index"} | ({"embedding"} if map else set())
    table, start = EmbeddingTable(Path(path), columns), 0
    source = open_table_pictures(table) if images else None
    added = _map_columns(table) if map else {}
    options: Any = {"use_dictionary": ["label"], "write_page_checksum": True}
    with atomic_write(table.path) as temporary, show_progress("writing the table") as show:
        writer = None
        for group in range(table.file.num_row_groups):
            part = table.file.read_row_group(group)
            columns = {name: values.slice(start, len(part)) for name, values in added.items()}
            if source is not None:
                columns["image"] = _thumbnails(source, part)
            for name, values in columns.items():
                place = part.schema.get_field_index(name)
                part = part if place < 0 else part.remove_column(place)
                part = part.append_column(name, values)
            writer = writer or pq.ParquetWriter(temporary, part.schema, **options)
            writer.write_table(part)
            start += len(part)
            show(start, len(table))
        if writer is not None:
            writer.close()


def _map_columns(table: EmbeddingTable) -> "dict[str, pa.Array]":
    import pyarrow as pa

    rows = table.unit_embeddings()
    xy = map_rows(rows).numpy()
    near, similarity = nearest_others(rows, _NEIGHBORS)
    ends = pa.array(np.arange(len(rows) + 1, dtype=np.int32) * near.shape[1])
    lists = [
        pa.ListArray.from_arrays(ends, pa.array(values.flatten().numpy()))
        for values in (near, 1 - similarity)
    ]
    neighbors = pa.StructArray.from_arrays(lists, ["ids", "distances"])
    return {"x": pa.array(xy[:, 0]), "y": pa.array(xy[:, 1]), "neighbors": neighbors}


def _thumbnails(source: Source, part: "pa.Table") -> "pa.Array":
    import pyarrow as pa

    pictures: list[dict[str, Any] | None] = []
    for index, path in zip(part["index"].to_pylist(), part["path"].to_pylist(), strict=True):
        try:
            pixels = decode(source[index].image).permute(1, 2, 0).numpy()
        except READ_ERRORS:  # it was readable when it was embedded
            pictures.append(None)
            continue
        image, stored = Image.fromarray(pixels), io.BytesIO()
        image.thumbnail((_SIDE, _SIDE))
        image.save(stored, "JPEG", quality=85)
        pictures.append({"bytes": stored.getvalue(), "path": path})
    return pa.array(pictures, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
