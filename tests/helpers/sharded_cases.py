"""The work of ranks in test_objectives_ranks.py: functions that processes find by name."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from localagg.bank import MemoryBank
from localagg.distributed import collectives as distributed
from localagg.distributed.collectives import World
from localagg.distributed.differentiable import gather_rows
from localagg.evaluation import sharded_knn
from localagg.objectives import (
    background_neighbors,
    close_neighbors,
    instance_nce,
    instance_softmax,
    local_aggregation,
    loss_dtype,
    mixed_loss,
    momentum_update,
)


def problem(
    *,
    size: int,
    batch: int,
    seed: int,
    dtype: torch.dtype,
    dim: int = 6,
    clusterings: int = 2,
    K: int = 8,
    spread: bool = False,
) -> dict[str, Any]:
    """A batch near rows of a bank, its labels and noise draws."""
    generator = torch.Generator().manual_seed(seed)

    def unit(rows: int) -> Tensor:
        drawn = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
        return F.normalize(drawn, dim=1).to(dtype)

    bank = unit(size)
    index = torch.randint(0, size, (batch,), generator=generator)
    near = bank[index] if not spread else unit(batch)
    return {
        "bank": bank,
        "embedding": momentum_update(near, unit(batch), momentum=0.6),
        "labels": torch.randint(
            0, max(1, size // 4), (clusterings, size), generator=generator, dtype=torch.int32
        ),
        "index": index,
        "noise": torch.randint(0, size, (batch, 5), generator=generator),
        "K": K,
        "t": 0.07,
    }


def bank_of(world: World, rows: Tensor) -> MemoryBank:
    """This rank's part of a bank."""
    part = world.part(len(rows))
    bank = MemoryBank(*rows.shape, dtype=rows.dtype, part=part)
    bank.rows.copy_(rows[part.start : part.stop])
    return bank


class Batch(NamedTuple):
    """The batch of all ranks, from which gradients return to this rank's share."""

    leaf: Tensor
    """[b, D], this rank's share."""
    embedding: Tensor
    """[B, D]."""
    index: Tensor
    """int64 [B]."""


class Score(NamedTuple):
    """A loss, its gradient in this rank's share [b, D], and what else is reported."""

    loss: Tensor
    gradient: Tensor
    notes: dict[str, Tensor]


def gather(world: World, embedding: Tensor, index: Tensor, total: int, dtype: torch.dtype) -> Batch:
    """The batch of which each rank brings its share."""
    leaf = embedding.detach().requires_grad_()
    return Batch(leaf, gather_rows(world, leaf, total, dtype), world.gather(index, total))


def gathered(world: World, p: dict[str, Any]) -> Batch:
    """The batch of a problem."""
    part = world.part(len(p["index"]))
    own, dtype = slice(part.start, part.stop), loss_dtype(p["embedding"], p["bank"])
    return gather(world, p["embedding"][own], p["index"][own], len(p["index"]), dtype)


def score(world: World, p: dict[str, Any], loss: str) -> Score:
    """A loss of a problem on this rank."""
    bank, batch = bank_of(world, p["bank"]), gathered(world, p)
    v, index, t = batch.embedding, batch.index, p["t"]
    options = {key: p[key] for key in ("sampled_from", "deviations") if key in p}
    shard = bank.shard(world)._replace(**options)
    notes = {}
    if loss == "local_aggregation":
        labels = p["labels"][:, bank.part.start : bank.part.stop]
        background = background_neighbors(v, shard, p["K"])
        close = close_neighbors(labels, index, background.rows, shard)
        share = p.get("instance_share", 0.0)
        losses, ratio = mixed_loss(
            v, shard, background, close, index, instance_share=share, temperature=t
        )
        value, notes = losses.mean().to(v.dtype), {"without_close": (ratio == 0).float().mean()}
    elif loss == "instance_softmax":
        value = instance_softmax(v, shard, index, temperature=t)
    else:
        value, data, noise = instance_nce(v, shard, index, p["noise"], temperature=t)
        notes = {"data_term": data.detach(), "noise_term": noise.detach()}
    (gradient,) = torch.autograd.grad(value, batch.leaf)
    return Score(value.detach(), gradient, notes)


