"""The record of a run while it learns: console, metrics, checkpoints, shares of time, Ctrl-C."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from .checkpoint import has_checkpoint, latest
from .clustering import KMeans
from .config import PretrainConfig, UserError
from .data.loader import Feed
from .learner import Learner
from .logbook import Metrics, Shares, progress_bar, say
from .schedule import Schedule

# The progress of a run that begins.
START: dict[str, Any] = {"metrics_bytes": 0, "seconds": 0.0, "shares": {}, "final": {}}


class Book:
    """The record of a run: console, metrics, checkpoints, and where the time went."""

    def __init__(
        self,
        config: PretrainConfig,
        run: Path,
        feed: Feed,
        learner: Learner,
        schedule: Schedule,
        progress: dict[str, Any],
    ) -> None:
        self.config, self.run, self.feed, self.learner = config, run, feed, learner
        self.last_step = schedule.last
        self.shares = Shares(learner.device)
        self.shares.seconds = dict(progress["shares"])
        self.before = progress["seconds"]
        self.final: dict[str, float] = dict(progress["final"])
        self.started = self.saved = time.monotonic()
        self.metrics = Metrics(run, keep=progress["metrics_bytes"], step=learner.step)
        self.bar = progress_bar()

    def __enter__(self) -> "Book":
        self.bar.start()
        self.task = self.bar.add_task("learning", total=self.last_step, note="")
        self.bar.update(self.task, completed=self.learner.step)
        if not has_checkpoint(self.run):
            self.checkpoint()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        self.metrics.close()

    def after_step(
        self, epoch: int, aggregating: bool, loss: Tensor, notes: dict[str, Tensor], *, ends: bool
    ) -> None:
        """Metrics every few steps; a checkpoint when one is due.

        Not where the epoch ends: it is measured first, and a run that goes on from a checkpoint
        before that would leave the measurement out.
        """
        step = self.learner.step
        if step % self.config.log_every == 0 or step == self.last_step:
            value = loss.item()
            if not math.isfinite(value):
                raise UserError(
                    f"The loss is {value} at step {step:,}; go on from"
                    f" '{latest(self.run)}' with a lower --learning-rate in a new run."
                )
            phase = "LA" if aggregating else "IR"
            rate = self.learner.optimizer.param_groups[0]["lr"]
            values = {name: note.item() for name, note in notes.items()}
            line = {"epoch": epoch + 1, "phase": phase, "loss": value, "learning_rate": rate}
            self.metrics.write(step, line | values)
            note = f"{phase} loss {value:.3f}"
            if "without_close" in values:
                note += f", {values['without_close']:.0%} without a close neighbor"
            self.bar.update(self.task, description=f"epoch {epoch + 1}", note=note)
        self.bar.update(self.task, completed=step)
        if not ends and time.monotonic() - self.saved >= self.config.checkpoint_seconds:
            self.checkpoint()

    def after_clustering(self, number: int, found: KMeans) -> None:
        """Show how far the clusterings are."""
        of = len(self.config.objective.clusters or ())
        self.bar.update(self.task, note=f"clustering {number + 1}/{of} done")

    def after_epoch(self, epoch: int, measured: dict[str, float]) -> None:
        """A line of measurements."""
        if measured:
            self.final = measured
            self.metrics.write(self.learner.step, {"epoch": epoch + 1, **measured})
            shown = ", ".join(f"{name} {value:.1%}" for name, value in measured.items())
            say(f"epoch {epoch + 1}/{self.config.epochs}: {shown}")

    def seconds(self) -> float:
        """Spent on the run so far, over all its resumes."""
        return self.before + time.monotonic() - self.started

    def checkpoint(self, summary: dict[str, Any] | None = None) -> None:
        """Save everything that :meth:`Learner.restore` and this class need to go on."""
        with self.shares("checkpoint", once=True):
            self.learner.save(
                self.run,
                {
                    "metrics_bytes": self.metrics.flushed(),
                    "seconds": self.seconds(),
                    "shares": self.shares.seconds,
                    "final": self.final,
                    "unreadable": sorted(self.feed.unreadable),
                    "summary": summary,
                },
            )
        self.saved = time.monotonic()

    def finish(self) -> dict[str, Any]:
        """The summary of the run, saved with its last checkpoint."""
        summary = {
            "run": str(self.run),
            "images": len(self.feed.source),
            "unreadable": len(self.feed.unreadable),
            "epochs": self.config.epochs,
            "steps": self.learner.step,
            "seconds": round(self.seconds(), 2),
            "final": self.final,
            "shares": {part: round(share, 4) for part, share in self.shares.shares().items()},
        }
        self.checkpoint(summary)
        return summary


class Interrupt:
    """Whether the user has asked to stop."""

    asked = False


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Ctrl-C asks the loop to stop after its step; a second one stops at once."""
    interrupt = Interrupt()

    def ask(*_: object) -> None:
        interrupt.asked = True
        signal.signal(signal.SIGINT, before)
        say("Stopping after this step (once more: at once, losing what is not saved).")

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread: there Ctrl-C cannot be caught
        yield interrupt
        return
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
