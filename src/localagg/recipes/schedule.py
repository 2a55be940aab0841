"""Which epoch, phase and learning rate a step has. Plain arithmetic, as the reference counts.

Steps count from 0 through IR and LA. An epoch is ``images // batch`` steps: IR's with its own,
LA's with LA's. Where the two batches differ, LA's epochs are still counted from step 0, as in the
reference: its VGG16 begins LA at step 100,090, which is batch 10 of epoch 20 of 5,004 steps.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from ..config import PretrainConfig, require_resolved


class Position(NamedTuple):
    """Where a step stands."""

    epoch: int
    """From 0."""
    batch: int
    """Which batch of that epoch, from 0."""
    aggregating: bool
    """LA, not IR."""


@dataclass(frozen=True)
class Schedule:
    """The steps of a run, from a resolved configuration and the number of images that can be read.

    Args:
        config: epochs, ir_epochs, batch_size, ir_batch_size, drops, learning_rate and
            rate_schedule are read.
        images: at least one batch.
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
        """Images of a step of LA, or of IR."""
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

    def position(self, step: int) -> Position:
        """Epoch, batch and phase of a step."""
        aggregating = step >= self.la_start
        steps = self.la_steps if aggregating else self.ir_steps
        return Position(step // steps, step % steps, aggregating)

    def end_of_epoch(self, step: int) -> int:
        """The step at which the epoch of ``step`` ends."""
        epoch, _, aggregating = self.position(step)
        return (epoch + 1) * (self.la_steps if aggregating else self.ir_steps)

    def should_cluster(self, step: int, *, has_labels: bool) -> bool:
        """Whether the bank is clustered anew before a step: when LA starts, and at each epoch."""
        now = self.position(step)
        return now.aggregating and (now.batch == 0 or not has_labels)

    def should_evaluate(self, epoch: int) -> bool:
        """Whether the embedding is measured when an epoch has ended: the last one is."""
        every = self.config.eval_every
        last = self.position(self.total_steps - 1).epoch
        return every > 0 and ((epoch + 1) % every == 0 or epoch == last)

    def learning_rate(self, step: int) -> float:
        """The rate of a step: a tenth for each boundary that lies before it.

        As in the reference the rate drops on the step after the boundary. A cosine (not in the
        paper; Loshchilov & Hutter 2017) takes the place of drops where it is asked for.
        """
        if self.config.rate_schedule == "cosine":
            return self.config.learning_rate * (1 + math.cos(math.pi * step / self.total_steps)) / 2
        passed = sum(step > boundary for boundary in self.boundaries)
        return self.config.learning_rate * 0.1**passed

    @property
    def boundaries(self) -> list[int]:
        """The steps after which the rate drops; a cosine has none."""
        if self.config.rate_schedule == "cosine":
            return []
        if self.config.drop_steps is not None:
            return list(self.config.drop_steps)
        return [round(drop * self.la_steps) for drop in self.config.drops or ()]


def images_seen(schedule: Schedule) -> int:
    """Images that go through the network in a run, repeats counted."""
    of_ir = schedule.la_start * schedule.batch_size(aggregating=False)
    return of_ir + (schedule.total_steps - schedule.la_start) * schedule.batch_size(
        aggregating=True
    )
