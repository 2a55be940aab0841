"""Begin and resume runs: settings, data, network and first state, then the loop.

Precedence of settings: an option set by hand, then the recipe's, then the rule that derives the
rest from the images (``recipes.derived_settings``). A resumed run takes all from its folder.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from .. import checkpoint
from ..config import PretrainConfig, check_argument_types, check_names, require_resolved
from ..data.images.image_dataset import open_data
from ..data.images.samples import with_measured_range
from ..data.loading.own_views import Transform
from ..data.loading.scan import typical_side
from ..data.sources.open import check_outside, report_unread
from ..data.sources.source import Source
from ..distributed.collectives import World
from ..distributed.process_group import RANK_TIMEOUT, join_process_group
from ..errors import UserError, counted
from ..evaluation.online_knn import OnlineKnn
from ..evaluation.run_floors import RunFloors
from ..io.console import notify
from ..io.loggers import check_logger
from ..io.metrics_log import MetricsCallback
from ..recipes.derived_settings import explain_defaults, resolve_defaults
from ..recipes.schedule import check_aggregates
from .budget import fit_budget
from .continue_run import prolong, save_contents, settings_of_start
from .frozen.frozen_features import check_size
from .learner import Learner
from .loop import train
from .own_parts import OwnParts
from .recorder import START, Callbacks
from .run_setup import (
    check_network,
    check_ranks,
    check_start_weights,
    continue_settings,
    load_start_weights,
    lock_run_for_all,
    open_features,
    open_feed,
    set_first_state,
)


@check_argument_types
def pretrain(
    config: PretrainConfig,
    data: Any,
    out: str | Path,
    *,
    start: str | Path | None = None,
    typed: Iterable[str] = (),
    backbone: nn.Module | None = None,
    views: Transform | None = None,
    on_epoch: MetricsCallback | None = None,
    on_metrics: MetricsCallback | None = None,
    logger: str | None = None,
    rank_timeout: float = RANK_TIMEOUT,
) -> dict[str, Any]:
    """Learn an embedding of images without labels: IR, then LA (LA section 3).

    Only the nearest-neighbor measurements use labels. Processes started by torchrun or srun learn
    together; each calls this function. The result does not depend on their number, up to the order
    of sums, and batch-norm unless it is synchronized.

    Args:
        config: settings; those that are None are derived from the images.
        data: data URI; or images: a list of files, bytes, PIL images, arrays or tensors, an array
            uint8 [N, H, W, 3], or a torch ``Dataset`` (see :func:`.as_source`).
        out: the run folder to make.
        start: a finished run to continue: its weights, bank and momentum are loaded and its epochs
            count. After IR alone LA begins after ``ir_epochs``, or at once if these have passed, as
            in the reference's LA runs. After LA it keeps its own settings, except those set
            here. The images may differ; see :func:`.restore_start`. Or a weights file that
            ``import-tf --bank`` wrote: it continues from its step, on the same images.
        typed: names of options in ``config`` that ``minutes`` keeps, even if they equal a default.
        backbone: a network in place of the configuration's: returns [B, C] or [B, C, H, W] of
            normalized images [B, 3, S, S]. It is trained in place, from the weights that it has.
        views: makes a random view [3, S, S] of an image uint8 [3, H, W], in place of the
            configuration's views, for example a transform of torchvision.transforms.v2. It returns
            uint8, or floats in 0-1 that are not normalized, and draws by torch's generator, which
            is seeded for each view. Measurements use ``config.views``.
        on_epoch: called as ``on_epoch(epoch, metrics)`` after each epoch, by the first process. An
            exception ends the run, which resumes from its last checkpoint.
        on_metrics: called as ``on_metrics(step, values)`` with each line of metrics.jsonl.
        logger: csv, wandb or mlflow: also send metrics there. TensorBoard's file is always written.
        rank_timeout: seconds of silence of one process after which all end.

    Returns:
        {"run", "images", "unreadable", "epochs", "steps", "seconds", "final": {metric: value},
        "floors": as :func:`.measure_floors`, or None with ``eval_every=0``, "shares": {part of the
        time: 0-1}, "hint": advice that reduces its waiting, or None}.

    Raises:
        UserError: options, data and folder do not fit together; a process died.
        Interrupted: Ctrl-C or a signal to stop; a checkpoint was written.
        ReportedElsewhere: another process already reported either of them.
    """
    check_logger(logger)
    check_names(config, typed := frozenset(typed))
    run, own = Path(out), OwnParts(backbone, views)
    callbacks = Callbacks(on_epoch, on_metrics, logger)
    start = None if start is None else Path(start)
    with join_process_group(rank_timeout, _how_to_resume(run)) as world:
        return _begin(run, config, data, start, typed, own, callbacks, world)


def _begin(
    run: Path,
    config: PretrainConfig,
    data: Any,
    start: Path | None,
    typed: frozenset[str],
    own: OwnParts,
    callbacks: Callbacks,
    world: World,
) -> dict[str, Any]:
    if world.rank == 0:
        checkpoint.check_new(run)
    check_start_weights(config, start)
    source, place = world.rank_zero_first(lambda: open_data(data))
    if world.rank == 0:
        check_outside(place, run, "--out")
        if config.adapt.cache is not None:
            check_outside(place, config.adapt.cache, "--cache")
        report_unread(place)
    fingerprint = source.fingerprint()
    if start is not None:
        config = settings_of_start(config, start, source, typed)
    config = replace(config, views=with_measured_range(config.views, source))
    config = own.configure(config, source)
    fitted = world.rank_zero_first(
        lambda: fit_budget(config, source, typed, world.size) if world.rank == 0 else None
    )
    config = world.gather_objects(fitted)[0]
    resolved = resolve_defaults(config, len(source), typical_side(source, config.views))
    check_ranks(resolved, world)
    check_aggregates(resolved, len(source))
    for line in explain_defaults(config, resolved, len(source)):
        notify(line)
    learner = Learner(resolved, len(source), world, own.backbone)
    load_start_weights(learner.encoder, resolved, world)
    check_network(learner)
    check_size(learner.encoder, resolved, len(source))
    feed = open_feed(source, resolved, world, transform=own.views)
    evaluate = OnlineKnn(resolved, place, source, feed.valid, world=world)
    floors = RunFloors(run, resolved, place, feed, world)
    facts = {"data": place, "fingerprint": fingerprint, "size": len(source)}
    facts |= own.facts(source, learner.encoder, resolved)
    if start is not None:
        facts["start"] = str(start)
    with lock_run_for_all(run, world):
        if world.rank == 0:
            checkpoint.check_new(run)  # again: another process may have begun it meanwhile
            checkpoint.begin_run(run, resolved, facts)
            save_contents(run, source)
        features = set_first_state(learner, feed, facts)
        return train(run, feed, features, learner, evaluate, floors, START, callbacks)


@check_argument_types
def resume(
    out: str | Path,
    config: PretrainConfig | None = None,
    *,
    data: Any = None,
    typed: Iterable[str] = (),
    backbone: nn.Module | None = None,
    views: Transform | None = None,
    on_epoch: MetricsCallback | None = None,
    on_metrics: MetricsCallback | None = None,
    logger: str | None = None,
    rank_timeout: float = RANK_TIMEOUT,
) -> dict[str, Any]:
    """Continue a run from its newest checkpoint, to the same end as a run that never stopped.

    The number of processes may change: the result is the same up to the order of sums, and
    batch-norm.

    Args:
        out: the run folder.
        config: options set now; only workers, device, compile and unreadable may differ, and epochs
            may grow (with drops), which prolongs the run; see :func:`.prolong`.
        data: another place of the same images. Default: the place in the run folder. Images that
            were given in Python are given again.
        typed: names of the options in ``config`` that were set now.
        backbone, views: those that the run began with.
        on_epoch, on_metrics, logger, rank_timeout: see :func:`pretrain`.

    Returns:
        As :func:`pretrain`; for a finished run, its earlier result.

    Raises:
        UserError: not a run, other options, other images, or a damaged checkpoint; a process died.
        Interrupted: Ctrl-C or a signal to stop; a checkpoint was written.
        ReportedElsewhere: another process already reported either of them.
    """
    check_logger(logger)
    run, typed = Path(out), frozenset(typed)
    check_names(config, typed)
    own, callbacks = OwnParts(backbone, views), Callbacks(on_epoch, on_metrics, logger)
    with join_process_group(rank_timeout, _how_to_resume(run)) as world:
        stored, facts = checkpoint.read_run(run)
        settings = continue_settings(run, stored, config, typed, facts["removed"])
        own.check_given(run, facts)
        source, place = world.rank_zero_first(lambda: _open_again(run, facts, data))
        check_ranks(settings, world)
        epochs = config.epochs if config is not None and "epochs" in typed else None
        if prolonged := epochs not in (None, stored.epochs):
            drops = config.drops if config is not None and "drops" in typed else None
            settings = prolong(settings, require_resolved(epochs), drops, source, run)
        with lock_run_for_all(run, world):
            moved = data is not None and place != facts["data"]
            if (prolonged or moved) and world.rank == 0:
                kept = {name: value for name, value in facts.items() if name != "removed"}
                noted = settings if prolonged else stored
                checkpoint.begin_run(run, noted, {**kept, "data": place})
            return _continue(run, settings, facts, source, place, own, callbacks, world)


def _continue(
    run: Path,
    config: PretrainConfig,
    facts: dict[str, Any],
    source: Source,
    place: str,
    own: OwnParts,
    callbacks: Callbacks,
    world: World,
) -> dict[str, Any]:
    newest = checkpoint.latest(run) if checkpoint.has_checkpoint(run) else None
    newest = world.gather_objects(newest)[0]  # rank 0's view of the disk
    progress = START if newest is None else checkpoint.read_progress(newest)
    summary = progress.get("summary")
    asked = require_resolved(config.epochs)
    if summary and summary["epochs"] >= asked:
        notify(f"'{run}' has already finished its {counted(asked, 'epoch')}.")
        return {**summary, "run": str(run)}  # which may have been renamed
    feed = open_feed(source, config, world, progress, own.views)
    learner = Learner(config, len(source), world, own.backbone)
    if newest is None:  # killed before its first checkpoint
        notify(f"'{run}' has no checkpoint; it begins anew.")
        if world.rank == 0:
            save_contents(run, source)  # the kill may have come before
        load_start_weights(learner.encoder, config, world)
    own.check_same(facts, source, learner, values=newest is None)
    evaluate = OnlineKnn(config, place, source, feed.valid, world=world)
    floors = RunFloors(run, config, place, feed, world)
    if newest is None:
        features = set_first_state(learner, feed, facts)
    else:
        learner.restore(newest)
        features = open_features(learner, feed)
        notify(f"Resuming '{run}' after step {learner.step:,}.")
    return train(run, feed, features, learner, evaluate, floors, progress, callbacks)


def _open_again(run: Path, facts: dict[str, Any], data: Any) -> tuple[Source, str]:
    """Open the images that a run noted, or the same ones at another place."""
    try:
        source, place = open_data(facts["data"] if data is None else data)
    except UserError as error:
        if data is not None:
            raise
        raise UserError(
            error.code,
            f"The images of '{run}' cannot be opened: {error} If they moved, name their place with"
            " --data.",
        ) from None
    if source.fingerprint() != facts["fingerprint"]:
        raise UserError(
            "mismatch",
            f"'{place}' ({len(source):,} images) differs from the images of '{run}'"
            f" ({facts['size']:,} images); start a new run with another --out.",
        )
    return source, place


def _how_to_resume(run: Path) -> str:
    return f"resume with localagg pretrain --resume {run}"
