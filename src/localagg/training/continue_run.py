"""Continue a finished run: after IR, for more epochs, or on images that changed since.

Or a checkpoint of the reference program.
"""

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import checkpoint
from ..config import (
    EncoderConfig,
    PretrainConfig,
    option_names,
    option_value,
    override,
    require_resolved,
)
from ..data.inspect.image_contents import content_digests, match_contents
from ..data.loading.cropping import evaluation_crops
from ..data.loading.loader import Feed
from ..data.loading.workers import map_in_workers
from ..data.sources.open import Source, open_unchanged
from ..engine.search import store_by_row
from ..errors import UserError, counted
from ..interop.start_state import load_start_state, read_start_network
from ..io.console import notify, show_progress
from ..io.tensor_files import save_array
from ..recipes.derived_settings import DROPS, resolve_defaults
from ..recipes.schedule import Schedule
from .learner import Learner

_CONTENTS = "contents.npy"
_BATCH = 256
_IR_AGAIN = 0.6  # of the new epochs: LA alone learns little from new images


# --- Settings -------------------------------------------------------------------------------------


def settings_of_start(
    config: PretrainConfig, start: Path, source: Source, typed: frozenset[str] = frozenset()
) -> PretrainConfig:
    """Return the settings of a run that continues a finished one, whose epochs count.

    After IR alone they are those of ``config``, with the network and IR epochs of ``start``. After
    LA they are those of ``start``, except the options that were set; by default it continues for a
    fifth of its epochs. The rate begins anew, and drops near their end. On changed images the first
    three fifths of the new epochs are of IR, from which most of the gain comes.

    Args:
        config: as the user set it.
        start: the finished run, or an imported checkpoint, whose network is used.
        source: the images of the new run.
        typed: names of the options that the user set. Default: those that differ from the defaults.

    Raises:
        UserError: ``start`` is not finished, has another network, or at least as many epochs; an
            imported checkpoint without its bank, or of other images.
    """
    if config.adapt.feature_views:
        raise UserError(
            "option-conflict",
            f"--start '{start}' continues a whole network, and adapt learns a head in seconds; omit"
            f" --start, and learn the head anew on all images with --weights {start} or another.",
        )
    if start.is_file():
        return _settings_of_import(config, start, source)
    before, facts = checkpoint.read_run(start)
    if checkpoint.read_progress(checkpoint.latest(start))["summary"] is None:
        raise UserError(
            "mismatch", f"--start '{start}' is not finished; first run --resume {start}."
        )
    if config.encoder.model is not None and config.encoder != before.encoder:
        raise UserError(
            "mismatch",
            f"--start '{start}' trained {before.encoder.model} with other options than"
            f" {config.encoder.model} has here; remove the network's options.",
        )
    done = require_resolved(before.epochs)
    if before.ir_epochs == done:
        return replace(
            config,
            encoder=before.encoder,
            ir_epochs=max(config.ir_epochs or 0, done),
            ir_batch_size=before.ir_batch_size or before.batch_size,
        )
    if before.adapt.feature_views:
        raise UserError(
            "unsupported",
            f"--start '{start}' learned a head on frozen features, which takes minutes: learn it"
            f" anew on all images by localagg pretrain adapt --weights {start}",
        )
    changed = {name: option_value(config, name) for name in typed or _differing(config)}
    is_changed = source.fingerprint() != facts["fingerprint"]
    return _settings_after_la(before, start, changed, images_changed=is_changed)


def _differing(config: PretrainConfig) -> list[str]:
    """Return the names of the options that differ from the defaults."""
    usual = PretrainConfig()
    names = option_names(usual)
    return [name for name in names if option_value(config, name) != option_value(usual, name)]


