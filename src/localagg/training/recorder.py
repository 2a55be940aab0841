"""Record a run while it learns: console, metrics, checkpoints, shares of time, diagnostics."""

import time
from contextlib import ExitStack
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from ..checkpoint import convert_write_errors, has_checkpoint, latest, write_json
from ..config import PretrainConfig, to_dict
from ..data.loading.loader import Feed
from ..data.loading.loading_hint import data_loading_hint
from ..distributed.signals import handle_stop_signals
from ..engine.kmeans import KMeans
from ..errors import UserError
from ..io.console import ProgressLine, duration, notify
from ..io.loggers import open_logger
from ..io.metrics_log import MetricsCallback, MetricsLog, NoMetricsLog
from ..recipes.schedule import Schedule
from .deferred_metrics import DeferredMetrics, StepMetrics, first_not_finite
from .diagnostics import Diagnostics
from .learner import Learner
from .step import StepResult
from .time_shares import TimeShares

_NAMED = 8  # images in a message
WAITING = "waiting for data"
"""Label of the data-loading time."""
START: dict[str, Any] = {"metrics_bytes": 0, "seconds": 0.0, "shares": {}, "final": {}}
"""The progress of a run that begins."""


class Callbacks(NamedTuple):
    """Functions of the user that rank 0 calls during a run."""

    on_epoch: MetricsCallback | None = None
    """Called as ``on_epoch(epoch, metrics)`` after each epoch, counted from 1."""
    on_metrics: MetricsCallback | None = None
    """Called as ``on_metrics(step, values)`` with each line of metrics.jsonl."""
    logger: str | None = None
    """A further logger, of :data:`.LOGGERS`."""


NO_CALLBACKS = Callbacks()


