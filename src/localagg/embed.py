"""Images to embeddings with a trained encoder in inference mode."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .config import ViewConfig
from .data.augment import evaluation_view
from .data.loader import evaluation_batches
from .data.sources import Source
from .models import Encoder


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
