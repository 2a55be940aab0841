"""A linear read-out while it learns: labelled images, network, optimizer, step, how it is saved."""

import hashlib
import os
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import PretrainConfig, TransferConfig, UserError, known
from .data.loader import Feed, Throttle, hold_or_scan, report_unreadable
from .data.sources import Source, open_evaluation, open_images
from .device import make_fabric
from .evaluate import translation
from .logbook import showing
from .models import Encoder
from .readout import ReadOut, accuracies, evaluation_views, make_optimizer
from .schedule import Schedule


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
        raise UserError(f"'{data}' has no split to measure on; put held-out images into val/.")
    for part, what in ((source, "training"), (held_out, "held-out")):
        if part.labels is None:
            raise UserError(
                f"The {what} images of '{data}' have no labels; put each of at least two classes"
                " in a folder."
            )
        if missing := int((part.labels < 0).sum()):
            raise UserError(
                f"{missing:,} of the {len(part):,} {what} images of '{data}' have no label;"
                " leave them out."
            )
    assert source.labels is not None
    assert held_out.labels is not None
    if len(source.labels.unique()) < 2:
        raise UserError(
            f"All training images of '{data}' have the same label; a read-out needs two classes."
        )
    names = translation(data, source, held_out)
    classes = len(source.classes or ())
    return Labelled(data, source, source.labels, held_out, names[held_out.labels], classes)


def general_options(config: TransferConfig) -> PretrainConfig:
    """The options that reading, order, views and schedule know, as pretraining has them."""
    theirs = {field.name for field in fields(PretrainConfig)}
    shared = {f.name: getattr(config, f.name) for f in fields(config) if f.name in theirs}
    return PretrainConfig(**shared, ir_epochs=0)


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
        size = known(config.views.image_size)
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
        with showing("reading images") as show:
            self.feed = Feed(labelled.source, general, Throttle(show))
            pixels, failed = hold_or_scan(labelled.held_out, general, Throttle(show))
        report_unreadable(labelled.held_out, failed, config.unreadable)
        self.pixels = None if failed else pixels
        self.schedule = Schedule(general, len(self.feed.valid))
        self.labels = labelled.labels.to(self.device)
        self.held_out_labels = labelled.held_out_labels.to(self.device)
        self.step = 0
        self.progress: dict[str, Any] = {"metrics_bytes": 0, "seconds": 0.0}

    def measure(self, *, ten_crop: bool) -> tuple[dict[str, dict[str, float]], int]:
        """Accuracies of the heads by layer, and over how many held-out images."""
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
        beside = run / ".state.pt.tmp"
        state = {
            "step": self.step,
            "heads": self.readout.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "encoder": self.readout.encoder.state_dict() if self.config.finetune else {},
            "progress": progress,
        }
        with open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, run / "state.pt")

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
            raise UserError(f"The state '{path}' is damaged: {reason}") from None
