"""Compute embeddings of images by a trained encoder."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric
from torch import Tensor

from ..config import (
    PretrainConfig,
    ViewConfig,
    check_arguments,
)
from ..config.tensor_checks import check_integers
from ..data.images.augment import evaluation_view
from ..data.images.image_dataset import open_data
from ..data.loading.cropping import evaluation_batches
from ..data.loading.scan import typical_side
from ..data.sources.open import Source
from ..errors import UserError
from ..models import Encoder
from ..models.inference import run_in_parts
from ..recipes.derived_settings import resolve_defaults


class ImageEmbeddings(NamedTuple):
    """Embeddings of the readable images of a source."""

    index: Tensor
    """int64 [n], increasing: the images' indices in the source."""
    rows: Tensor
    """float32 unit rows [n, D] (float64 from float64 weights)."""
    labels: Tensor | None
    """int64 [n], or None."""


@torch.no_grad()
def embed(
    encoder: Encoder,
    source: Any,
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
    """Embed the central view of every readable image of a source, on the encoder's device.

    Args:
        encoder: any encoder; its training mode is restored afterwards, also after an error.
        source: the images of :func:`~localagg.open_images`, a data URI (its split "train"), or
            images as :func:`~localagg.pretrain` takes them.
        views: image_size and eval_crop of the view; those that are None are derived.
        pixels: the decoded images uint8 [N, 3, H, W] of ``source``, if they are in memory.
        batch: images a batch.
        workers: decoding processes.
        batch_statistics: normalize by each batch's statistics and track them, as in training.
        autocast: precision context of the forward pass.
        part: the batches to embed.
        on_progress: called as ``on_progress(done, of)``.

    Raises:
        UserError: no image can be read, or an argument is invalid.
    """
    source, _ = open_data(source)
    check_arguments(batch=(batch, 1), workers=(workers, 0))
    _check_types(encoder, views, part, on_progress=on_progress, autocast=autocast)
    if views.image_size is None or views.eval_crop is None:
        views = resolve_views(views, source)
    found_index, found_rows, done, device = [], [], 0, encoder.mean.device
    if pixels is None:
        batches = evaluation_batches(source, views, batch=int(batch), workers=workers, part=part)
    else:
        check_integers("pixels", pixels, (len(source), 3, "H", "W"))
        chunks = torch.arange(len(pixels)).split(int(batch))[part]
        batches = ((index, evaluation_view(pixels[index].to(device), views)) for index in chunks)
    training = encoder.training
    encoder.train(batch_statistics)
    run = _run_as_in_training if batch_statistics else run_in_parts
    try:
        for index, images in batches:
            with autocast():
                found_rows.append(run(encoder, images.to(device)))
            found_index.append(index)
            done += len(index)
            on_progress(done, len(source))
    finally:
        encoder.train(training)
    if not found_index and part == slice(None):  # a part may have no readable image
        raise _nothing_readable(source)
    index = torch.cat([torch.empty(0).long(), *found_index])
    rows = torch.cat(found_rows) if found_rows else torch.empty(0, encoder.spec["dim"])
    return ImageEmbeddings(index, rows, None if source.labels is None else source.labels[index])


def _nothing_readable(source: Source) -> UserError:
    return UserError(
        "unreadable-images",
        f"None of the {len(source):,} images of '{source.uri}' can be read; check them by"
        " localagg inspect.",
    )


def _run_as_in_training(encoder: Encoder, images: Tensor) -> Tensor:
    if len(images) == 1:  # batch-norm needs two values of each channel
        return encoder(images.repeat(2, 1, 1, 1))[:1]
    return encoder(images)


def _check_types(encoder: Any, views: Any, part: Any, **functions: Any) -> None:
    if not isinstance(part, slice):
        raise UserError("option-invalid", f"part is {part!r}; pass a slice of the batches.")
    if not isinstance(encoder, Encoder):
        raise UserError(
            "option-invalid",
            f"encoder is of type {type(encoder).__name__}; pass one of create_encoder, or"
            " load(...).encoder.",
        )
    if not isinstance(views, ViewConfig):
        raise UserError("option-invalid", f"views is {views!r}; pass a ViewConfig.")
    for name, function in functions.items():
        if not callable(function):
            raise UserError("option-invalid", f"{name} is {function!r}; pass a function.")


@torch.no_grad()
def encode(
    encoder: Encoder,
    images: Tensor,
    layer: str | list[str] | None,
    fabric: Fabric,
    *,
    raw_maps: bool = False,
) -> Tensor:
    """Return embeddings of views, or their features at layers: float32 [B, F] on the CPU.

    Args:
        encoder: in inference mode, on ``fabric``'s device.
        images: [B, 3, S, S], uint8 or floating-point in 0-1.
        layer: a name of ``encoder.layers``, or several, whose features are joined. Default: the
            embedding, unit rows.
        fabric: sets the precision.
        raw_maps: return all values of the layers' maps, in the order [C, H, W]; else features are
            pooled and flattened as in the reference.

    Raises:
        UserError: unknown layer, or images of a size that the network does not take.
    """

    def read(part: Tensor) -> Tensor:
        if layer is None:
            return encoder(part).float().cpu()
        names = [layer] if isinstance(layer, str) else layer
        found = (encoder.maps if raw_maps else encoder.features)(part, names)
        return torch.cat([each.flatten(1).float().cpu() for each in found.values()], dim=1)

    with fabric.autocast():
        return run_in_parts(read, images.to(fabric.device))


def resolve_views(views: ViewConfig, source: Source) -> ViewConfig:
    """Return views with image_size and eval_crop derived from the images where they are None."""
    return resolve_defaults(
        PretrainConfig(views=views), len(source), typical_side(source, views)
    ).views
