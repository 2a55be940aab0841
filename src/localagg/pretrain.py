"""The training loop: IR for the warm-up epochs, then LA. One straight function, sections in order.

Precedence of settings: an option set by hand, then the recipe's, then the rule that derives the
rest from the images (``sizing.resolve``). A resumed run takes all of them from its folder.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint
from .config import PretrainConfig, UserError
from .data.augment import Augment
from .data.loader import Feed, Throttle, typical_side
from .data.sources import open_images
from .draws import NOISE, integers
from .evaluate import OnlineNeighbors
from .learner import Learner
from .logbook import say, showing
from .neighbors import find_neighbors, neighborhood_loss
from .objectives import instance_nce, instance_softmax
from .record import Book, interruptible
from .sizing import derived, resolve


class Interrupted(Exception):
    """Ctrl-C: the run was saved; the message says how to go on."""


def pretrain(
    config: PretrainConfig,
    data: str | None = None,
    out: str | Path = "runs/run",
    *,
    resume: bool = False,
) -> dict[str, Any]:
    """Learn an embedding of images without labels: IR, then LA (LA section 3).

    Labels, where the data have them, are used by the nearest-neighbor measurements alone.

    Args:
        config: what to do; what it leaves None is derived from the images. A resumed run takes
            its own, except for workers and device.
        data: data URI. A resumed run takes its own unless another place of the same images is
            given.
        out: the run folder: a new one, or with ``resume`` the one to go on with.
        resume: go on from the newest checkpoint of ``out``.

    Returns:
        {"run", "images", "unreadable", "epochs", "steps", "seconds", "final": {metric: value},
        "shares": {part of the time: 0-1}}.

    Raises:
        UserError: options, data and folder do not go together.
        Interrupted: Ctrl-C; a checkpoint has been written.
    """
    # --- What is learned from ---------------------------------------------------------------------
    run, facts, asked = Path(out), {}, config
    if resume:
        stored, facts = checkpoint.read_run(run)
        asked = config = replace(stored, workers=config.workers, device=config.device)
        newest = checkpoint.latest(run)
    else:
        checkpoint.check_new(run)
    data = data or facts.get("data")
    if data is None:
        raise UserError("Name the images to learn from with --data.")
    source = open_images(data)
    config = resolve(config, len(source), typical_side(source))
    fingerprint = source.fingerprint()
    if resume and fingerprint != facts["fingerprint"]:
        raise UserError(
            f"'{data}' ({len(source):,} images) is not what '{run}' has learned from"
            f" ({facts['size']:,} images); start a new run with another --out."
        )
    if chosen := derived(asked, config):
        listed = ", ".join(f"{name} {value}" for name, value in chosen.items())
        say(f"Derived from {len(source):,} images: {listed}.")
    with showing("reading images") as show:
        feed = Feed(source, config, Throttle(show))
    if feed.unreadable:
        say(f"{len(feed.unreadable):,} unreadable images are left out.")

    # --- What learns ------------------------------------------------------------------------------
    learner = Learner(config, len(source))
    measurement = OnlineNeighbors(config, data, source, feed.valid)

    # --- What was learned before ------------------------------------------------------------------
    if resume:
        progress = learner.restore(newest)
        if progress["summary"]:
            say(f"'{run}' has finished its {config.epochs} epochs; there is nothing to go on with.")
            return progress["summary"]
        say(f"Going on with '{run}' after step {learner.step:,}.")
    else:
        facts = {"data": data, "fingerprint": fingerprint, "size": len(source)}
        if config.objective.bank_start == "embedding":
            learner.embed_bank(source, feed.pixels)
        checkpoint.begin_run(run, config, facts)
        progress = {"metrics_bytes": 0, "seconds": 0.0, "shares": {}, "final": {}}

    return _learn(config, run, feed, learner, measurement, progress)


def _learn(
    config: PretrainConfig,
    run: Path,
    feed: Feed,
    learner: Learner,
    measurement: OnlineNeighbors,
    progress: dict[str, Any],
) -> dict[str, Any]:
    """The loop. It reads from top to bottom as a batch of images travels."""
    objective, bank, device = config.objective, learner.bank, learner.device
    augment = Augment(config.views, config.seed, cropped=feed.cropped)
    last_step = config.epochs * feed.steps
    book = Book(config, run, learner, last_step, progress)

    with book, interruptible() as interrupt:
        for epoch in range(learner.step // feed.steps, config.epochs):
            first = learner.step % feed.steps
            aggregating = epoch >= config.ir_epochs
            if aggregating and first == 0:
                with book.shares("clustering", once=True):
                    learner.recluster()

            batches = feed.batches(epoch, first)
            for _ in range(first, feed.steps):
                book.shares.next_step()
                with book.shares("data"):
                    index, images = next(batches)
                    index, images = index.to(device), images.to(device)
                with book.shares("augmentation"):
                    views = augment(images, epoch, index)
                with book.shares("network"):
                    embedding = learner.network(views.contiguous(memory_format=torch.channels_last))
                with book.shares("loss engine"):
                    loss, notes = _loss(learner, embedding, index, aggregating)
                    (gradient,) = torch.autograd.grad(loss, embedding)
                with book.shares("network"):
                    _set_rate(learner, feed.steps)
                    learner.fabric.backward(embedding, gradient=gradient)
                    learner.optimizer.step()
                    learner.optimizer.zero_grad()
                with book.shares("bank"):
                    bank.update(index, embedding, momentum=objective.bank_momentum)
                learner.step += 1
                book.after_step(epoch, loss, notes)
                if interrupt.asked:
                    book.checkpoint()
                    raise Interrupted(
                        f"Stopped after step {learner.step:,}; go on with"
                        f" localagg pretrain --resume {run}"
                    )
            if config.eval_every and (
                (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs
            ):
                with book.shares("measuring", once=True):
                    book.after_epoch(epoch, measurement(learner.encoder, bank.rows, learner.fabric))
            book.checkpoint()
        return book.finish(feed)


def _loss(
    learner: Learner, embedding: Tensor, index: Tensor, aggregating: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective of a step, and what else is worth a curve. Reads the bank before its update."""
    objective, rows = learner.config.objective, learner.bank.rows
    if aggregating:
        assert learner.labels is not None
        found = find_neighbors(
            embedding, rows, learner.labels, index, neighbors=objective.neighbors or len(rows)
        )
        loss = neighborhood_loss(embedding, rows, found, temperature=objective.temperature)
        return loss, {"without_close": found.without_close}
    if objective.instance_loss == "softmax":
        return instance_softmax(embedding, rows, index, temperature=objective.temperature), {}
    position = torch.arange(len(index))
    keys = (learner.config.seed, NOISE, learner.step, position)
    noise_index = integers(len(rows), *keys, count=objective.noise).to(rows.device)
    loss, data_term, noise_term = instance_nce(
        embedding, rows, index, noise_index, temperature=objective.temperature
    )
    return loss, {"data_term": data_term, "noise_term": noise_term}


def learning_rate(config: PretrainConfig, step: int, steps_an_epoch: int) -> float:
    """The rate of step ``step`` (from 0): a tenth for each boundary that lies before it.

    As in the reference the rate drops on the step after the boundary.
    """
    passed = sum(step > drop * steps_an_epoch for drop in config.drops or ())
    return config.learning_rate * 0.1**passed


def _set_rate(learner: Learner, steps_an_epoch: int) -> None:
    for group in learner.optimizer.param_groups:
        group["lr"] = learning_rate(learner.config, learner.step, steps_an_epoch)