class Recorder:
    """Console, metrics, checkpoints and time shares of a run.

    Rank 0 writes and prints; the other ranks take part in its checkpoints.

    Attributes:
        timer: measures the parts of the run.
        health: diagnostics of the epoch.
    """

    def __init__(
        self,
        config: PretrainConfig,
        run: Path,
        feed: Feed,
        learner: Learner,
        schedule: Schedule,
        progress: dict[str, Any],
        callbacks: Callbacks = NO_CALLBACKS,
    ) -> None:
        self._on_epoch = callbacks.on_epoch
        self.config, self.run, self.feed, self.learner = config, run, feed, learner
        self.world = learner.world
        self.schedule, self.total_steps = schedule, schedule.total_steps
        self.timer = TimeShares(learner.device)
        self.timer.seconds = dict(progress["shares"])
        self._epoch_seconds = dict(self.timer.seconds)  # by part, when the epoch began
        self._epoch_start = (learner.step, time.monotonic())
        self._hinted = False
        self._loss = ""
        self._unreadable = len(feed.unreadable)  # reported when the images were read
        self._seconds_before = progress["seconds"]
        self.final: dict[str, float] = dict(progress["final"])
        self.floors: dict[str, dict[str, float]] = dict(progress.get("floors", {}))
        self._started = self._saved = time.monotonic()
        self._checkpoint_due = self._stop_agreed = False
        self.metrics = NoMetricsLog()
        if self.world.rank == 0:
            options: dict[str, Any] = {"keep": progress["metrics_bytes"], "step": learner.step}
            options["logger"] = open_logger(callbacks.logger, run, to_dict(config))
            self.metrics = MetricsLog(run, on_write=callbacks.on_metrics, **options)
        self._deferred = DeferredMetrics()
        self.health = Diagnostics(progress.get("health"), self.world)
        self.line = ProgressLine("learning", self.total_steps, learner.step)

    def __enter__(self) -> "Recorder":
        with ExitStack() as stack:
            stack.callback(self.metrics.close)
            stack.enter_context(self.line)
            self._signals = stack.enter_context(handle_stop_signals())
            if not self.world.gather_objects(has_checkpoint(self.run))[0]:  # as rank 0 sees it
                self.checkpoint()
            self._stack = stack.pop_all()
        self._epoch_start = (self.learner.step, time.monotonic())  # floors are behind
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def after_step(self, epoch: int, aggregating: bool, result: StepResult, *, ends: bool) -> None:
        """Write metrics every few steps, and a checkpoint when one is due.

        No checkpoint where the epoch ends: it is measured first, and a run resumed from an earlier
        checkpoint would skip the measurement.
        """
        self._agree()
        step = self.learner.step
        facts = {
            "epoch": epoch + 1,
            "phase": "LA" if aggregating else "IR",
            "learning_rate": self.learner.optimizer.param_groups[0]["lr"],
        }
        self._deferred.put(step, facts, result.index, result.values, result.finite)
        if ends:
            self._write(self._deferred.fetch_all())
            self._end_of_epoch(epoch)
        elif step % self.config.log_every == 0:
            self._write(self._deferred.exchange())
        self.line.update(step)
        if not ends and self._checkpoint_due:
            self.checkpoint()

    @property
    def should_stop(self) -> bool:
        """Whether a signal to any rank asks the loop to stop; the same on all ranks."""
        return self._signals.requested if self.world.size == 1 else self._stop_agreed

    def _agree(self) -> None:
        """Share signals, and whether rank 0 finds a checkpoint due, with all ranks. One all-reduce
        of two numbers."""
        due = time.monotonic() - self._saved >= self.config.checkpoint_seconds
        self._checkpoint_due = due
        if self.world.size > 1:
            mine = torch.tensor([self._signals.status, int(due and self.world.rank == 0)])
            status, due = self.world.maximum(mine).tolist()
            self._checkpoint_due, self._stop_agreed = bool(due), bool(status)
            self._signals.status = self._signals.status or status  # one may arrive meanwhile

    def _write(self, steps: list[StepMetrics]) -> None:
        """Write metrics that arrived from the device.

        Raises:
            UserError: a loss or gradient is not finite.
        """
        for step in steps:
            if not step.finite:
                loss = step.values["loss"]
                what = "gradient of the loss is not finite" if isfinite(loss) else f"loss is {loss}"
                self._stop_not_finite(f"The {what} at step {step.number:,}", step)
            self.health.add(step.values)
            self._loss = f"{step.facts['phase']} loss {step.values['loss']:.3f}"
            epoch = f"epoch {step.facts['epoch']}/{self.config.epochs}"
            self.line.update(description=epoch, note=self._loss)
            if step.number % self.config.log_every and step.number != self.total_steps:
                continue
            rate = {"learning_rate": step.facts["learning_rate"]}
            with convert_write_errors(self.run):
                self.metrics.write(step.number, step.facts | step.values | rate)

    def _stop_not_finite(self, what: str, step: StepMetrics) -> NoReturn:
        """Raise a UserError that names the images of a step and the checkpoint before it."""
        file, index = self.run / "not-finite.json", step.index.tolist()
        good = latest(self.run)
        facts = {"step": step.number, **step.facts, **step.values, "index": index}
        if self.world.rank == 0:
            with convert_write_errors(self.run):
                write_json(file, {**facts, "checkpoint": str(good)})
        named = ", ".join(map(str, index[:_NAMED]))
        raise UserError(
            "not-finite",
            f"{what} (images {named}{', ...' if len(index) > _NAMED else ''}; all are in '{file}')."
            f" The last good checkpoint is '{good}'; begin a new run with a lower --learning-rate,"
            " or with --precision 32-true.",
        )

    def _end_of_epoch(self, epoch: int) -> None:
        """Record the waiting for data (with a hint, once a session) and unreadable images.

        The waiting is a curve of TensorBoard and not in metrics.jsonl, which does not depend on the
        machine.
        """
        before, self._epoch_seconds = self._epoch_seconds, dict(self.timer.seconds)
        spent = {part: s - before.get(part, 0.0) for part, s in self._epoch_seconds.items()}
        if whole := sum(spent.values()):  # on CUDA a short epoch may have no timed step
            share = spent.get(WAITING, 0.0) / whole
            self._curve({"waiting_for_data": share})
            hint = self._hint(share)
            if hint and not self._hinted:
                notify(f"epoch {epoch + 1}: {hint}")
                self._hinted = True
        self.feed.agree()
        if unreadable := len(self.feed.unreadable):
            with convert_write_errors(self.run):
                self.metrics.write(
                    self.learner.step, {"epoch": epoch + 1, "unreadable": unreadable}
                )
            if unreadable != self._unreadable:
                notify(f"epoch {epoch + 1}: {unreadable:,} unreadable images are excluded.")
            self._unreadable = unreadable

    def _hint(self, waited: float) -> str | None:
        """Return advice on reading images, unless the last step learned from cached features."""
        cached = self.schedule.is_backbone_frozen(self.learner.step - 1)
        return None if cached else data_loading_hint(waited, self.feed)

    def _curve(self, values: dict[str, float]) -> None:
        with convert_write_errors(self.run):
            self.metrics.curve(self.learner.step, values)

    def after_clustering(self, number: int, _: KMeans) -> None:
        """Show the progress of the clusterings.

        Raises:
            Interrupted: a signal asked to stop; the step before the clusterings is saved.
        """
        count = len(self.config.objective.clusters or ())
        done = number + 1
        note = f"clustering {done}/{count} done" if done < count else self._loss
        self.line.update(note=note)
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """End a run that a signal asked to stop, and whose last step is saved.

        Raises:
            Interrupted: a signal arrived.
        """
        if self.world.size > 1:
            self._agree()
        if self.should_stop:
            raise self._signals.error(
                f"Stopped after step {self.learner.step:,}; resume with"
                f" localagg pretrain --resume {self.run}"
            )

    def after_epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        """Write the measurements and diagnostics of an epoch, and print its warnings."""
        with self.timer("health", once=True):
            found, warnings = self.health.end_epoch(self.learner.bank.rows)
        step, start = self._epoch_start
        if self._deferred.last is not None:
            images = (self.learner.step - step) * len(self._deferred.last.index)
            self._curve({"images_per_second": images / (time.monotonic() - start)})
        for warning in warnings:
            notify(f"epoch {epoch + 1}: warning: {warning}.")
        with convert_write_errors(self.run):
            self.metrics.write(self.learner.step, {"epoch": epoch + 1, **found, **metrics})
        self.final = metrics or self.final
        left = (self.total_steps - self.learner.step) / max(1, self.learner.step - step)
        shown = [
            f"epoch {epoch + 1}/{self.config.epochs}",
            self._loss,
            f"spread {found['spread']:.2f}",
            *(f"{name} {value:.1%}" for name, value in metrics.items()),
            f"{duration(left * (time.monotonic() - start))} left",
        ]
        notify("  ".join(filter(None, shown)))
        if self._on_epoch is not None and self.world.rank == 0:
            self._on_epoch(epoch + 1, {**found, **metrics})
        self._epoch_start = (self.learner.step, time.monotonic())

    def seconds(self) -> float:
        """Return the seconds spent on the run, over all its resumes."""
        return self._seconds_before + time.monotonic() - self._started

    def checkpoint(self, summary: dict[str, Any] | None = None) -> None:
        """Save everything that a resumed run needs."""
        self._write(self._deferred.fetch_all())
        with self.timer("checkpoint", once=True), convert_write_errors(self.run):
            self._check_weights()
            progress = {
                "metrics_bytes": self.metrics.flushed(),
                "seconds": self.seconds(),
                "shares": self.timer.seconds,
                "final": self.final,
                "floors": self.floors,
                "health": self.health.state(),
                **self.feed.state(),
                "summary": summary,
            }
            self.learner.save(self.run, progress)
        self._saved = time.monotonic()

    def _check_weights(self) -> None:
        """Refuse to write a checkpoint from which no run can resume.

        Raises:
            UserError: a weight or a bank row is not finite.
        """
        weights = self.learner.encoder.state_dict().items()
        found = first_not_finite([*weights, ("the memory bank", self.learner.bank.rows)])
        if name := next(filter(None, self.world.gather_objects(found)), None):
            what = f"After step {self.learner.step:,} {name} is not finite"
            if self._deferred.last is None:
                raise UserError("not-finite", f"{what}; the run cannot begin; check its --start.")
            self._stop_not_finite(what, self._deferred.last)

    def finish(self, floors: dict[str, Any] | None) -> dict[str, Any]:
        """Return the summary of the run with its floors, saved with its last checkpoint."""
        shares = {part: round(share, 4) for part, share in self.timer.shares().items()}
        summary = {
            "run": str(self.run),
            "images": len(self.feed.source),
            "unreadable": len(self.feed.unreadable),
            "epochs": self.config.epochs,
            "steps": self.learner.step,
            "seconds": round(self.seconds(), 2),
            "final": self.final,
            "floors": floors,
            "shares": shares,
            "hint": self._hint(shares.get(WAITING, 0.0)),
        }
        self.checkpoint(summary)
        return summary
