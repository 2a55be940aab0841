"""A linear read-out while it learns: labelled images, network, optimizer, step, how it is saved."""

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint import load_encoder, load_views
from ..config import PretrainConfig, TransferConfig, ViewConfig, require_resolved
from ..data.images.augment import Augment
from ..data.loading.loader import (
    Feed,
    Throttle,
    hold_or_scan,
    on_device,
    report_unreadable,
    typical_side,
)
from ..data.sources.labels import held_out_to_training_labels
from ..data.sources.open import Source, open_evaluation, open_images
from ..engine.device import make_fabric
from ..errors import UserError
from ..io.console import notify, show_progress
from ..io.files import atomic_write
from ..models import Encoder
from ..recipes.defaults import resolve_defaults
from ..recipes.schedule import Schedule
from .feature_cache import Extractor, FeatureCache, Kept, is_fixed
from .readout import ReadOut, accuracies, evaluation_views, make_optimizer

_ROWS = 256  # kept features at a time


class Labelled(NamedTuple):
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


def open_labelled(data: str) -> Labelled:
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
    return Labelled(data, source, source.labels, held_out, names[held_out.labels], classes)


def check_classes(labelled: Labelled, readable: Tensor) -> None:
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


class Probe:
    """All that a transfer works on: images, network, optimizer, schedule, and the step.

    Args:
        config: resolved.
        encoder: its own copy.
        labelled: the images.
        facts: "data" and "weights", for the results.
    """

    def __init__(
        self, config: TransferConfig, encoder: Encoder, labelled: Labelled, facts: dict[str, Any]
    ) -> None:
        self.config, self.facts, self.labelled = config, facts, labelled
        general = general_options(config)
        self.fabric = make_fabric(config.device, config.precision)
        self.device = self.fabric.device
        size = require_resolved(config.views.image_size)
        self.readout = ReadOut(
            encoder.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
            config.layers or (),
            labelled.classes,
            size,
            seed=config.seed,
            finetune=config.finetune,
            compat=config.compat,
        )
        self.network, self.optimizer = self.fabric.setup(
            self.readout,
            make_optimizer(
                self.readout,
                learning_rate=config.learning_rate,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
            ),
        )
        with show_progress("reading images") as show:
            self.feed = Feed(labelled.source, general, Throttle(show))
            pixels, failed = hold_or_scan(labelled.held_out, general, Throttle(show))
        report_unreadable(labelled.held_out, failed, config.unreadable)
        self.pixels = None if failed else pixels
        self.kept: Kept | None = None
        self.kept_held_out: Kept | None = None
        if config.cache_gb and not config.finetune:
            self._keep_features()
        check_classes(labelled, self.feed.valid)
        self.schedule = Schedule(general, len(self.feed.valid))
        self.labels = labelled.labels.to(self.device)
        self.held_out_labels = labelled.held_out_labels.to(self.device)
        self.augment = Augment(config.views, config.seed, cropped=self.feed.cropped)
        self.step = 0
        self.progress: dict[str, Any] = {"metrics_bytes": 0, "seconds": 0.0}

    def _keep_features(self) -> None:
        """Features that will be asked for again, as far as they fit the cache."""
        config, feed = self.config, self.feed
        cache = FeatureCache(config.cache, config.cache_gb)
        extractor = Extractor(
            self.readout.encoder,
            self.readout.layers,
            config.views,
            self.fabric,
            compat=config.compat,
            workers=config.workers,
        )
        if is_fixed(config.views):
            source = self.labelled.source
            self.kept = cache.keep(extractor, source, pixels=feed.pixels, index=feed.valid)
            if self.kept is None:
                notify(
                    f"The features do not fit --cache-gb {config.cache_gb:g} (or the disk); they"
                    " are computed again in each epoch."
                )
            else:
                self._leave_out_undecodable(self.kept.index)
        self.kept_held_out = cache.keep(extractor, self.labelled.held_out, pixels=self.pixels)

    def _leave_out_undecodable(self, readable: Tensor) -> None:
        """Training images of which only the header could be read are refused, or never drawn."""
        feed = self.feed
        lost = sorted(set(feed.valid.tolist()) - set(readable.tolist()))
        failed = dict.fromkeys(lost, "damaged")
        report_unreadable(self.labelled.source, failed, self.config.unreadable)
        feed.unreadable.update(failed)
        feed.valid = readable
        feed.steps = len(readable) // feed.batch
        if not feed.steps:
            raise UserError(
                "TODO",
                f"--batch-size {feed.batch} is more than the {len(readable):,} images that can be"
                f" decoded; set it to at most {len(readable):,}.",
            )

    def batches(
        self, epoch: int, first: int
    ) -> Iterator[tuple[Tensor, Tensor | dict[str, Tensor]]]:
        """What the network reads in an epoch, from its batch ``first`` on, on the device.

        Returns:
            (index int64 [B], views float32 [B, 3, S, S]) a batch; where features are kept,
            (index, {layer: [B, F]}).
        """
        feed, device = self.feed, self.device
        if self.kept is None:
            for index, images in on_device(feed.batches(epoch, first), device, feed.fail):
                views = self.augment(images, epoch, index)
                yield index, views.contiguous(memory_format=torch.channels_last)
            return
        order = feed.order(epoch)[: feed.steps * feed.batch]
        for index in order.view(-1, feed.batch)[first:]:
            rows = {layer: self.kept.rows(layer, index).to(device) for layer in self.kept.layers}
            yield index.to(device), rows

    def measure(self, *, ten_crop: bool) -> tuple[dict[str, dict[str, float]], int]:
        """Accuracies of the heads by layer, and over how many held-out images."""
        if self.kept_held_out is not None and not ten_crop:
            batches = self.kept_held_out.batches(_ROWS)
            return accuracies(self.network, batches, self.held_out_labels)
        views = evaluation_views(
            self.labelled.held_out,
            self.config.views,
            self.pixels,
            ten_crop=ten_crop,
            workers=self.config.workers,
            device=self.device,
        )
        return accuracies(self.network, views, self.held_out_labels)

    def save(self, run: Path, progress: dict[str, Any]) -> None:
        """Write the state beside and rename, so that a kill leaves the last one whole."""
        state = {
            "step": self.step,
            "heads": self.readout.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "encoder": self.readout.encoder.state_dict() if self.config.finetune else {},
            "progress": progress,
        }
        with atomic_write(run / "state.pt") as beside:
            torch.save(state, beside)

    def restore(self, run: Path) -> None:
        """Take over the state of a folder; before the first there is nothing to take over.

        Raises:
            UserError: it is damaged.
        """
        path = run / "state.pt"
        if not path.exists():
            return
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            self.readout.heads.load_state_dict(state["heads"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.config.finetune:
                self.readout.encoder.load_state_dict(state["encoder"])
            self.step, self.progress = state["step"], state["progress"]
        except Exception as error:  # torch.load raises whatever its unpickler meets
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError("TODO", f"The state '{path}' is damaged: {reason}") from None
