"""Inputs of a read-out: labeled splits, encoder, and resolved options."""

import copy
import hashlib
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..checkpoint import load_encoder, load_views
from ..config import PretrainConfig, TransferConfig, ViewConfig
from ..data.loading.scan import typical_side
from ..data.sources.labels import held_out_to_training_labels
from ..data.sources.open import Source, open_evaluation, open_images
from ..errors import UserError
from ..models import Encoder
from ..recipes.defaults import resolve_defaults

_ROWS = 256  # kept features at a time


class LabeledSplits(NamedTuple):
    """Images to learn from and images to measure on, whose classes have the same numbers."""

    data: str
    source: Source
    labels: Tensor
    """int64 [N] in 0..C-1."""
    held_out: Source
    held_out_labels: Tensor
    """int64 [M], in the numbers of the training classes."""
    classes: int

    def fingerprints(self) -> list[str]:
        """Of both parts: the images and their labels."""
        pairs = ((self.source, self.labels), (self.held_out, self.held_out_labels))
        return [
            hashlib.sha256(source.fingerprint().encode() + labels.numpy().tobytes()).hexdigest()
            for source, labels in pairs
        ]


def open_labeled(data: str) -> LabeledSplits:
    """Both splits of a data URI, their classes matched by name.

    A class without held-out images, or without training images, is allowed.

    Raises:
        UserError: no held-out split, no or missing labels, fewer than two classes in training, or
            held-out classes that training lacks.
    """
    source, held_out = open_images(data), open_evaluation(data)
    if held_out is None:
        raise UserError(
            "TODO", f"'{data}' has no split to measure on; put held-out images into val/."
        )
    for part, what in ((source, "training"), (held_out, "held-out")):
        if part.labels is None:
            raise UserError(
                "TODO",
                f"The {what} images of '{data}' have no labels; put each of at least two classes"
                " in a folder.",
            )
        if missing := int((part.labels < 0).sum()):
            raise UserError(
                "TODO",
                f"{missing:,} of the {len(part):,} {what} images of '{data}' have no label;"
                " leave them out.",
            )
    assert source.labels is not None
    assert held_out.labels is not None
    if len(source.labels.unique()) < 2:
        raise UserError(
            "TODO",
            f"All training images of '{data}' have the same label; a read-out needs two classes.",
        )
    names = held_out_to_training_labels(data, source, held_out)
    classes = len(source.classes or ())
    return LabeledSplits(data, source, source.labels, held_out, names[held_out.labels], classes)


def check_classes(labelled: LabeledSplits, readable: Tensor) -> None:
    """Make sure that the readable training images are of two classes at least.

    Raises:
        UserError: they are not.
    """
    if len(labelled.labels[readable].unique()) < 2:
        raise UserError(
            "TODO",
            f"All training images of '{labelled.data}' that can be read have the same label; a"
            " read-out needs two classes.",
        )


def general_options(config: TransferConfig) -> PretrainConfig:
    """The options that reading, order, views and schedule know, as pretraining has them."""
    theirs = {field.name for field in fields(PretrainConfig)}
    shared = {f.name: getattr(config, f.name) for f in fields(config) if f.name in theirs}
    return PretrainConfig(**shared, ir_epochs=0)


def take_encoder(weights: str | Path | Encoder) -> tuple[Encoder, Path | None]:
    """A copy of an encoder, or the one of a run folder or weights file, and where it was found."""
    if isinstance(weights, Encoder):
        return copy.deepcopy(weights), None
    return load_encoder(Path(weights)), Path(weights)


_SIZES = ("image_size", "eval_crop")  # what the weights' own views lend to others


def resolve_transfer(
    config: TransferConfig, encoder: Encoder, path: Path | None, source: Source
) -> TransferConfig:
    """The configuration without None: layers, batch, drops, and views that the weights know."""
    views = config.views
    if path is not None and (learned := load_views(path)):
        sizes = {name: getattr(views, name) or getattr(learned, name) for name in _SIZES}
        views = learned if views == ViewConfig() else replace(views, **sizes)
    general = resolve_defaults(
        replace(general_options(config), views=views, drops=(), ir_epochs=0),
        len(source),
        typical_side(source),
    )
    return replace(
        config,
        views=general.views,
        layers=config.layers or tuple(encoder.layers),
        batch_size=general.batch_size,
        drops=usual_drops(config.epochs) if config.drops is None else config.drops,
    )


def usual_drops(epochs: int) -> tuple[float, ...]:
    """Where the reference's ResNets have them: after 30 and 60 of 70 epochs."""
    return tuple(round(epochs * share / 7, 2) for share in (3, 6))
