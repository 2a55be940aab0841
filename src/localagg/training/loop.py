"""The training loop: IR for the warm-up epochs, then LA. One straight function, sections in order.

Precedence of settings: an option set by hand, then the recipe's, then the rule that derives the
rest from the images (``sizing.resolve``). A resumed run takes all of them from its folder.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint
from ..config import PretrainConfig, flag, option_value, override, require_resolved
from ..data.images.augment import Augment
from ..data.loading.loader import Feed, on_device
from ..data.loading.scan import typical_side
from ..data.loading.workers import convert_worker_death
from ..data.sources.open import Source, open_images
from ..distributed.collectives import World
from ..distributed.process_group import RANK_TIMEOUT, join_process_group
from ..errors import UserError
from ..evaluation.online_knn import OnlineKnn
from ..io.console import notify, show_progress
from ..io.run_lock import lock_run
from ..recipes.defaults import explain_defaults, resolve_defaults
from ..recipes.schedule import Schedule
from . import sharded
from .learner import Learner
from .neighbors import missing_backend_note
from .recorder import START, WAITING, Recorder
from .step import score


def pretrain(
    config: PretrainConfig,
    data: str,
    out: str | Path,
    *,
    start: str | Path | None = None,
    rank_timeout: float = RANK_TIMEOUT,
) -> dict[str, Any]:
    """Learn an embedding of images without labels: IR, then LA (LA section 3).

    Labels, where the data have them, are used by the nearest-neighbor measurements alone.

    Processes that torchrun or srun has started learn together; all call this. The result does not
    depend on their number, but for the order of sums, and for batch-norm unless that is
    synchronized.

    Args:
        config: what to do; what it leaves None is derived from the images.
        data: data URI.
        out: the run folder to make.
        start: a finished run of IR on the same images to go on from: its weights, bank and
            momentum are taken over and its epochs count, as in the reference's LA runs. LA begins
            after ``ir_epochs``, or at once where these are behind it.
        rank_timeout: seconds after which a process that is silent ends all.

    Returns:
        {"run", "images", "unreadable", "epochs", "steps", "seconds", "final": {metric: value},
        "shares": {part of the time: 0-1}, "hint": what would shorten its waiting, or None}.

    Raises:
        UserError: options, data and folder do not go together; a process has died.
        Interrupted: Ctrl-C, SIGTERM or SIGUSR1; a checkpoint has been written.
        Elsewhere: either of them, which another process tells.
    """
    run = Path(out)
    with join_process_group(rank_timeout, _way_out(run)) as world:
        if world.rank == 0:
            checkpoint.check_new(run)
        source = world.rank_zero_first(lambda: open_images(data))
        fingerprint = source.fingerprint()
        if start is not None:
            config = _continuing(config, Path(start), fingerprint)
        resolved = resolve_defaults(config, len(source), typical_side(source))
        _check_ranks(resolved, world)
        for line in explain_defaults(config, resolved, len(source)):
            notify(line)
        feed = _feed(source, resolved, world)
        learner = Learner(resolved, len(source), world)
        measurement = OnlineKnn(resolved, data, source, feed.valid, world=world)
        facts = {"data": data, "fingerprint": fingerprint, "size": len(source)}
        if start is not None:
            facts["start"] = str(start)
        with _held(run, world):
            if world.rank == 0:
                checkpoint.check_new(run)  # once more: another may have begun it meanwhile
                checkpoint.begin_run(run, resolved, facts)
            _begin(learner, feed, facts)
            return _learn(run, feed, learner, measurement, START)


def resume(
    out: str | Path,
    config: PretrainConfig | None = None,
    *,
    data: str | None = None,
    typed: Iterable[str] = (),
    rank_timeout: float = RANK_TIMEOUT,
) -> dict[str, Any]:
    """Go on with a run from its newest checkpoint; the end is that of a run never stopped.

    Another number of processes than before may go on: up to the order of sums, and batch-norm.

    Args:
        out: the run folder.
        config: options set now; all but workers and device must be the run's own.
        data: another place of the same images. None: where the run found them.
        typed: names of the options in ``config`` that were set now.
        rank_timeout: as of :func:`pretrain`.

    Returns:
        As :func:`pretrain`; of a finished run, what it returned then.

    Raises:
        UserError: not a run, other options, other images, or a damaged checkpoint; a process has
            died.
        Interrupted: Ctrl-C, SIGTERM or SIGUSR1; a checkpoint has been written.
        Elsewhere: either of them, which another process tells.
    """
    run = Path(out)
    with join_process_group(rank_timeout, _way_out(run)) as world:
        stored, facts = checkpoint.read_run(run)
        for name in typed:
            now, then = option_value(config, name), option_value(stored, name)
            if name in _FREE:
                stored = override(stored, **{name: now})
            elif now != then:
                raise UserError(
                    "TODO",
                    f"'{run}' runs with {flag(name)} {then}, not {now}; a resumed run keeps its"
                    " options. Leave it out, or start a new run with another --out.",
                )
        place = data or str(facts["data"])
        source = world.rank_zero_first(lambda: open_images(place))
        if source.fingerprint() != facts["fingerprint"]:
            raise UserError(
                "TODO",
                f"'{place}' ({len(source):,} images) is not what '{run}' has learned from"
                f" ({facts['size']:,} images); start a new run with another --out.",
            )
        _check_ranks(stored, world)
        with _held(run, world):
            return _go_on(run, stored, place, source, facts, world)


def _go_on(
    run: Path,
    config: PretrainConfig,
    data: str,
    source: Source,
    facts: dict[str, Any],
    world: World,
) -> dict[str, Any]:
    """From the newest checkpoint; from the beginning where the run was killed before its first."""
    newest = checkpoint.latest(run) if checkpoint.has_checkpoint(run) else None
    newest = world.gather_objects(newest)[0]  # rank 0's view of the disk
    progress = START if newest is None else checkpoint.read_progress(newest)
    if summary := progress.get("summary"):
        notify(f"'{run}' has finished its {config.epochs} epochs; there is nothing to go on with.")
        return summary
    feed = _feed(source, config, world, progress)
    learner = Learner(config, len(source), world)
    measurement = OnlineKnn(config, data, source, feed.valid, world=world)
    if newest is None:
        _begin(learner, feed, facts)
    else:
        learner.restore(newest)
    notify(f"Going on with '{run}' after step {learner.step:,}.")
    return _learn(run, feed, learner, measurement, progress)


def _way_out(run: Path) -> str:
    return f"go on with localagg pretrain --resume {run}"


@contextlib.contextmanager
def _held(run: Path, world: World) -> Iterator[None]:
    """The lock of the run, which rank 0 holds for all."""
    with lock_run(run) if world.rank == 0 else contextlib.nullcontext():
        world.barrier()
        yield


def _check_ranks(config: PretrainConfig, world: World) -> None:
    """Refuse what several processes cannot do.

    Raises:
        UserError: one of these.
    """
    if world.size == 1:
        return
    many, objective = f"{world.size} processes", config.objective
    smallest = min(size for size in (config.batch_size, config.ir_batch_size) if size)
    if smallest < world.size:
        raise UserError("TODO", f"A batch of {smallest} cannot be shared out to {many}; use fewer.")
    if objective.kmeans == "faiss":
        raise UserError(
            "TODO", f"--kmeans faiss cannot cluster over {many}; use --kmeans lloyd or auto."
        )
    if objective.recluster_delay:
        raise UserError("TODO", f"--recluster-delay is of one process; with {many} leave it out.")


def _begin(learner: Learner, feed: Feed, facts: dict[str, Any]) -> None:
    """The state that a run begins with: its ``start``'s, or a bank of first embeddings."""
    if "start" in facts:
        learner.restore(checkpoint.latest(Path(facts["start"])))
    elif learner.config.objective.bank_start == "embedding":
        learner.embed_bank(feed.source, feed.pixels)


