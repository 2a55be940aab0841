"""Prepare a run before its first step: settings, checks of several ranks, batches, first state."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..config import PretrainConfig, flag, option_value, override, require_resolved
from ..data.loading.loader import Feed
from ..data.loading.own_views import Transform
from ..data.sources.open import Source
from ..distributed.batch_norm import per_rank_batch_norm
from ..distributed.collectives import World
from ..errors import UserError, first_line
from ..io.console import notify, show_progress
from ..io.run_lock import lock_run
from ..models import Encoder, load_weights
from ..recipes.schedule import Schedule
from .continue_run import restore_start
from .frozen.frozen_features import FrozenFeatures, frozen_features
from .frozen.trained_part import start_from_features
from .learner import Learner

_FREE = ("workers", "device", "compile", "unreadable")  # what a resumed run may change


def continue_settings(
    run: Path,
    stored: PretrainConfig,
    now: PretrainConfig | None,
    typed: Iterable[str],
    removed: dict[str, Any],
) -> PretrainConfig:
    """Return the settings of a resumed run: its own, with those replaced that may change.

    Epochs, and drops with them, are left to :func:`.prolong`.

    Args:
        run: its folder.
        stored: its settings.
        now: the settings that the user gave.
        typed: names of the options in ``now`` that the user set.
        removed: options of earlier versions that the run changed.

    Raises:
        UserError: an option that a resumed run keeps, or that this version no longer has.
    """
    for name, value in removed.items():
        raise UserError(
            "unsupported",
            f"'{run}' runs with {flag(name)} {value}, which this version no longer has; resume it"
            " with the version that began it, or start a new run with another --out.",
        )
    typed = set(typed) - {"epochs"} - ({"drops"} if "epochs" in typed else set())
    for name in typed:
        value, before = option_value(now, name), option_value(stored, name)
        if name in _FREE:
            stored = override(stored, **{name: value})
        elif value != before:
            raise UserError(
                "mismatch",
                f"'{run}' runs with {flag(name)} {before}, not {value}; a resumed run keeps its"
                " options. Remove the option, or start a new run with another --out.",
            )
    return stored


def check_start_weights(config: PretrainConfig, start: str | Path | None) -> None:
    """Check that a run that should start from weights does so.

    Raises:
        UserError: a network of timm that names weights, or features of a frozen network, without
            --weights; or both --start and --weights.
    """
    model, weights = config.encoder.model or "", config.encoder.weights
    if start is not None and weights is not None:
        raise UserError(
            "option-conflict",
            f"--start '{start}' brings its own weights; remove --weights {weights}.",
        )
    if config.adapt.feature_views and weights is None:
        raise UserError(
            "option-missing",
            "A head on frozen features needs a pretrained network: name it with --weights FILE, RUN"
            " or pretrained, or learn from scratch with localagg pretrain folder.",
        )
    name, _, tag = model.removeprefix("timm:").partition(".")
    if model.startswith("timm:") and tag and weights is None and start is None:
        raise UserError(
            "option-missing",
            f"{model} names the weights '{tag}'; load them by --weights pretrained or --weights"
            f" FILE, or use --model timm:{name} for random weights.",
        )


def load_start_weights(encoder: Encoder, config: PretrainConfig, world: World) -> None:
    """Load the weights that a run starts from, and report what was loaded.

    Raises:
        UserError: see :func:`localagg.models.load_weights`.
    """
    weights = config.encoder.weights
    if weights is not None:
        report = world.rank_zero_first(lambda: load_weights(encoder, weights))
        notify(report.describe(weights))


def check_ranks(config: PretrainConfig, world: World) -> None:
    """Check that several processes can run this configuration.

    Raises:
        UserError: a batch smaller than the number of processes, or k-means by faiss.
    """
    if world.size == 1:
        return
    smallest = min(size for size in (config.batch_size, config.ir_batch_size) if size)
    if smallest < world.size:
        raise UserError(
            "option-conflict",
            f"--batch-size {smallest} is smaller than the number of processes, {world.size};"
            " use fewer processes.",
        )
    if config.objective.kmeans == "faiss":
        raise UserError(
            "option-conflict",
            f"--kmeans faiss runs in one process, not {world.size}; use --kmeans lloyd or auto.",
        )


@torch.no_grad()
def check_network(learner: Learner) -> None:
    """Run the network on blank images as training does, before anything is written.

    Raises:
        UserError: it does not take images of this size, or batches as small as a rank's: batch-norm
            needs more than one value of each channel.
    """
    config, encoder = learner.config, learner.encoder
    size = require_resolved(config.views.image_size)
    smallest = min(n for n in (config.batch_size, config.ir_batch_size) if n)
    images = smallest if config.sync_batch_norm else smallest // learner.world.size
    shape = (min(images, 2), 3, size, size)
    try:
        blank = torch.zeros(shape, dtype=torch.uint8, device=learner.device)
    except RuntimeError as error:
        raise UserError(
            "too-large",
            f"Images of {size:,} pixels fit no memory ({first_line(error)}); use a smaller"
            " --image-size.",
        ) from None
    before = [buffer.clone() for buffer in encoder.buffers()]
    training = encoder.training
    try:
        with torch.random.fork_rng(), learner.fabric.autocast(), per_rank_batch_norm(encoder):
            encoder.train()(blank)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            "option-invalid",
            f"{config.encoder.model} cannot train on a batch of {images} images of {size} pixels a"
            f" process ({first_line(error)}); use a larger --image-size or --batch-size.",
        ) from None
    finally:
        encoder.train(training)
        for buffer, value in zip(encoder.buffers(), before, strict=True):
            buffer.copy_(value)


def open_feed(
    source: Source,
    config: PretrainConfig,
    world: World,
    progress: dict[str, Any] | None = None,
    transform: Transform | None = None,
) -> Feed:
    """Return the batches of a run; with the progress of a checkpoint, those that come next."""
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
            transform=transform,
        )
    feed.check_batch_size(config.ir_batch_size or 0, "ir_batch_size")
    if feed.unreadable:
        notify(f"Excluded {len(feed.unreadable):,} unreadable images.")
    return feed


def open_features(learner: Learner, feed: Feed) -> FrozenFeatures | None:
    """Return the frozen features that the head learns on, or None if the whole network learns."""
    config = learner.config
    schedule = Schedule(config, len(feed.valid))
    if not schedule.is_backbone_frozen(learner.step):
        return None
    device = learner.device.type
    with learner.fabric.autocast():
        mixed = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if mixed else torch.float32
    return frozen_features(learner.encoder, config, feed, dtype)


def set_first_state(learner: Learner, feed: Feed, facts: dict[str, Any]) -> FrozenFeatures | None:
    """Set weights and bank before the first step; return the features that the head learns on.

    They are those of the run that this one continues, or embeddings of the images.
    """
    if features := open_features(learner, feed):
        start_from_features(learner.encoder, learner.bank, features, feed.valid, learner.world)
        return features
    if "start" in facts:
        restore_start(learner, feed, facts)
    elif learner.config.objective.bank_start == "embedding":
        learner.embed_bank(feed.source, feed.pixels)
    return None


@contextlib.contextmanager
def lock_run_for_all(run: Path, world: World) -> Iterator[None]:
    """Hold the lock of the run folder, by rank 0 for all ranks."""
    with lock_run(run) if world.rank == 0 else contextlib.nullcontext():
        world.barrier()
        yield
