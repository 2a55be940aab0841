"""Embed images and write the embeddings as a table."""

import functools
import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor

from ...checkpoint import load_encoder, load_views, weights_digest
from ...config import (
    ViewConfig,
    check_argument_types,
    check_options,
    from_dict,
    require_resolved,
    to_dict,
)
from ...data.inspect.image_contents import content_digests
from ...data.loading.cropping import evaluation_batches
from ...data.sources.combined import SourceSubset
from ...data.sources.open import Source, check_outside
from ...engine.device import describe_arithmetic, make_fabric
from ...errors import UserError
from ...io.console import show_progress
from ...io.files import absolute_place
from ...models import Encoder
from ..all_splits import JoinedSplits, open_splits
from ..embed import encode, resolve_views
from ..table import DTYPES, EmbeddingTable, describe_root, path_text
from .match_table import Matches, match_table
from .merge_rows import merge_rows
from .table_formats import check_format
from .table_writer import NameColumns, TableWriter, open_writer


@check_argument_types
def write_embeddings(
    weights: str | Path, data: str | Path, out: str | Path, *, append: bool = False,
    split: str = "all", layer: str | Sequence[str] | None = None, raw_maps: bool = False,
    image_size: int | None = None, eval_crop: float | None = None, dtype: str = "float32",
    workers: int = 0, batch: int = 256, device: str = "auto", precision: str = "32-true",
) -> dict[str, Any]:  # fmt: skip
    """Write embeddings of any images as a table; see :mod:`localagg.embeddings.table`.

    Each readable image has a row, in order of the index. After a kill the same call resumes at the
    next batch. The file is then byte-identical if the arithmetic is reproducible, as on one CPU.

    Args:
        weights: run folder or weights file.
        data: data URI.
        out: the file to write, in the format of its suffix (:data:`.TABLE_FORMATS`); it appears
            when complete. Beside FILE.npy, FILE.images.csv holds the paths.
        append: let an existing Parquet table grow. Images whose content it has are not embedded
            again, under whatever name; rows of images that are gone or changed are dropped. Rows of
            other data, whose files are in place, stay.
        split: train, val, test or stored names, separated by commas; or all.
        layer: a name of ``encoder.layers``: write its features (pooled and flattened as in the
            reference, not normalized); several, in one pass, become columns ``layer_NAME``.
            Default: the embedding.
        raw_maps: write the layers' maps, not pooled: arrays [n, C, H, W] in .npy, .h5 and .zarr,
            else rows of C H W values, whose "shapes" the table's metadata state.
        image_size, eval_crop: view of the images, as in :class:`.ViewConfig`. Default: the view
            that the weights store, else derived from the images.
        dtype: float32 or float16.
        workers, batch: processes that decode; images a batch.
        device, precision: where and how the network computes; see :func:`.make_fabric`.

    Returns:
        {"rows", "embedded": rows computed by this call, "unreadable": images skipped, "dim",
        "layer", "shapes": [C, H, W] of each column of raw maps, "dtype", "resumed": images done by
        an earlier call, "out", "data", "split", "splits": {split: images}, "run", "device",
        "precision", "seconds", "images_per_second"}.

    Raises:
        UserError: missing weights, images or layer; values not finite; ``out`` is not writable.
        Interrupted: Ctrl-C; finished batches are kept.
    """
    start, weights, data, out = time.perf_counter(), Path(weights), os.fspath(data), Path(out)
    layer, shown = _one_or_several(layer), 1 if image_size is None else image_size
    _check_options(out, layer, dtype, append=append, raw_maps=raw_maps)
    check_options(batch_size=(batch, 1), workers=(workers, 0), image_size=(shown, 1))
    check_outside(data, out, "--out")
    fabric, grows = make_fabric(device, precision), append and out.exists()
    encoder, source = load_encoder(weights).to(fabric.device), open_splits(data, split)
    views = _chosen_views(weights, image_size, eval_crop)
    views = _table_views(out, views) if grows else resolve_views(views, source)
    facts = _describe_table(weights, encoder, source, out, views, fabric, layer, dtype, raw_maps)
    facts |= {"split": split, "batch": batch}
    written = _write_missing(out, encoder, source, views, facts, fabric, workers, grows=grows)
    return {**written, "run": str(weights), "seconds": round(time.perf_counter() - start, 2)}


_REPORTED = ("dim", "layer", "shapes", "dtype", "data", "split", "device", "precision")


