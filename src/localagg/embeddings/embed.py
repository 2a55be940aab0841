"""Images to embeddings with a trained encoder in inference mode."""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.utils.data import Subset

from .. import __version__
from ..checkpoint import load_encoder, load_views, weights_digest
from ..config import PretrainConfig, ViewConfig, require_resolved, to_dict
from ..data.images.augment import evaluation_view
from ..data.loading.cropping import evaluation_batches
from ..data.loading.scan import typical_side
from ..data.sources.open import Source, open_images
from ..engine.device import make_fabric
from ..errors import UserError
from ..io.console import progress_bar
from ..models import Encoder
from ..recipes.defaults import resolve_defaults
from .table import DTYPES, TableWriter, text

if TYPE_CHECKING:
    import pyarrow as pa


class ImageEmbeddings(NamedTuple):
    """Embeddings of the readable images of a source."""

    index: Tensor
    """int64 [n], increasing: which images of the source."""
    rows: Tensor
    """float32 unit rows [n, D] (float64 from float64 weights)."""
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
    part: slice = slice(None),
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> ImageEmbeddings:
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
        part: which of the batches of all images.
        on_progress: called as ``on_progress(done, of)``.

    Returns:
        An :class:`ImageEmbeddings` on the encoder's device; unreadable images are missing from it.

    Raises:
        UserError: no image can be read.
    """
    device = next(encoder.parameters()).device
    training = encoder.training
    encoder.train(batch_statistics)
    found_index, found_rows, done = [], [], 0
    if pixels is not None:
        parts = torch.arange(len(pixels)).split(batch)[part]
        batches = ((index, evaluation_view(pixels[index].to(device), views)) for index in parts)
    else:
        parts = evaluation_batches(source, views, batch=batch, workers=workers, part=part)
        batches = ((index, images.to(device)) for index, images in parts)
    for index, images in batches:
        with autocast():
            found_rows.append(encoder(images))
        found_index.append(index)
        done += len(index)
        on_progress(done, len(source))
    encoder.train(training)
    if not found_index and part != slice(None):  # of some batches none may be readable
        found_index, found_rows = [torch.empty(0).long()], [torch.empty(0, encoder.spec["dim"])]
    if not found_index:
        raise UserError(
            "TODO", f"None of the {len(source):,} images of '{source.uri}' can be read."
        )
    index = torch.cat(found_index)
    labels = None if source.labels is None else source.labels[index]
    return ImageEmbeddings(index, torch.cat(found_rows), labels)


def write_embeddings(
    weights: Path,
    data: str,
    out: Path,
    *,
    split: str = "train",
    layer: str | None = None,
    dtype: str = "float32",
    workers: int = 0,
    batch: int = 256,
) -> dict[str, Any]:
    """Embeddings of any images as a Parquet file; ``embedding_table`` describes it.

    One row a readable image, in order of the index. After a kill the same call goes on at the next
    batch, and the file is the same, byte for byte, as far as the arithmetic repeats itself (on one
    CPU it does).

    Args:
        weights: run folder or weights file.
        data: data URI.
        out: the file; it appears when it is whole.
        split: of the data.
        layer: a name out of ``encoder.layers``, whose read-out features are written as they are
            (pooled and flattened as in the reference) instead of the embedding.
        dtype: float32 or float16.
        workers: processes that decode.
        batch: images at a time.

    Returns:
        {"rows", "unreadable": images left out, "dim", "layer", "dtype", "resumed": images that were
        done already, "out", "data", "split", "run", "seconds", "images_per_second"}.

    Raises:
        UserError: no such weights, images or layer; values that are not finite or exceed float16;
            ``out`` cannot be written, or is being written by another process.
        Interrupted: Ctrl-C; what was computed is kept.
    """
    _check_options(out, dtype, workers, batch)
    start = time.perf_counter()
    fabric = make_fabric()
    encoder = load_encoder(weights).to(fabric.device).eval()
    source = open_images(data, split)
    config = PretrainConfig(views=load_views(weights) or ViewConfig())
    views = resolve_defaults(config, len(source), typical_side(source)).views
    facts = _facts(encoder, source, views, layer, dtype, fabric)
    facts |= {"weights": str(weights.absolute()), "data": data, "split": split, "batch": batch}
    batches = math.ceil(len(source) / batch)
    with TableWriter(out, facts, labels=facts["labels"] is not None, batches=batches) as parts:
        first, begun = min(parts.done * batch, len(source)), time.perf_counter()
        for index, found in _embedded(encoder, source, views, facts, fabric, first, workers):
            parts.write(int(index[0]) // batch, _rows(parts.schema, source, index, found))
        rate = (len(source) - first) / (time.perf_counter() - begun)
        rows = parts.finish()
    return {
        **{"rows": rows, "unreadable": len(source) - rows, "resumed": first, "out": str(out)},
        **{name: facts[name] for name in ("dim", "layer", "dtype", "data", "split")},
        "run": str(weights),
        "seconds": round(time.perf_counter() - start, 2),
        "images_per_second": round(rate, 1),
    }


def _facts(
    encoder: Encoder,
    source: Source,
    views: ViewConfig,
    layer: str | None,
    dtype: str,
    fabric: Fabric,
) -> dict[str, Any]:
    """What the values of a table depend on."""
    size = require_resolved(views.image_size)
    labels = source.labels is not None and source.classes is not None
    return {
        "version": __version__,
        "weights_digest": weights_digest(encoder),
        "model": encoder.spec["model"],
        "layer": layer,
        "dim": encode(encoder, torch.zeros(1, 3, size, size), layer, fabric).shape[1],
        "dtype": dtype,
        "views": to_dict(views),
        "precision": fabric.strategy.precision.precision,
        "device": fabric.device.type,
        "fingerprint": source.fingerprint(),
        "labels": _labels_digest(source) if labels else None,
        "images": len(source),
    }


@torch.no_grad()
def encode(encoder: Encoder, images: Tensor, layer: str | None, fabric: Fabric) -> Tensor:
    """Embeddings of views, or their features at a layer: float32 [B, F] on the CPU.

    Args:
        encoder: in inference mode, on ``fabric``'s device.
        images: [B, 3, S, S], uint8 or floating in 0-1.
        layer: a name out of ``encoder.layers``; None: the embedding, unit rows.
        fabric: in whose precision to compute.

    Raises:
        UserError: a layer that the encoder does not have.
    """
    images = images.to(fabric.device)
    with fabric.autocast():
        found = encoder(images) if layer is None else encoder.features(images, [layer])[layer]
    return found.float().cpu()


def _check_options(out: Path, dtype: str, workers: int, batch: int) -> None:
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError("TODO", f"--out {out} is not a file in an existing folder.")
    if dtype not in DTYPES:
        raise UserError("TODO", f"--dtype is '{dtype}'; it must be {' or '.join(DTYPES)}.")
    for name, value, least in (("--workers", workers, 0), ("--batch", batch, 1)):
        if value < least:
            raise UserError("TODO", f"{name} is {value}; it must be at least {least}.")


def _embedded(
    encoder: Encoder,
    source: Source,
    views: ViewConfig,
    facts: dict[str, Any],
    fabric: Fabric,
    first: int,
    workers: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(index int64 [B], values [B, F] in the table's dtype) of the images from ``first`` on."""
    rest: Any = Subset(cast(Any, source), range(first, len(source)))
    batch, begun = facts["batch"], time.perf_counter()
    with progress_bar() as bar:
        task = bar.add_task("embedding", total=len(source), completed=first, note="")
        for index, images in evaluation_batches(rest, views, batch=batch, workers=workers):
            index = index + first
            found = encode(encoder, images, facts["layer"], fabric)
            yield index, _converted(found, source, index, facts)
            done = min((int(index[0]) // batch + 1) * batch, len(source))
            rate = (done - first) / (time.perf_counter() - begun)
            bar.update(task, completed=done, note=f"{rate:,.0f} images a second")


def _converted(found: Tensor, source: Source, index: Tensor, facts: dict[str, Any]) -> Tensor:
    """The values in the table's dtype; none may be lost in it."""
    values = found.to(getattr(torch, facts["dtype"]))
    for broken, why in (
        (~found.isfinite(), f"is not finite; the weights '{facts['weights']}' are damaged"),
        (~values.isfinite(), "has values beyond float16; use --dtype float32"),
    ):
        if broken.any():
            name = source.name(int(index[broken.any(dim=1)][0]))
            what = "embedding" if facts["layer"] is None else f"layer {facts['layer']}"
            raise UserError("TODO", f"The {what} of {name} {why}.")
    return values


def _rows(schema: "pa.Schema", source: Source, index: Tensor, found: Tensor) -> "pa.Table":
    import pyarrow as pa

    values: dict[str, Any] = {
        "path": [text(source.name(i)) for i in index.tolist()],
        "index": index.tolist(),
        "embedding": pa.FixedSizeListArray.from_arrays(
            pa.array(found.flatten().numpy()), found.shape[1]
        ),
    }
    if "label" in schema.names:
        assert source.labels is not None
        assert source.classes is not None
        numbers = source.labels[index].tolist()
        values["label"] = [text(source.classes[n]) if n >= 0 else None for n in numbers]
    return pa.table(values, schema=schema)


def _labels_digest(source: Source) -> str:
    """Hash of what the column of labels will hold; a fingerprint need not cover class names."""
    assert source.labels is not None
    names = json.dumps(source.classes).encode()
    return hashlib.sha256(names + source.labels.numpy().tobytes()).hexdigest()
