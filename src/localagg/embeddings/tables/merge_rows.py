"""Join the rows that a table keeps and those of new images."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..all_splits import JoinedSplits
from ..table import EmbeddingTable, describe_root, table_schema
from .match_table import Matches
from .table_writer import GROUP_ROWS, NameColumns

if TYPE_CHECKING:
    import pyarrow as pa


def merge_rows(
    matches: Matches,
    facts: dict[str, Any],
    source: JoinedSplits,
    columns: NameColumns,
    new: Iterable["pa.Table"],
) -> tuple["pa.Schema", int, Iterator["pa.Table"]]:
    """Return schema, number and groups of the rows of a grown table.

    Without images elsewhere, these are the rows that embedding the source anew would write. Else
    rows of the images elsewhere come first, ``index`` counts the rows, and the fact ``data`` is
    null.

    Args:
        matches: of the source and the table.
        facts: those of a table of the source.
        source: the images.
        columns: of the source.
        new: the embedded rows, with indices of the source.
    """
    import pyarrow as pa

    old = matches.table.file.read([*facts["columns"]])
    kept = np.flatnonzero(matches.found >= 0)
    values = {name: old[name].take(matches.found[kept]) for name in facts["columns"]}
    parts = [pa.table({**columns(kept.tolist()), "index": kept, **values}), *new]
    if len(matches.elsewhere):
        first = matches.table.file.read().take(matches.elsewhere)
        facts = _join_facts(matches.table, source, facts)
        schema = table_schema(facts)
        parts = [
            _below_root(first, Path(matches.table.facts.get("root") or ""), facts["root"]),
            *(_below_root(part, source.root, facts["root"]) for part in parts),
        ]
        rows = _as_schema(parts, schema)
        count = pa.array(np.arange(len(rows)))
        rows = rows.set_column(rows.schema.get_field_index("index"), "index", count)
    else:
        schema = table_schema(facts)
        rows = _as_schema(parts, schema).sort_by("index")
    rows = rows.cast(schema)
    groups = (rows.slice(start, GROUP_ROWS) for start in range(0, len(rows), GROUP_ROWS))
    return schema, len(rows), groups


def _join_facts(
    table: EmbeddingTable, source: JoinedSplits, facts: dict[str, Any]
) -> dict[str, Any]:
    """Return the facts of a table of images from several places."""
    root = None
    if source.root is not None:
        root = Path(os.path.commonpath([source.root, table.facts["root"]]))
    labels = facts["labels"] or table.facts.get("labels")
    joined = {"labels": labels, "data": None, "data_absolute": None, "fingerprint": None}
    return {**facts, **joined, **describe_root(root, table.path)}


def _below_root(part: "pa.Table", root: Path | None, joined: str | None) -> "pa.Table":
    """Return rows whose paths are relative to the joined root."""
    import pyarrow as pa

    if joined is None or root is None:
        return part
    prefix = os.path.relpath(root, joined).replace(os.sep, "/")
    paths = [os.path.normpath(f"{prefix}/{path}") for path in part["path"].to_pylist()]
    return part.set_column(part.schema.get_field_index("path"), "path", pa.array(paths))


def _as_schema(parts: list["pa.Table"], schema: "pa.Schema") -> "pa.Table":
    """Join parts; columns that one lacks are null, others than the schema's are dropped."""
    import pyarrow as pa

    bare = schema.remove_metadata()
    whole = []
    for part in parts:
        length = len(part)
        found = [
            part[f.name].cast(f.type) if f.name in part.column_names else pa.nulls(length, f.type)
            for f in bare
        ]
        whole.append(pa.table(found, bare))
    return pa.concat_tables(whole)