def _continuing(config: PretrainConfig, start: Path, fingerprint: str) -> PretrainConfig:
    """The configuration of a run that goes on from a finished run of IR.

    Raises:
        UserError: not such a run, or one of other images or of another network.
    """
    before, facts = checkpoint.read_run(start)
    if before.ir_epochs != before.epochs:
        raise UserError("TODO", f"--start '{start}' has run LA already; name a run of IR alone.")
    if checkpoint.read_progress(checkpoint.latest(start))["summary"] is None:
        raise UserError(
            "TODO", f"--start '{start}' is not finished; go on with --resume {start} first."
        )
    if facts["fingerprint"] != fingerprint:
        raise UserError(
            "TODO", f"--start '{start}' has learned from other images ({facts['size']:,} of them)."
        )
    model = config.encoder.model
    if model is not None and config.encoder != before.encoder:
        raise UserError(
            "TODO",
            f"--start '{start}' trained {before.encoder.model} with options that this run does not"
            f" share ({model} is asked for); leave out the network's options.",
        )
    return replace(
        config,
        encoder=before.encoder,
        ir_epochs=max(config.ir_epochs or 0, require_resolved(before.ir_epochs)),
        ir_batch_size=before.ir_batch_size or before.batch_size,
    )


_FREE = ("workers", "device", "compile", "unreadable")  # what a resumed run may change