def _settings_after_la(
    before: PretrainConfig, start: Path, changed: dict[str, Any], *, images_changed: bool
) -> PretrainConfig:
    """Return the settings of a run that continues LA, with the options that were set."""
    done = require_resolved(before.epochs)
    epochs = changed.get("epochs") or done + math.ceil(done / 5)
    if epochs <= done:
        raise UserError(
            "option-invalid",
            f"--epochs {epochs} counts the {done} epochs of --start '{start}' too; use more.",
        )
    if {"neighbors", "clusters"} & changed.keys():  # explicit values are not scaled
        changed["sized_for"] = None
    new = epochs - done
    defaults: dict[str, Any] = {"drop_steps": None, "minutes": None}
    if before.rate_schedule == "drops":
        defaults["drops"] = tuple(round(done + part * new, 2) for part in DROPS)
    again = min(round(_IR_AGAIN * new), new - 1)
    if again and images_changed and "ir_epochs" not in changed:
        defaults["ir_epochs"] = done + again
        notify(
            f"On changed images '{start}' learns for {counted(again, 'epoch')} by IR, then by LA."
        )
    return override(before, **{**defaults, **changed, "epochs": epochs})


def prolong(
    stored: PretrainConfig, epochs: int, drops: tuple[float, ...] | None, source: Source, run: Path
) -> PretrainConfig:
    """Return the settings of a run that continues to a later epoch, with drops near the new end.

    Args:
        stored: the run's settings.
        epochs: the new end, above the old one.
        drops: epochs after which the rate drops. Default: at 80 and 93 percent of the epochs.
        source: its images.
        run: its folder, for messages.

    Raises:
        UserError: fewer epochs, or a run of IR alone, or of a head on frozen features.
    """
    if epochs < require_resolved(stored.epochs):
        raise UserError(
            "option-invalid",
            f"--epochs {epochs} is before the end of '{run}', {stored.epochs}; use more.",
        )
    if stored.adapt.feature_views:
        raise UserError(
            "unsupported",
            f"'{run}' learned a head on frozen features, which takes minutes: learn it anew by"
            f" localagg pretrain adapt --weights {run} --epochs {epochs} --out ANOTHER.",
        )
    if stored.ir_epochs == stored.epochs:
        raise UserError(
            "unsupported",
            f"'{run}' is a run of IR alone; go on with LA by --start {run} --out ANOTHER.",
        )
    changed = replace(stored, epochs=epochs, drops=drops, drop_steps=None)
    changed = resolve_defaults(changed, len(source), require_resolved(stored.views.image_size))
    rate = f"drops after epochs {', '.join(f'{drop:g}' for drop in changed.drops or ())}"
    if changed.rate_schedule == "cosine":
        rate = "follows the cosine to the new end"
    notify(f"'{run}' continues from epoch {stored.epochs} to {epochs}; the learning rate {rate}.")
    return changed


# --- Images ---------------------------------------------------------------------------------------


def save_contents(run: Path, source: Source) -> None:
    """Note the content of each image in a run folder, by which a later run knows its rows. What
    is noted already stays."""
    if (run / _CONTENTS).exists():
        return
    with show_progress("noting images") as show:
        save_array(run / _CONTENTS, content_digests(source, show))


def _load_contents(run: Path, facts: dict[str, Any]) -> np.ndarray:
    """Return the contents S16 [N] of a run's images; of runs of earlier versions by their data."""
    if (run / _CONTENTS).exists():
        return np.load(run / _CONTENTS)
    fix = f"restore them (an earlier version noted no contents), or use --weights {run}"
    return content_digests(open_unchanged(facts["data"], facts["fingerprint"], run, fix))


