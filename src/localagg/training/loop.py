"""The training loop: IR for the first epochs, then LA. One straight function, sections in order.

The path of a batch begins in ``data.loading`` and continues in ``step.take_step``.
"""

from functools import partial
from pathlib import Path
from typing import Any

from ..data.images.augment import Augment
from ..data.loading.loader import Feed, on_device
from ..data.loading.workers import convert_worker_death
from ..engine.search import missing_backend_note
from ..evaluation.online_knn import OnlineKnn
from ..evaluation.run_floors import RunFloors
from ..io.console import notify, show_progress
from ..recipes.schedule import Schedule
from .frozen.frozen_features import FrozenFeatures
from .frozen.trained_part import write_final_embeddings
from .learner import Learner
from .recorder import START, WAITING, Callbacks, Recorder
from .step import take_step, unused_precision_note


def train(
    run: Path,
    feed: Feed,
    features: FrozenFeatures | None,
    learner: Learner,
    evaluate: OnlineKnn,
    floors: RunFloors,
    progress: dict[str, Any],
    callbacks: Callbacks,
) -> dict[str, Any]:
    """Train to the end of the schedule; on ``features`` while the backbone is frozen."""
    config = learner.config
    augment = Augment(config.views, config.seed, cropped=feed.cropped)
    schedule = Schedule(config, len(feed.valid))
    recorder = Recorder(config, run, feed, learner, schedule, progress, callbacks)
    step = partial(take_step, learner, augment, timer=recorder.timer)
    _notify_slow_parts(learner, schedule)
    if progress is START and config.eval_every:  # before the first checkpoint, which keeps them
        _measure_start(learner, features, floors, recorder)

    with convert_worker_death(), recorder:
        while learner.step < schedule.total_steps:
            # --- Clusters: when LA starts, and at each of its epochs ---
            epoch, first, aggregating = schedule.position(learner.step)
            if schedule.should_cluster(learner.step, has_labels=learner.labels is not None):
                before = learner.labels
                with recorder.timer("clustering", once=True):
                    learner.recluster(recorder.after_clustering)
                    recorder.health.record_clusters(learner.labels, before)

            # --- Steps to the end of the epoch ---
            size = schedule.batch_size(aggregating=aggregating)
            if features is not None and schedule.is_backbone_frozen(learner.step):
                loaded = features.batches(feed, epoch, first, size)
            else:
                loaded = feed.batches(epoch, first, size)
            batches = on_device(loaded, learner.device)
            end = schedule.end_of_epoch(learner.step)
            while learner.step < end and not recorder.should_stop:
                recorder.timer.next_step()
                with recorder.timer(WAITING):
                    batch = next(batches)
                rate = schedule.learning_rate(learner.step)
                result = step(batch, epoch, aggregating=aggregating, size=size, learning_rate=rate)
                recorder.after_step(epoch, aggregating, result, ends=learner.step == end)

            # --- Measurements, checkpoint ---
            if learner.step == end:
                metrics = {}
                if schedule.should_evaluate(epoch):
                    with recorder.timer("measuring", once=True):
                        metrics = evaluate(learner.encoder, learner.bank.rows, learner.fabric)
                recorder.after_epoch(epoch, metrics)
            recorder.checkpoint()
            if learner.step < schedule.total_steps:
                recorder.stop_if_asked()

        # --- The end: floors, summary, table ---
        head_only = features if schedule.network_start >= schedule.total_steps else None
        return _finish(run, feed, head_only, learner, floors, recorder)


def _notify_slow_parts(learner: Learner, schedule: Schedule) -> None:
    aggregates = schedule.total_steps > schedule.la_start
    if aggregates and (note := missing_backend_note(learner.bank.rows)):
        notify(note)
    if note := unused_precision_note(learner):
        notify(note)


def _measure_start(
    learner: Learner, features: FrozenFeatures | None, floors: RunFloors, recorder: Recorder
) -> None:
    timer = recorder.timer("measuring", once=True)
    with convert_worker_death(), timer, show_progress("measuring floors") as show:
        recorder.floors = floors.measure_start(
            learner.encoder, learner.fabric.autocast, show, features and features.pair
        )


def _finish(
    run: Path,
    feed: Feed,
    head_only: FrozenFeatures | None,
    learner: Learner,
    floors: RunFloors,
    recorder: Recorder,
) -> dict[str, Any]:
    """Return the summary; without a trained backbone the embeddings are at hand, too."""
    encoder, fabric = learner.encoder, learner.fabric
    if learner.config.eval_every:
        recorder.line.update(note="measuring")
        with recorder.timer("measuring", once=True):
            recorder.floors |= floors.measure_end(
                encoder, fabric.autocast, recorder.floors, head_only and head_only.pair
            )
    summary = recorder.finish(floors.summary(recorder.floors))
    if head_only and feed.world.rank == 0:
        write_final_embeddings(run, encoder, head_only, feed.valid, fabric)
    return summary