def _write_missing(
    out: Path,
    encoder: Encoder,
    source: JoinedSplits,
    views: ViewConfig,
    facts: dict[str, Any],
    fabric: Fabric,
    workers: int,
    *,
    grows: bool,
) -> dict[str, Any]:
    """Embed the images that the table does not have, and write it."""
    matches, digests = None, None
    if grows:
        digests = _read_contents(source)
        matches = match_table(out, source, digests, facts)
        matches.report()
    images = source if matches is None else SourceSubset(source, matches.missing)
    job = {**facts, "images": len(images), "fingerprint": images.fingerprint()}
    layer, batch, raw_maps = facts["layer"], facts["batch"], "shapes" in facts
    with open_writer(out, job) as writer:
        resumed, begun = writer.images_done, time.perf_counter()
        part = slice(writer.batches_done, None)
        batches = evaluation_batches(images, views, batch=batch, workers=workers, part=part)
        encoded = ((index, encode(encoder, pixels, layer, fabric, raw_maps=raw_maps))
                   for index, pixels in batches)  # fmt: skip
        _write_batches(writer, encoded, images, facts)
        rate = (len(images) - resumed) / (time.perf_counter() - begun)
        rows = _finish(writer, facts, source, digests, matches)
    return {
        **{name: facts[name] for name in _REPORTED if name in facts},
        **{"rows": rows, "embedded": writer.rows, "unreadable": len(images) - writer.rows},
        "splits": {name: len(images) for name, images in source.parts.items()},
        **{"resumed": resumed, "out": str(out), "images_per_second": round(rate, 1)},
    }


