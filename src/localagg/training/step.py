"""The objective of a step, on one rank or over many."""

import torch
from torch import Tensor

from ..engine.counter_rng import NOISE, integers
from ..objectives import instance_nce, instance_softmax
from . import sharded
from .diagnostics import staleness
from .learner import Learner
from .neighbors import find_neighbors, neighborhood_loss
from .sharded import Batch, LossResult


def score(learner: Learner, batch: Batch, aggregating: bool) -> LossResult:
    """Loss and gradient of a batch, and what else is worth a curve. Reads the bank before its
    update.

    One rank takes the objectives themselves, with autograd; several the sharded ones, which are
    tested to be the same.

    Args:
        learner: bank, labels, step and ranks are read.
        batch: of all ranks.
        aggregating: LA, not IR.
    """
    scored = (_alone if learner.world.size == 1 else _together)(learner, batch, aggregating)
    scored.notes["staleness"] = _staleness(learner, batch)
    return scored


def _alone(learner: Learner, batch: Batch, aggregating: bool) -> LossResult:
    v = batch.embedding.detach().requires_grad_()
    loss, notes = _loss(learner, v, batch.index, aggregating)
    (gradient,) = torch.autograd.grad(loss, v)
    return LossResult(loss, gradient, notes)


def _loss(
    learner: Learner, embedding: Tensor, index: Tensor, aggregating: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    objective, rows = learner.config.objective, learner.bank.rows
    temperature = objective.temperature
    if aggregating:
        assert learner.labels is not None
        K = objective.neighbors or len(rows)
        bank = learner.bank.prepared
        found = find_neighbors(embedding, bank, learner.labels, index, neighbors=K)
        share = objective.instance_share
        loss = neighborhood_loss(
            embedding, rows, found, temperature=temperature, instance_share=share
        )
        return loss, {"without_close": found.without_close}
    if objective.instance_loss == "softmax":
        return instance_softmax(embedding, rows, index, temperature=temperature), {}
    noise = _noise(learner, len(index))
    loss, data, other = instance_nce(embedding, rows, index, noise, temperature=temperature)
    return loss, {"data_term": data, "noise_term": other}


def _together(learner: Learner, batch: Batch, aggregating: bool) -> LossResult:
    world, bank, objective = learner.world, learner.bank, learner.config.objective
    temperature = objective.temperature
    if aggregating:
        assert learner.labels is not None
        return sharded.local_aggregation(
            world,
            batch,
            bank,
            learner.labels,
            neighbors=objective.neighbors or bank.size,
            temperature=temperature,
            instance_share=objective.instance_share,
        )
    if objective.instance_loss == "softmax":
        return sharded.instance_softmax(world, batch, bank, temperature=temperature)
    noise = _noise(learner, len(batch.index))
    return sharded.instance_nce(world, batch, bank, noise, temperature=temperature)


def _noise(learner: Learner, count: int) -> Tensor:
    """NCE's draws [B, K], the same on every rank."""
    keys = (learner.config.seed, NOISE, learner.step, torch.arange(count))
    drawn = integers(learner.bank.size, *keys, count=learner.config.objective.noise)
    return drawn.to(learner.device)


def _staleness(learner: Learner, batch: Batch) -> Tensor:
    """How far the bank is behind the batch, a scalar. One all-reduce of a number."""
    bank, world = learner.bank, learner.world
    if world.size == 1:
        return staleness(bank.rows[batch.index], batch.embedding)
    mine = (batch.index >= bank.part.start) & (batch.index < bank.part.stop)
    rows = bank.rows[batch.index[mine] - bank.part.start]
    cosines = (rows * batch.embedding[mine]).sum()
    return 1 - world.sum(cosines) / len(batch.index)
