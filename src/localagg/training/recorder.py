"""The record of a run while it learns: console, metrics, checkpoints, shares of time, health."""

import time
from contextlib import ExitStack
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..checkpoint import convert_write_errors, has_checkpoint, latest, write_json
from ..config import PretrainConfig
from ..data.loading.loader import Feed
from ..data.loading.loading_hint import data_loading_hint
from ..distributed.signals import handle_stop_signals
from ..engine.kmeans import KMeans
from ..errors import UserError
from ..io.console import notify, progress_bar
from ..io.metrics_log import MetricsLog, NoMetricsLog
from ..recipes.schedule import Schedule
from .deferred_metrics import Step, Watch, not_finite
from .diagnostics import Health
from .learner import Learner
from .time_shares import TimeShares

_NAMED = 8  # images in a message
WAITING = "waiting for data"  # the part of the time that is called so
# The progress of a run that begins.
START: dict[str, Any] = {"metrics_bytes": 0, "seconds": 0.0, "shares": {}, "final": {}}


class Recorder:
    """The record of a run: console, metrics, checkpoints, and where the time went.

    Of several ranks the first writes and tells; the others take part in its checkpoints.
    """

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
        self.world = learner.world
        self.due = self.heard = False
        self.last_step = schedule.total_steps
        self.shares = TimeShares(learner.device)
        self.shares.seconds = dict(progress["shares"])
        self.timed = dict(self.shares.seconds)  # when the epoch began
        self.began = (learner.step, time.monotonic())
        self.hinted = False
        self.before = progress["seconds"]
        self.final: dict[str, float] = dict(progress["final"])
        self.started = self.saved = time.monotonic()
        self.metrics = NoMetricsLog()
        if self.world.rank == 0:
            self.metrics = MetricsLog(run, keep=progress["metrics_bytes"], step=learner.step)
        self.watch = Watch()
        self.health = Health(progress.get("health"), self.world)
        self.bar = progress_bar()

    def __enter__(self) -> "Recorder":
        with ExitStack() as stack:
            stack.callback(self.metrics.close)
            stack.enter_context(self.bar)
            self.task = self.bar.add_task("learning", total=self.last_step, note="")
            self.bar.update(self.task, completed=self.learner.step)
            self.interrupt = stack.enter_context(handle_stop_signals())
            if not self.world.gather_objects(has_checkpoint(self.run))[
                0
            ]:  # rank 0's view of the disk
                self.checkpoint()
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def after_step(
        self,
        epoch: int,
        aggregating: bool,
        index: Tensor,
        loss: Tensor,
        gradient: Tensor,
        notes: dict[str, Tensor],
        *,
        ends: bool,
    ) -> None:
        """Metrics every few steps; a checkpoint when one is due.

        Not where the epoch ends: it is measured first, and a run that goes on from a checkpoint
        before that would leave the measurement out.
        """
        self._agree()
        step = self.learner.step
        facts = {
            "epoch": epoch + 1,
            "phase": "LA" if aggregating else "IR",
            "learning_rate": self.learner.optimizer.param_groups[0]["lr"],
        }
        self.watch.put(step, facts, index, {"loss": loss, **notes}, gradient)
        if ends:
            self._look(self.watch.finish())
            self._end_of_epoch(epoch)
        elif step % self.config.log_every == 0:
            self._look(self.watch.begin())
        self.bar.update(self.task, completed=step)
        if not ends and self.due:
            self.checkpoint()

    @property
    def asked(self) -> bool:
        """Whether the loop is to stop after this step: on all ranks alike."""
        return self.interrupt.requested if self.world.size == 1 else self.heard

    def _agree(self) -> None:
        """All ranks learn of a signal to any, and whether rank 0 finds a checkpoint due. One
        all-reduce of two numbers."""
        self.due = time.monotonic() - self.saved >= self.config.checkpoint_seconds
        if self.world.size > 1:
            due = int(self.due and self.world.rank == 0)
            status, due = self.world.maximum(torch.tensor([self.interrupt.status, due])).tolist()
            self.due, self.heard = bool(due), bool(status)
            self.interrupt.status = self.interrupt.status or status  # one may come meanwhile

    def _look(self, steps: list[Step]) -> None:
        """What has come from steps: their lines, and the sums of the epoch.

        Raises:
            UserError: a loss or gradient among them is not finite.
        """
        for step in steps:
            if not step.finite:
                loss = step.values["loss"]
                what = "gradient of the loss is not finite" if isfinite(loss) else f"loss is {loss}"
                self._stop(f"The {what} at step {step.number:,}", step)
            self.health.add(step.values)
            if step.number % self.config.log_every and step.number != self.last_step:
                continue
            rate = {"learning_rate": step.facts["learning_rate"]}
            with convert_write_errors(self.run):
                self.metrics.write(step.number, step.facts | step.values | rate)
            note = f"{step.facts['phase']} loss {step.values['loss']:.3f}"
            if "without_close" in step.values:
                note += f", {step.values['without_close']:.0%} without a close neighbor"
            self.bar.update(self.task, description=f"epoch {step.facts['epoch']}", note=note)

    def _stop(self, what: str, step: Step) -> NoReturn:
        """Name the images of a step that went wrong, and the checkpoint before it.

        Raises:
            UserError: always.
        """
        file, index = self.run / "not-finite.json", step.index.tolist()
        good = latest(self.run)
        facts = {"step": step.number, **step.facts, **step.values, "index": index}
        if self.world.rank == 0:
            with convert_write_errors(self.run):
                write_json(file, {**facts, "checkpoint": str(good)})
        named = ", ".join(map(str, index[:_NAMED]))
        raise UserError(
            "TODO",
            f"{what} (images {named}{', ...' if len(index) > _NAMED else ''}; all are in '{file}')."
            f" The last good checkpoint is '{good}'; begin a new run with a lower --learning-rate,"
            " or with --precision 32-true.",
        )

    def _end_of_epoch(self, epoch: int) -> None:
        """How long data were waited for (with a hint, once a session), and the unreadable images.

        The waiting is a curve of TensorBoard and no line of metrics.jsonl, where the machine does
        not show.
        """
        spent = {part: s - self.timed.get(part, 0.0) for part, s in self.shares.seconds.items()}
        self.timed = dict(self.shares.seconds)
        if whole := sum(spent.values()):  # on CUDA a short epoch may have no step that was timed
            share = spent.get(WAITING, 0.0) / whole
            self._curve({"waiting_for_data": share})
            hint = data_loading_hint(share, self.feed)
            if hint and not self.hinted:
                notify(f"epoch {epoch + 1}: {hint}")
                self.hinted = True
        self.feed.agree()
        if unreadable := len(self.feed.unreadable):
            with convert_write_errors(self.run):
                self.metrics.write(
                    self.learner.step, {"epoch": epoch + 1, "unreadable": unreadable}
                )
            notify(f"epoch {epoch + 1}: {unreadable:,} unreadable images are drawn no more.")

    def _curve(self, values: dict[str, float]) -> None:
        with convert_write_errors(self.run):
            self.metrics.curve(self.learner.step, values)

    def after_clustering(self, number: int, found: KMeans) -> None:
        """Show how far the clusterings are.

        Raises:
            Interrupted: the run is to stop; the step before the clusterings has been saved.
        """
        of = len(self.config.objective.clusters or ())
        self.bar.update(self.task, note=f"clustering {number + 1}/{of} done")
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """End a run that was asked to stop, and whose last step is saved.

        Raises:
            Interrupted: it was.
        """
        if self.world.size > 1:
            self._agree()
        if self.asked:
            raise self.interrupt.error(
                f"Stopped after step {self.learner.step:,}; go on with"
                f" localagg pretrain --resume {self.run}"
            )

    def after_epoch(self, epoch: int, measured: dict[str, float]) -> None:
        """A line of measurements, and of the epoch's health with what is wrong with it."""
        with self.shares("health", once=True):
            found, news = self.health.end_epoch(self.learner.bank.rows)
        step, start = self.began
        if self.watch.last is not None:
            images = (self.learner.step - step) * len(self.watch.last.index)
            self._curve({"images_per_second": images / (time.monotonic() - start)})
        for warning in news:
            notify(f"epoch {epoch + 1}: warning: {warning}.")
        with convert_write_errors(self.run):
            self.metrics.write(self.learner.step, {"epoch": epoch + 1, **found, **measured})
        if measured:
            self.final = measured
            shown = ", ".join(f"{name} {value:.1%}" for name, value in measured.items())
            notify(f"epoch {epoch + 1}/{self.config.epochs}: {shown}")
        self.began = (self.learner.step, time.monotonic())

    def seconds(self) -> float:
        """Spent on the run so far, over all its resumes."""
        return self.before + time.monotonic() - self.started

    def checkpoint(self, summary: dict[str, Any] | None = None) -> None:
        """Save everything that :meth:`Learner.restore` and this class need to go on."""
        self._look(self.watch.finish())
        with self.shares("checkpoint", once=True), convert_write_errors(self.run):
            self._check_weights()
            self.learner.save(
                self.run,
                {
                    "metrics_bytes": self.metrics.flushed(),
                    "seconds": self.seconds(),
                    "shares": self.shares.seconds,
                    "final": self.final,
                    "health": self.health.state(),
                    **self.feed.state(),
                    "summary": summary,
                },
            )
        self.saved = time.monotonic()

    def _check_weights(self) -> None:
        """Never write a checkpoint that cannot be gone on with.

        Raises:
            UserError: a weight or a bank row is not finite.
        """
        encoder, rows = self.learner.encoder, self.learner.bank.rows
        found = not_finite([*encoder.state_dict().items(), ("the memory bank", rows)])
        if name := next(filter(None, self.world.gather_objects(found)), None):
            what = f"After step {self.learner.step:,} {name} is not finite"
            if self.watch.last is None:
                raise UserError("TODO", f"{what}; the run cannot begin so.")
            self._stop(what, self.watch.last)

    def finish(self) -> dict[str, Any]:
        """The summary of the run, saved with its last checkpoint."""
        shares = {part: round(share, 4) for part, share in self.shares.shares().items()}
        summary = {
            "run": str(self.run),
            "images": len(self.feed.source),
            "unreadable": len(self.feed.unreadable),
            "epochs": self.config.epochs,
            "steps": self.learner.step,
            "seconds": round(self.seconds(), 2),
            "final": self.final,
            "shares": shares,
            "hint": data_loading_hint(shares.get(WAITING, 0.0), self.feed),
        }
        self.checkpoint(summary)
        return summary