def restore_start(learner: Learner, feed: Feed, facts: dict[str, Any]) -> None:
    """Load weights, momentum and bank of the run that this one continues.

    On the same images all is restored. Otherwise known images keep their bank rows, new ones are
    embedded, and the step is that of the same epoch. The counts are printed.

    Args:
        learner: gets the state.
        feed: the images of this run.
        facts: of this run; "start" names the other.
    """
    start = Path(facts["start"])
    if start.is_file():
        _restore_import(learner, start, len(feed.valid))
        return
    before, start_facts = checkpoint.read_run(start)
    folder = checkpoint.latest(start)
    if start_facts["fingerprint"] == facts["fingerprint"]:
        learner.restore(folder)
        if _batches(before) != _batches(learner.config):
            learner.step = _step_of_same_epoch(learner, before, len(feed.valid))
        return
    known = _load_contents(start, start_facts)
    with show_progress("matching images") as show:
        rows = torch.from_numpy(match_contents(content_digests(feed.source, show), known))
    new = (rows < 0).nonzero().squeeze(1)
    gone = len(known) - len(rows[rows >= 0].unique())
    notify(
        f"Of {len(rows):,} images {len(rows) - len(new):,} are known and keep their bank rows,"
        f" {len(new):,} are new, and {gone:,} of '{start}' are gone."
    )
    checkpoint.restore(folder, encoder=learner.encoder, optimizer=learner.optimizer, bank=None)  # type: ignore[arg-type]
    part = slice(learner.bank.part.start, learner.bank.part.stop)
    mine, device = rows[part], learner.bank.rows.device
    old = checkpoint.load_bank(start)
    learner.bank.rows[(mine >= 0).to(device)] = old[mine[mine >= 0]].to(learner.bank.rows)
    _embed_rows(learner, feed, new[(new >= part.start) & (new < part.stop)])
    learner.step = _step_of_same_epoch(learner, before, len(feed.valid))


def _batches(config: PretrainConfig) -> tuple[int | None, int | None]:
    return config.batch_size, config.ir_batch_size or config.batch_size


def _step_of_same_epoch(learner: Learner, before: PretrainConfig, images: int) -> int:
    """Return the step at which the epochs of ``before`` are over, in batches of this run."""
    schedule = Schedule(learner.config, images)
    begins_by_ir = (learner.config.ir_epochs or 0) > require_resolved(before.epochs)
    begins_by_ir |= before.ir_epochs == before.epochs
    steps = schedule.ir_steps if begins_by_ir else schedule.la_steps
    return require_resolved(before.epochs) * steps


@torch.no_grad()
def _embed_rows(learner: Learner, feed: Feed, index: torch.Tensor) -> None:
    """Put the embeddings of images by the trained network into their rows of the bank."""
    encoder, bank = learner.encoder, learner.bank
    crop = functools.partial(evaluation_crops, feed.source, learner.config.views, False)
    training = encoder.training
    encoder.eval()
    with show_progress("embedding new images") as show:
        done = 0
        for loaded, _ in map_in_workers(crop, index.split(_BATCH), learner.config.workers):
            if len(loaded.index):
                with learner.fabric.autocast():
                    found = encoder(loaded.images.to(learner.device))
                bank.rows[(loaded.index - bank.part.start).to(bank.rows.device)] = found.to(
                    bank.rows
                )
            done += len(loaded.index)
            show(done, len(index))
    encoder.train(training)


# --- Imported checkpoints -------------------------------------------------------------------------


def _settings_of_import(config: PretrainConfig, start: Path, source: Source) -> PretrainConfig:
    network, order = read_start_network(start, len(source), source.labels)
    if config.encoder.model not in (None, network["model"]):
        raise UserError(
            "mismatch",
            f"--start '{start}' has the network {network['model']}, not {config.encoder.model}; use"
            " its recipe.",
        )
    notify(order)
    return replace(config, encoder=EncoderConfig(**network))


def _restore_import(learner: Learner, start: Path, images: int) -> None:
    """Load weights, bank, momenta, cluster labels and step.

    Raises:
        UserError: the run ends before the checkpoint's step.
    """
    learner.encoder.load_state_dict(checkpoint.load_encoder(start).state_dict())
    parts = (learner.encoder, learner.optimizer, learner.bank)
    learner.step, labels = load_start_state(start, *parts)  # type: ignore[arg-type]
    schedule = Schedule(learner.config, images)
    if learner.step >= schedule.total_steps:
        raise UserError(
            "option-invalid",
            f"--start '{start}' is at step {learner.step:,}, and the run ends at step"
            f" {schedule.total_steps:,}; raise --epochs.",
        )
    phase = "LA" if schedule.position(learner.step).aggregating else "IR"
    notify(f"Continuing '{start}' after step {learner.step:,} with {phase}.")
    if labels is not None and len(labels) == len(learner.config.objective.clusters or ()):
        learner.labels = store_by_row(labels.to(learner.device))
