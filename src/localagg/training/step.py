"""One training step: a batch of images travels through network, loss and optimizer to the bank.

On R ranks each trains on its share of the batch. The embeddings of all ranks are gathered, every
rank scores them on its rows of the bank, and gradients return to the ranks that embedded them. One
rank takes the same path; its collectives return their argument.

Legend of shape suffixes: b this rank's share of the batch, B the batch of all ranks, D embedding
size, C background neighbors that this rank holds.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..data.images.augment import Augment
from ..data.loading.cropping import TrainingBatch
from ..distributed.differentiable import gather_rows
from ..engine.counter_rng import NOISE, integers
from ..engine.search import rounded_softmax_backend
from ..objectives import (
    background_neighbors,
    close_neighbors,
    instance_nce,
    instance_softmax,
    loss_dtype,
    mixed_loss,
)
from .learner import Learner
from .time_shares import TimeShares


class StepResult(NamedTuple):
    """The loss of a step and what else is worth a curve; scalars are the same on every rank."""

    index: Tensor
    """int64 [B]: the images of all ranks."""
    values: dict[str, Tensor]
    """Scalars: "loss"; "staleness"; "without_close" in LA; "data_term" and "noise_term" in NCE."""
    finite: Tensor
    """Finite if the gradients of all ranks are, else NaN or infinite. Any shape."""


def take_step(
    learner: Learner,
    augment: Augment,
    batch: TrainingBatch,
    epoch: int,
    *,
    aggregating: bool,
    size: int,
    learning_rate: float,
    timer: TimeShares,
) -> StepResult:
    """Train on one batch: weights, optimizer, bank and step counter of the learner move on.

    Args:
        learner: its network is in training mode.
        augment: turns images into random views.
        batch: this rank's share of the images.
        epoch: from 0; views depend on it.
        aggregating: LA, otherwise IR.
        size: B, images of all ranks.
        learning_rate: of this step.
        timer: measures the parts of the step.
    """
    with timer("augmentation"):
        views = batch.images  # frozen features [b, C] and the user's own views pass as they are
        if views.dtype == torch.uint8:
            views = augment(views, epoch, batch.index, batch.uniforms)
        if views.ndim == 4 and not learner.config.adapt.feature_views:
            views = views.contiguous(memory_format=torch.channels_last)
    with timer("network"):
        v_bD = learner.network(views)
    with timer("loss engine"):
        index_B = learner.world.gather(batch.index.to(learner.device, non_blocking=True), size)
        leaf_bD = v_bD.detach().requires_grad_()
        v_BD = gather_rows(learner.world, leaf_bD, size, loss_dtype(v_bD, learner.bank.rows))
        loss, values = batch_loss(learner, v_BD, index_B, aggregating=aggregating)
        (gradient_bD,) = torch.autograd.grad(loss, leaf_bD)
    with timer("network"):
        for group in learner.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("rate_share", 1.0)
        learner.fabric.backward(v_bD, gradient=gradient_bD)
        finite = learner.share_gradients(gradient_bD)
        learner.optimizer.step()
        learner.optimizer.zero_grad()
    with timer("bank"):
        momentum = learner.config.objective.bank_momentum
        learner.bank.update(index_B, v_BD.detach(), momentum=momentum)
    learner.step += 1
    return StepResult(index_B, {"loss": loss.detach(), **values}, finite)


def unused_precision_note(learner: Learner) -> str | None:
    """Return a sentence for the user if ``--instance-precision bfloat16`` changes nothing here."""
    if learner.config.objective.instance_precision == "float32":
        return None
    if rounded_softmax_backend(learner.bank.searchable):
        return None
    return (
        "--instance-precision bfloat16 changes nothing here: it needs a CPU that multiplies"
        " bfloat16, a float32 bank and at least 4,096 images of a process."
    )


def batch_loss(
    learner: Learner, v_BD: Tensor, index_B: Tensor, *, aggregating: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the scalar loss of a batch and its notes. Reads the bank before the step's update."""
    objective, shard = learner.config.objective, learner.shard
    temperature = objective.temperature
    notes: dict[str, Tensor] = {}
    if aggregating:
        assert learner.labels is not None
        background = background_neighbors(v_BD, shard, objective.neighbors or shard.size)
        close_BC = close_neighbors(learner.labels, index_B, background.rows, shard)
        options = {"instance_share": objective.instance_share, "temperature": temperature}
        loss_B, ratio_B = mixed_loss(v_BD, shard, background, close_BC, index_B, **options)
        loss = loss_B.mean().to(v_BD.dtype)
        notes["without_close"] = (ratio_B == 0).float().mean()
    elif objective.instance_loss == "softmax":
        precision = objective.instance_precision
        loss = instance_softmax(v_BD, shard, index_B, temperature=temperature, precision=precision)
    else:
        images = torch.arange(len(index_B))
        keys = (learner.config.seed, NOISE, learner.step, images)
        noise_BK = integers(shard.size, *keys, count=objective.noise).to(learner.device)
        loss, data, noise = instance_nce(v_BD, shard, index_B, noise_BK, temperature=temperature)
        notes |= {"data_term": data.detach(), "noise_term": noise.detach()}
    # How far the bank lags behind: its rows were written an epoch ago, from other views.
    similarity = shard.world.sum(shard.similarity_to_own(v_BD.detach(), index_B).sum())
    notes["staleness"] = 1 - similarity / len(index_B)
    return loss, notes
