"""Inputs of a read-out: labeled splits, encoder, resolved options, and views to measure on."""

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...checkpoint import check_new, load_encoder, load_views
from ...config import PretrainConfig, TransferConfig, ViewConfig, require_resolved, to_dict
from ...data.images.augment import evaluation_view, ten_crop_views
from ...data.images.samples import with_measured_range
from ...data.loading.cropping import evaluation_batches
from ...data.loading.scan import typical_side
from ...data.sources.combined import SourceSubset
from ...data.sources.labels import held_out_to_training_labels
from ...data.sources.open import Source, open_evaluation, open_images
from ...errors import UserError
from ...io.console import notify
from ...io.files import check_writable
from ...models import Encoder
from ...recipes.derived_settings import resolve_defaults
from ...recipes.schedule import Schedule
from ..results.protocols import default_drops

_BATCH = 256  # views at a time


class LabeledSplits(NamedTuple):
    """Training images and held-out images, whose classes have the same numbers."""

    data: str
    source: Source
    labels: Tensor
    """int64 [N] in 0..C-1."""
    held_out: Source
    held_out_labels: Tensor
    """int64 [M], in the numbers of the training classes."""
    classes: int

    def fingerprints(self) -> list[str]:
        """Return a hash of the images and labels of each split."""
        pairs = ((self.source, self.labels), (self.held_out, self.held_out_labels))
        return [
            hashlib.sha256(source.fingerprint().encode() + labels.numpy().tobytes()).hexdigest()
            for source, labels in pairs
        ]


def open_labeled(data: str) -> LabeledSplits:
    """Open both splits of a data URI and match their classes by name.

    A class may lack held-out images, or training images. Images without a label are not used.

    Raises:
        UserError: no held-out split, no labels, fewer than two classes in training, or
            held-out classes that training lacks.
    """
    source, held_out = open_images(data), open_evaluation(data)
    if held_out is None:
        raise UserError("not-found", f"'{data}' has no held-out split; put images into val/.")
    source = _labeled(data, source, "training")
    held_out = _labeled(data, held_out, "held-out")
    assert source.labels is not None
    assert held_out.labels is not None
    names = held_out_to_training_labels(data, source, held_out)
    classes = len(source.classes or ())
    splits = LabeledSplits(data, source, source.labels, held_out, names[held_out.labels], classes)
    check_classes(splits, torch.arange(len(source)))
    return splits


def _labeled(data: str, source: Source, name: str) -> Source:
    """Return the images with a label, and print how many have none.

    Raises:
        UserError: none has a label.
    """
    if source.labels is None:
        raise UserError(
            "no-labels",
            f"The {name} images of '{data}' have no labels; put each class into a folder.",
        )
    missing = int((source.labels < 0).sum())
    if not missing:
        return source
    notify(f"{missing:,} of the {len(source):,} {name} images have no label; they are not used.")
    return SourceSubset(source, (source.labels >= 0).nonzero().squeeze(1))


def check_classes(splits: LabeledSplits, readable: Tensor) -> None:
    """Check that the readable training images have at least two classes.

    Raises:
        UserError: they do not.
    """
    if len(splits.labels[readable].unique()) < 2:
        raise UserError(
            "no-labels",
            f"All {len(readable):,} readable training images of '{splits.data}' have the same"
            " label; a read-out needs two classes.",
        )


def general_options(config: TransferConfig) -> PretrainConfig:
    """Return a configuration of pretraining with the options that read-outs share with it."""
    shared = {field.name for field in fields(PretrainConfig)} & {f.name for f in fields(config)}
    return PretrainConfig(**{name: getattr(config, name) for name in shared}, ir_epochs=0)


def new_folder(out: str | Path | None) -> Path | None:
    """Return the folder to make, or None; raise a UserError if it exists or cannot be written."""
    if out is None:
        return None
    check_new(Path(out))
    check_writable(Path(out))
    return Path(out)


def take_encoder(weights: str | Path | Encoder) -> tuple[Encoder, Path | None]:
    """Return a copy of an encoder, or the encoder of a run folder or weights file, and its path."""
    if isinstance(weights, Encoder):
        return copy.deepcopy(weights), None
    return load_encoder(Path(weights)), Path(weights)


def resolve_transfer(
    config: TransferConfig, encoder: Encoder, path: Path | None, source: Source
) -> TransferConfig:
    """Return the configuration with layers, batch, drops and the views of the weights filled in."""
    views = config.views
    if path is not None and (learned := load_views(path)):
        sizes = {
            name: getattr(views, name) or getattr(learned, name)
            for name in ("image_size", "eval_crop", "exif_orientation", "range", "bands")
        }
        views = learned if views == ViewConfig() else replace(views, **sizes)
    views = with_measured_range(views, source)
    general = resolve_defaults(
        replace(general_options(config), views=views, drops=(), ir_epochs=0),
        len(source),
        typical_side(source, views),
    )
    return replace(
        config,
        views=general.views,
        layers=config.layers or tuple(encoder.layers),
        batch_size=general.batch_size,
        drops=default_drops(config.epochs) if config.drops is None else config.drops,
    )


@torch.no_grad()
def forecast_transfer(config: TransferConfig, weights: str | Path, data: str) -> dict[str, Any]:
    """Resolve the options of a transfer for its images, without training.

    Returns:
        {"images", "held_out", "classes", "config", "steps": {"epoch", "total", "drops"}, "heads":
        {layer: parameters of its head}}. Unreadable images count.

    Raises:
        UserError: as :func:`.linear.transfer`.
    """
    encoder, path = take_encoder(weights)
    splits = open_labeled(data)
    resolved = resolve_transfer(config, encoder, path, splits.source)
    schedule = Schedule(general_options(resolved), len(splits.source))
    size = require_resolved(resolved.views.image_size)
    features = encoder.eval().features(
        torch.zeros(1, 3, size, size), resolved.layers or (), compat=resolved.compat
    )
    return {
        "images": len(splits.source),
        "held_out": len(splits.held_out),
        "classes": splits.classes,
        "config": to_dict(resolved),
        "steps": {
            "epoch": schedule.la_steps,
            "total": schedule.total_steps,
            "drops": schedule.boundaries,
        },
        "heads": {
            layer: splits.classes * (values.shape[1] + 1) for layer, values in features.items()
        },
    }


def evaluation_views(
    source: Source,
    views: ViewConfig,
    pixels: Tensor | None,
    *,
    ten_crop: bool,
    workers: int,
    device: torch.device,
    index: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every readable image of a source once, the last partial batch included.

    Args:
        source: the images.
        views: size and crop of a view.
        pixels: the decoded images uint8 [N, 3, H, W], if they are in memory.
        ten_crop: ten views of an image instead of the center crop.
        workers: processes that decode images that are not in memory.
        device: where views are made of pixels in memory.
        index: int64 [n], which of the pixels to take. Default: all.

    Yields:
        (index int64 [B], images [B, 3, S, S] or [B, 10, 3, S, S]).
    """
    batch = max(1, _BATCH // (10 if ten_crop else 1))
    if pixels is None:
        yield from evaluation_batches(
            source, views, batch=batch, workers=workers, ten_crop=ten_crop
        )
        return
    make_views = ten_crop_views if ten_crop else evaluation_view
    for part in (torch.arange(len(pixels)) if index is None else index).split(batch):
        yield part, make_views(pixels[part].to(device), views)
