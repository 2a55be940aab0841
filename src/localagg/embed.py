"""Images to embeddings with a trained encoder in inference mode."""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checkpoint import load_encoder, load_views
from .config import PretrainConfig, UserError, ViewConfig
from .data.augment import evaluation_view
from .data.loader import evaluation_batches, typical_side
from .data.sources import Source, open_images
from .device import make_fabric
from .logbook import showing
from .models import Encoder
from .sizing import resolve


class Embedded(NamedTuple):
    """Embeddings of the readable images of a source."""

    index: Tensor
    """int64 [n], increasing: which images of the source."""
    rows: Tensor
    """float32 unit rows [n, D]."""
    labels: Tensor | None
    """int64 [n], or None."""


@torch.no_grad()
def embed(
    encoder: Encoder,
    source: Source,
    views: ViewConfig,
    *,
    pixels: Tensor | None = None,
    batch: int = 256,
    workers: int = 0,
    batch_statistics: bool = False,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> Embedded:
    """Embed the central view of every readable image of a source.

    Args:
        encoder: any encoder; its training mode is restored afterwards.
        source: the images.
        views: image_size and eval_crop of the view.
        pixels: the decoded images uint8 [N, 3, H, W] if they are in memory already.
        batch: images at a time.
        workers: processes that decode, where the images are not in memory.
        batch_statistics: normalize by each batch's statistics, as in training (and let batch-norm
            track them), for a network that has no others yet.
        autocast: precision context of the forward pass.
        on_progress: called as ``on_progress(done, of)``.

    Returns:
        An :class:`Embedded` on the encoder's device; unreadable images are missing from it.
    """
    device = next(encoder.parameters()).device
    training = encoder.training
    encoder.train(batch_statistics)
    found_index, found_rows, done = [], [], 0
    if pixels is not None:
        parts = torch.arange(len(pixels)).split(batch)
        batches = ((index, evaluation_view(pixels[index].to(device), views)) for index in parts)
    else:
        parts = evaluation_batches(source, views, batch=batch, workers=workers)
        batches = ((index, images.to(device)) for index, images in parts)
    for index, images in batches:
        with autocast():
            found_rows.append(encoder(images).float())
        found_index.append(index)
        done += len(index)
        on_progress(done, len(source))
    encoder.train(training)
    index = torch.cat(found_index)
    labels = None if source.labels is None else source.labels[index]
    return Embedded(index, torch.cat(found_rows), labels)


def write_embeddings(
    weights: Path,
    data: str,
    out: Path,
    *,
    split: str = "train",
    workers: int = 0,
    batch: int = 256,
) -> dict[str, Any]:
    """Embeddings of any images as a Parquet file, written as they are computed.

    Columns: ``path`` (string, the image's name in its source), ``index`` (int64), ``label`` (the
    class name, where there are labels), ``embedding`` (list of D float32). One row a readable
    image, in order.

    Args:
        weights: run folder or weights file.
        data: data URI.
        out: the file; it appears when it is whole.
        split: of the data.
        workers: processes that decode.
        batch: images at a time, and rows of a row group.

    Returns:
        {"rows", "unreadable", "dim", "out", "data", "run", "seconds"}.

    Raises:
        UserError: no such weights or images, or ``out`` cannot be written.
    """
    import pyarrow.parquet as pq

    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out} is not a file in an existing folder.")
    start = time.perf_counter()
    fabric = make_fabric()
    encoder = load_encoder(weights).to(fabric.device).eval()
    source = open_images(data, split)
    config = PretrainConfig(views=load_views(weights) or ViewConfig())
    views = resolve(config, len(source), typical_side(source)).views
    schema = _schema(encoder.head.out_features, labels=source.labels is not None)
    beside = out.with_name(f".{out.name}.tmp")
    rows = 0
    with showing("embedding") as show, pq.ParquetWriter(beside, schema) as writer:
        for index, images in evaluation_batches(source, views, batch=batch, workers=workers):
            with torch.no_grad(), fabric.autocast():
                found = encoder(images.to(fabric.device)).float().cpu()
            writer.write_table(_table(schema, source, index, found))
            rows += len(index)
            show(rows, len(source))
    os.replace(beside, out)
    return {
        "rows": rows,
        "unreadable": len(source) - rows,
        "dim": encoder.head.out_features,
        "out": str(out),
        "data": data,
        "run": str(weights),
        "seconds": round(time.perf_counter() - start, 2),
    }


def _schema(dim: int, *, labels: bool):
    import pyarrow as pa

    columns: dict[str, Any] = {"path": pa.string(), "index": pa.int64()}
    if labels:
        columns["label"] = pa.string()
    columns["embedding"] = pa.list_(pa.float32(), dim)
    return pa.schema(columns)


def _table(schema, source: Source, index: Tensor, found: Tensor):
    import pyarrow as pa

    values: dict[str, Any] = {
        "path": [source.name(i) for i in index.tolist()],
        "index": index.tolist(),
        "embedding": pa.FixedSizeListArray.from_arrays(
            pa.array(found.flatten().numpy()), found.shape[1]
        ),
    }
    if source.labels is not None and source.classes is not None:
        values["label"] = [source.classes[label] for label in source.labels[index]]
    return pa.table(values, schema=schema)
