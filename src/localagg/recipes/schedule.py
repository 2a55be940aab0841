"""Epoch, phase and learning rate of each step, counted as the reference counts.

Steps count from 0 through IR and LA. An epoch is ``images // batch`` steps: IR's with its own,
LA's with LA's. Where the two batches differ, LA's epochs are still counted from step 0, as in the
reference: its VGG16 begins LA at step 100,090, which is batch 10 of epoch 20 of 5,004 steps.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from ..config import PretrainConfig, require_resolved
from ..errors import UserError

_WARM_UP = 0.1  # share of the backbone's steps in which its rate rises


class Position(NamedTuple):
    """Position of a step: epoch and batch of that epoch, both from 0, and LA rather than IR."""

    epoch: int
    batch: int
    aggregating: bool


@dataclass(frozen=True)
class Schedule:
    """The steps of a run.

    Args:
        config: resolved; epochs, batch sizes, drops, rates and eval_every are read.
        images: number of readable images, at least one batch.
    """

    config: PretrainConfig
    images: int

    @property
    def la_steps(self) -> int:
        """Steps of an epoch of LA."""
        return self.images // self.batch_size(aggregating=True)

    @property
    def ir_steps(self) -> int:
        """Steps of an epoch of IR."""
        return self.images // self.batch_size(aggregating=False)

    def batch_size(self, *, aggregating: bool) -> int:
        """Return the images of a step of LA, or of IR."""
        batch = require_resolved(self.config.batch_size)
        return batch if aggregating else self.config.ir_batch_size or batch

    @property
    def la_start(self) -> int:
        """The first step of LA."""
        return require_resolved(self.config.ir_epochs) * self.ir_steps

    @property
    def total_steps(self) -> int:
        """Steps of the whole run. A run without LA ends with IR's epochs."""
        if self.config.ir_epochs == self.config.epochs:
            return self.la_start
        return max(self.la_start, require_resolved(self.config.epochs) * self.la_steps)

    @property
    def network_start(self) -> int:
        """The step from which the backbone learns; 0 without cached features."""
        if not self.config.adapt.feature_views:
            return 0
        return self.total_steps - (self.config.adapt.network_epochs or 0) * self.la_steps

    def is_backbone_frozen(self, step: int) -> bool:
        """Return whether the head alone learns at a step, on cached features."""
        return step < self.network_start

    def position(self, step: int) -> Position:
        """Return epoch, batch and phase of a step."""
        aggregating = step >= self.la_start
        epoch, batch = divmod(step, self.la_steps if aggregating else self.ir_steps)
        return Position(epoch, batch, aggregating)

    def end_of_epoch(self, step: int) -> int:
        """Return the step at which the epoch of ``step`` ends."""
        epoch, _, aggregating = self.position(step)
        return (epoch + 1) * (self.la_steps if aggregating else self.ir_steps)

    def should_cluster(self, step: int, *, has_labels: bool) -> bool:
        """Return whether the bank is clustered before a step: when LA starts, and each epoch."""
        now = self.position(step)
        return now.aggregating and (now.batch == 0 or not has_labels)

    def should_evaluate(self, epoch: int) -> bool:
        """Return whether the embedding is evaluated at the end of an epoch, as after the last."""
        every = self.config.eval_every
        last = self.position(self.total_steps - 1).epoch
        return every > 0 and ((epoch + 1) % every == 0 or epoch == last)

    def learning_rate(self, step: int) -> float:
        """Return the rate of a step: a tenth for each boundary before it, or half a cosine.

        As in the reference, the rate drops on the step after the boundary. The cosine is not in
        the paper (Loshchilov & Hutter 2017).
        """
        if self.config.rate_schedule == "cosine":
            first, last, warm_up = 0, self.total_steps, 1.0
            if self.is_backbone_frozen(step):
                last = self.network_start
            elif self.config.adapt.feature_views:  # a cosine of its own, after a warm-up
                first = self.network_start
                warm_up = min(1.0, (step - first + 1) / (_WARM_UP * (last - first)))
            cosine = (1 + math.cos(math.pi * (step - first) / (last - first))) / 2
            return self.config.learning_rate * warm_up * cosine
        passed = sum(step > boundary for boundary in self.boundaries)
        return self.config.learning_rate * 0.1**passed

    @property
    def boundaries(self) -> list[int]:
        """The steps after which the rate drops; none for a cosine."""
        if self.config.rate_schedule == "cosine":
            return []
        if self.config.drop_steps is not None:
            return list(self.config.drop_steps)
        return [round(drop * self.la_steps) for drop in self.config.drops or ()]

    @property
    def images_seen(self) -> int:
        """Images that pass through the network in a run, repeats counted."""
        ir = self.la_start * self.batch_size(aggregating=False)
        return ir + (self.total_steps - self.la_start) * self.batch_size(aggregating=True)


def check_aggregates(config: PretrainConfig, images: int) -> None:
    """Check that LA has steps where it has epochs.

    Args:
        config: resolved.
        images: number of them.

    Raises:
        UserError: IR's epochs, in smaller batches, take all steps of the run.
    """
    schedule = Schedule(config, images)
    if config.ir_epochs != config.epochs and schedule.la_start >= schedule.total_steps:
        raise UserError(
            "option-conflict",
            f"No step is left for LA: {config.ir_epochs} epochs of IR in batches of"
            f" {schedule.batch_size(aggregating=False):,} take {schedule.la_start:,} steps, and"
            f" {config.epochs} epochs in batches of {config.batch_size:,} no more. LA's epochs are"
            " counted from the first step: raise --epochs or --ir-batch-size.",
        )
