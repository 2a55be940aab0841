"""The training loop: IR for the warm-up epochs, then LA. One straight function, sections in order.

Precedence of settings: an option set by hand, then the recipe's, then the rule that derives the
rest from the images (``sizing.resolve``). A resumed run takes all of them from its folder.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint
from .config import Interrupted, PretrainConfig, UserError, known, option, option_value, override
from .data.augment import Augment
from .data.loader import Feed, Throttle, typical_side
from .data.sources import Source, open_images
from .draws import NOISE, integers
from .evaluate import OnlineNeighbors
from .learner import Learner
from .logbook import say, showing
from .neighbors import find_neighbors, neighborhood_loss
from .objectives import instance_nce, instance_softmax
from .record import START, Book, interruptible
from .sizing import derived, resolve


def pretrain(config: PretrainConfig, data: str, out: str | Path) -> dict[str, Any]:
    """Learn an embedding of images without labels: IR, then LA (LA section 3).

    Labels, where the data have them, are used by the nearest-neighbor measurements alone.

    Args:
        config: what to do; what it leaves None is derived from the images.
        data: data URI.
        out: the run folder to make.

    Returns:
        {"run", "images", "unreadable", "epochs", "steps", "seconds", "final": {metric: value},
        "shares": {part of the time: 0-1}}.

    Raises:
        UserError: options, data and folder do not go together.
        Interrupted: Ctrl-C; a checkpoint has been written.
    """
    run = Path(out)
    checkpoint.check_new(run)
    source = open_images(data)
    resolved = resolve(config, len(source), typical_side(source))
    if chosen := derived(config, resolved):
        listed = ", ".join(f"{name} {value}" for name, value in chosen.items())
        say(f"Derived from {len(source):,} images: {listed}.")
    fingerprint = source.fingerprint()
    feed = _feed(source, resolved)
    learner = Learner(resolved, len(source))
    measurement = OnlineNeighbors(resolved, data, source, feed.valid)
    if resolved.objective.bank_start == "embedding":
        learner.embed_bank(source, feed.pixels)
    facts = {"data": data, "fingerprint": fingerprint, "size": len(source)}
    checkpoint.begin_run(run, resolved, facts)
    return _learn(resolved, run, feed, learner, measurement, START)


def resume(
    out: str | Path,
    config: PretrainConfig | None = None,
    *,
    data: str | None = None,
    typed: Iterable[str] = (),
) -> dict[str, Any]:
    """Go on with a run from its newest checkpoint; the end is that of a run never stopped.

    Args:
        out: the run folder.
        config: options set now; all but workers and device must be the run's own.
        data: another place of the same images. None: where the run found them.
        typed: names of the options in ``config`` that were set now.

    Returns:
        As :func:`pretrain`; of a finished run, what it returned then.

    Raises:
        UserError: not a run, other options, other images, or a damaged checkpoint.
        Interrupted: Ctrl-C; a checkpoint has been written.
    """
    run = Path(out)
    stored, facts = checkpoint.read_run(run)
    newest = checkpoint.latest(run)
    for name in typed:
        now, then = option_value(config, name), option_value(stored, name)
        if name in _FREE:
            stored = override(stored, **{name: now})
        elif now != then:
            raise UserError(
                f"'{run}' runs with {option(name)} {then}, not {now}; a resumed run keeps its"
                " options. Leave it out, or start a new run with another --out."
            )
    data = data or str(facts["data"])
    source = open_images(data)
    if source.fingerprint() != facts["fingerprint"]:
        raise UserError(
            f"'{data}' ({len(source):,} images) is not what '{run}' has learned from"
            f" ({facts['size']:,} images); start a new run with another --out."
        )
    if summary := checkpoint.read_progress(newest)["summary"]:
        say(f"'{run}' has finished its {stored.epochs} epochs; there is nothing to go on with.")
        return summary
    feed = _feed(source, stored)
    learner = Learner(stored, len(source))
    measurement = OnlineNeighbors(stored, data, source, feed.valid)
    progress = learner.restore(newest)
    say(f"Going on with '{run}' after step {learner.step:,}.")
    return _learn(stored, run, feed, learner, measurement, progress)


_FREE = ("workers", "device")  # what a resumed run may change


def _feed(source: Source, config: PretrainConfig) -> Feed:
    with showing("reading images") as show:
        feed = Feed(source, config, Throttle(show))
    if feed.unreadable:
        say(f"{len(feed.unreadable):,} unreadable images are left out.")
    return feed


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
    epochs, ir_epochs = known(config.epochs), known(config.ir_epochs)
    book = Book(config, run, feed, learner, progress)

    with book, interruptible() as interrupt:
        for epoch in range(learner.step // feed.steps, epochs):
            first = learner.step % feed.steps
            aggregating = epoch >= ir_epochs
            if aggregating and first == 0:
                with book.shares("clustering", once=True):
                    learner.recluster(book.after_clustering)

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
                    v = embedding.detach().requires_grad_()
                    loss, notes = _loss(learner, v, index, aggregating)
                    (gradient,) = torch.autograd.grad(loss, v)
                with book.shares("network"):
                    _set_rate(learner, feed.steps)
                    learner.fabric.backward(embedding, gradient=gradient)
                    learner.optimizer.step()
                    learner.optimizer.zero_grad()
                with book.shares("bank"):
                    bank.update(index, v, momentum=objective.bank_momentum)
                learner.step += 1
                book.after_step(epoch, loss, notes)
                if interrupt.asked:
                    book.checkpoint()
                    raise Interrupted(
                        f"Stopped after step {learner.step:,}; go on with"
                        f" localagg pretrain --resume {run}"
                    )
            if config.eval_every and ((epoch + 1) % config.eval_every == 0 or epoch + 1 == epochs):
                with book.shares("measuring", once=True):
                    book.after_epoch(epoch, measurement(learner.encoder, bank.rows, learner.fabric))
            book.checkpoint()
        return book.finish()


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