def _write_batches(
    writer: TableWriter,
    encoded: Iterable[tuple[Tensor, Tensor]],
    images: Source,
    facts: dict[str, Any],
) -> None:
    with show_progress("embedding") as show:
        for index, found in encoded:
            values = _convert(found, images, index, facts)
            writer.write(int(index[0]) // facts["batch"], index.numpy(), values.numpy())
            show(writer.images_done, len(images))


def write_rows(
    weights: Path,
    data: str,
    out: Path,
    index: Tensor,
    rows: Tensor,
    fabric: Fabric,
) -> None:
    """Write a table of embeddings that are at hand.

    Args:
        weights: run folder that they come from.
        data: data URI; its split train.
        out: Parquet file.
        index: int64 [n], increasing.
        rows: float32 unit rows [n, D].
        fabric: its device and precision computed them.

    Raises:
        UserError: ``out`` is not writable.
    """
    source, encoder = open_splits(data, "train"), load_encoder(weights).to(fabric.device)
    views = resolve_views(load_views(weights) or ViewConfig(), source)
    facts = _describe_table(weights, encoder, source, out, views, fabric)
    with open_writer(out, {**facts, "split": "train", "batch": len(source)}) as writer:
        if not writer.batches_done:
            writer.write(0, index.numpy(), rows.numpy())
        _finish(writer, facts, source)


def _finish(
    writer: TableWriter,
    facts: dict[str, Any],
    source: JoinedSplits,
    digests: np.ndarray | None = None,
    matches: Matches | None = None,
) -> int:
    """Write the table from the finished batches; return its rows."""
    digests = _read_contents(source) if digests is None else digests
    columns = functools.partial(_name_columns, source, digests)
    if matches is None:
        return writer.finish(columns)
    merge = functools.partial(merge_rows, matches, facts, source, columns)
    return writer.finish(functools.partial(_name_missing, columns, matches.missing), merge)


def _one_or_several(layer: str | Sequence[str] | None) -> str | list[str] | None:
    names = [layer] if isinstance(layer, str) else [str(name) for name in layer or ()]
    if len(set(names)) < len(names):
        raise UserError("option-invalid", f"--layer {' '.join(names)}: name each layer once.")
    return names if len(names) > 1 else next(iter(names), None)


def _check_options(
    out: Path,
    layer: str | list[str] | None,
    dtype: str,
    *,
    append: bool,
    raw_maps: bool,
) -> None:
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError("not-found", f"--out {out} is not a new file in an existing folder.")
    check_format(out, len(layer) if isinstance(layer, list) else 1)
    if dtype not in DTYPES:
        raise UserError("option-invalid", f"--dtype is {dtype}; it must be {' or '.join(DTYPES)}.")
    if raw_maps and layer is None:
        raise UserError("option-missing", "--raw-maps needs the --layer whose maps it writes.")
    if append and out.suffix.lower() not in (".parquet", ".pq"):
        raise UserError("option-conflict", f"--append needs --out FILE.parquet, not {out}.")


def _chosen_views(weights: Path, image_size: int | None, eval_crop: float | None) -> ViewConfig:
    """Return the stored view, with the requested size and crop."""
    chosen = {"image_size": image_size, "eval_crop": eval_crop}
    views = load_views(weights) or ViewConfig()
    return replace(views, **{name: value for name, value in chosen.items() if value is not None})


def _describe_table(
    weights: Path,
    encoder: Encoder,
    source: JoinedSplits,
    out: Path,
    views: ViewConfig,
    fabric: Fabric,
    layer: str | list[str] | None = None,
    dtype: str = "float32",
    raw_maps: bool = False,
) -> dict[str, Any]:
    """Return the facts that the values of a table depend on."""
    size = require_resolved(views.image_size)
    labels = None  # a hash: the fingerprint need not cover class names
    if source.labels is not None and source.classes is not None:
        names = json.dumps(source.classes).encode()
        labels = hashlib.sha256(names + source.labels.numpy().tobytes()).hexdigest()
    view = torch.zeros(1, 3, size, size)
    names = {f"layer_{name}": name for name in layer} if isinstance(layer, list) else {}
    names = names or {"embedding": layer}
    columns = {
        column: encode(encoder, view, name, fabric, raw_maps=raw_maps).shape[1]
        for column, name in names.items()
    }
    shapes = {}
    if raw_maps:
        listed = layer if isinstance(layer, list) else [str(layer)]
        maps = encoder.maps(view.to(fabric.device), listed).values()
        sizes = [list(each.shape[1:]) for each in maps]
        shapes = {"shapes": dict(zip(names, sizes, strict=True))}
    return {
        "version": version("localagg"),
        "weights_digest": weights_digest(encoder),
        "model": encoder.spec["model"],
        "layer": layer,
        "dim": sum(columns.values()),
        "columns": columns,
        **shapes,
        "dtype": dtype,
        "views": to_dict(views),
        **describe_arithmetic(fabric),
        "fingerprint": source.fingerprint(),
        "labels": labels,
        "images": len(source),
        "contents": True,
        "weights": str(weights.absolute()),
        "data": source.uri,
        "data_absolute": absolute_place(source.uri),
        **describe_root(source.root, out),
    }


def _convert(found: Tensor, source: Source, index: Tensor, facts: dict[str, Any]) -> Tensor:
    """Return the values in the table's dtype; raise UserError if one is not finite."""
    values = found.to(getattr(torch, facts["dtype"]))
    finite = values.isfinite().all(dim=1)
    if not finite.all():
        layer = "embedding" if facts["layer"] is None else f"output of layer {facts['layer']}"
        fix = f"the weights '{facts['weights']}' are damaged"
        if found.isfinite().all():
            fix = "use --dtype float32"
        raise UserError(
            "not-finite",
            f"The {layer} of {source.name(int(index[~finite][0]))} is not finite in"
            f" {facts['dtype']}; {fix}.",
        )
    return values


def _table_views(out: Path, views: ViewConfig) -> ViewConfig:
    """Return the views of a table that grows, where the weights do not set them."""
    stored = EmbeddingTable(out).facts.get("views")
    if stored is None:
        raise UserError("unsupported", f"--append: '{out}' names no weights; embed to a new file.")
    known = from_dict(ViewConfig, stored)
    return replace(
        views,
        image_size=views.image_size or known.image_size,
        eval_crop=views.eval_crop or known.eval_crop,
    )


def _read_contents(source: Source) -> np.ndarray:
    with show_progress("reading contents") as show:
        return content_digests(source, show)


def _name_columns(
    source: JoinedSplits, digests: np.ndarray, index: list[int]
) -> dict[str, list[Any]]:
    """Return the columns path, split, content and, with labels, label."""
    columns: dict[str, list[Any]] = {"path": [path_text(source.name(i)) for i in index]}
    columns["split"] = [source.split(i) for i in index]
    columns["content"] = [digest.hex() or None for digest in digests[index].tolist()]
    if source.labels is not None and source.classes is not None:
        labels = source.labels[index].tolist()
        columns["label"] = [path_text(source.classes[n]) if n >= 0 else None for n in labels]
    return columns


def _name_missing(columns: NameColumns, missing: Tensor, index: list[int]) -> dict[str, list[Any]]:
    """Return the columns of images that a table lacks, and their indices in the whole source."""
    whole = missing[index].tolist()
    return {**columns(whole), "index": whole}