def nearest(world: World, p: dict[str, Any], k: int) -> tuple[Tensor, Tensor]:
    """Neighbors of a problem's batch."""
    return sharded_knn.nearest_rows(world, p["embedding"], bank_of(world, p["bank"]), k)


def train(world: World, objective: str) -> dict[str, Any]:
    """Seven steps of SGD with momentum on a linear encoder of 37 images, in float64. Batches are 8
    and 3 images with a repeat in some, shared out over ranks as they come."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(37, 10, generator=generator, dtype=torch.float64)
    weights = torch.randn(10, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 9, (2, 37), generator=generator, dtype=torch.int32)
    bank = MemoryBank(37, 6, seed=1, dtype=torch.float64, part=world.part(37))
    own_labels = labels[:, bank.part.start : bank.part.stop]
    velocity, losses = torch.zeros_like(weights), []
    for batch_size in (8, 8, 8, 3, 8, 8, 3):
        index = torch.randint(0, 37, (batch_size,), generator=generator)
        noise = torch.randint(0, 37, (batch_size, 6), generator=generator)
        part = world.part(batch_size)
        own = index[part.start : part.stop]
        leaf = weights.clone().requires_grad_()
        embedding = F.normalize(images[own] @ leaf, dim=1)
        batch = gather(world, embedding, own, batch_size, embedding.dtype)
        v, shard = batch.embedding, bank.shard(world)
        if objective == "local_aggregation":
            loss = local_aggregation(v, shard, own_labels, batch.index, neighbors=11)
        elif objective == "instance_softmax":
            loss = instance_softmax(v, shard, batch.index)
        else:
            loss, *_ = instance_nce(v, shard, batch.index, noise)
        embedding.backward(torch.autograd.grad(loss, batch.leaf)[0])
        assert leaf.grad is not None
        velocity = 0.9 * velocity + world.sum(leaf.grad)
        weights = weights - 0.1 * velocity
        bank.update(batch.index, v.detach())
        losses.append(loss.item())
    return {"losses": losses, "weights": weights, "rows": bank.rows}


def traffic(world: World, p: dict[str, Any]) -> dict[str, list[tuple[str, int]]]:
    """(collective, payload bytes that this rank hands over) of each part of a step, in order."""
    sent: list[tuple[str, int]] = []

    def recorded(name: str, call: Any, payload: int) -> Any:
        def wrapper(*tensors: Any) -> Any:
            sent.append((name, tensors[payload].nbytes))
            return call(*tensors)

        return wrapper

    places = {
        "all_reduce": (distributed.dist, "all_reduce", 0),
        "all_gather": (distributed, "_all_gather", 1),
        "reduce_scatter": (distributed, "_reduce_scatter", 1),
    }
    before = {name: getattr(where, attribute) for name, (where, attribute, _) in places.items()}
    for name, (where, attribute, payload) in places.items():
        setattr(where, attribute, recorded(name, before[name], payload))
    try:
        found = {}
        bank = bank_of(world, p["bank"])
        labels = p["labels"][:, bank.part.start : bank.part.stop]
        batch = gathered(world, p)
        found["gather"], sent[:] = list(sent), []
        v, index, shard = batch.embedding, batch.index, bank.shard(world)

        def backward(loss: Tensor) -> None:
            torch.autograd.grad(loss, batch.leaf, retain_graph=True)

        for part, call in {
            "la": lambda: backward(local_aggregation(v, shard, labels, index, neighbors=p["K"])),
            "softmax": lambda: backward(instance_softmax(v, shard, index)),
            "nce": lambda: backward(instance_nce(v, shard, index, p["noise"])[0]),
            "update": lambda: bank.update(index, v.detach()),
        }.items():
            call()
            found[part], sent[:] = list(sent), []
        return found
    finally:
        for name, (where, attribute, _) in places.items():
            setattr(where, attribute, before[name])