def _feed(
    source: Source, config: PretrainConfig, world: World, progress: dict[str, Any] | None = None
) -> Feed:
    """The batches; with the progress of a run that goes on, those that it would have drawn."""
    before = progress if progress and "left_out" in progress else None
    with show_progress("reading images") as show:
        feed = Feed(
            source,
            config.views,
            batch_size=require_resolved(config.batch_size),
            seed=config.seed,
            workers=config.workers,
            memory=config.memory,
            memory_gb=config.memory_gb,
            unreadable=config.unreadable,
            device=config.device,
            on_progress=show,
            before=before,
            world=world,
        )
    feed.check_batch_size(config.ir_batch_size or 0, "ir_batch_size")
    if feed.unreadable:
        notify(f"{len(feed.unreadable):,} unreadable images are left out.")
    return feed


def _learn(
    run: Path, feed: Feed, learner: Learner, measurement: OnlineKnn, progress: dict[str, Any]
) -> dict[str, Any]:
    """The loop. It reads from top to bottom as a batch of images travels: this rank's share of it
    up to the network, and all of it from there to the bank, of which this rank has some rows."""
    config, bank, device = learner.config, learner.bank, learner.device
    momentum = config.objective.bank_momentum
    augment = Augment(config.views, config.seed, cropped=feed.cropped)
    schedule = Schedule(config, len(feed.valid))
    book = Recorder(config, run, feed, learner, schedule, progress)
    if schedule.total_steps > schedule.la_start and (note := missing_backend_note(bank.rows)):
        notify(note)

    with convert_worker_death(), book:
        while learner.step < schedule.total_steps:
            epoch, first, aggregating = schedule.position(learner.step)
            if schedule.should_cluster(learner.step, has_labels=learner.labels is not None):
                with _new_labels(book):
                    learner.recluster(book.after_clustering)

            size = schedule.batch_size(aggregating=aggregating)
            batches = on_device(feed.batches(epoch, first, size), device)
            end = schedule.end_of_epoch(learner.step)
            for _ in range(learner.step, end):
                book.shares.next_step()
                if learner.labels_due:
                    with _new_labels(book):
                        learner.take_labels()
                with book.shares(WAITING):
                    index, images, uniforms = next(batches)
                with book.shares("augmentation"):
                    views = augment(images, epoch, index, uniforms)
                with book.shares("network"):
                    embedding = learner.network(views.contiguous(memory_format=torch.channels_last))
                with book.shares("loss engine"):
                    index = index.to(device, non_blocking=True)
                    batch = sharded.gather(learner.world, embedding, index, size)
                    loss, gradient, notes = score(learner, batch, aggregating)
                with book.shares("network"):
                    _set_rate(learner, schedule)
                    learner.fabric.backward(embedding, gradient=gradient)
                    gradient = learner.share_gradients(gradient)
                    learner.optimizer.step()
                    learner.optimizer.zero_grad()
                with book.shares("bank"):
                    bank.update(batch.index, batch.embedding, momentum=momentum)
                learner.step += 1
                ends = learner.step == end
                book.after_step(epoch, aggregating, batch.index, loss, gradient, notes, ends=ends)
                if book.asked:
                    break
            if learner.step == end:
                measured = {}
                if schedule.should_evaluate(epoch):
                    with book.shares("measuring", once=True):
                        measured = measurement(learner.encoder, bank.rows, learner.fabric)
                book.after_epoch(epoch, measured)
            book.checkpoint()
            if learner.step < schedule.total_steps:
                book.stop_if_asked()
        return book.finish()


@contextlib.contextmanager
def _new_labels(book: Recorder) -> Iterator[None]:
    """Labels may change inside: their time, and their health if they have."""
    before = book.learner.labels
    with book.shares("clustering", once=True):
        yield
        if book.learner.labels is not before:
            book.health.clustered(require_resolved(book.learner.labels), before)


def _set_rate(learner: Learner, schedule: Schedule) -> None:
    for group in learner.optimizer.param_groups:
        group["lr"] = schedule.learning_rate(learner.step)
