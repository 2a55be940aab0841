"""Functions that ranks run in test_loop_ranks.py; processes find them by name."""

import contextlib
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from localagg import checkpoint
from localagg.bank import MemoryBank
from localagg.config import PretrainConfig, from_dict
from localagg.distributed.batch_norm import synchronize_batch_norm
from localagg.distributed.collectives import World
from localagg.errors import Interrupted, UserError
from localagg.models import create_encoder
from localagg.training.recorder import Recorder
from localagg.training.runs import pretrain, resume


def learn(world: World, config: dict[str, Any], data: str, run: str, stop: int = 0) -> int:
    """Pretrain or resume, up to step ``stop`` if given. Return the bank rows on this rank."""
    held = []
    after = Recorder.after_step

    def watched(self, *arguments, **options):
        bank = self.learner.bank
        held.append(len(bank.rows))
        assert bank.searchable.rows.numel() == bank.rows.numel()
        after(self, *arguments, **options)
        if self.learner.step == stop:
            raise Interrupted("enough")

    Recorder.after_step = watched
    try:
        with contextlib.suppress(Interrupted):
            resumes = (Path(run) / "config.json").exists()
            world.barrier()
            if resumes:
                resume(run)
            else:
                pretrain(from_dict(PretrainConfig, config), data, run)
    finally:
        Recorder.after_step = after
    return max(held, default=0)


def error_of(world: World, call: Callable[..., Any], *arguments: Any) -> str:
    """Return the message of the UserError that a call raises."""
    try:
        call(world, *arguments)
    except UserError as error:
        return str(error)
    return "no error"


def save_with_little_room(world: World, run: str, rank: int) -> None:
    """Save two checkpoints, the second under a limit of file size on one rank."""
    encoder = create_encoder("resnet18_small", dim=8, width=4, blocks=(1,), seed=0)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    bank = MemoryBank(1000, 8, seed=0, part=world.part(1000))
    labels = {"labels": torch.zeros(2, len(bank), dtype=torch.int32)}

    def save(step: int) -> None:
        checkpoint.save(
            Path(run),
            step,
            encoder=encoder,
            optimizer=optimizer,
            bank=bank,
            clusters=labels,
            progress={},
            world=world,
        )

    (Path(run) / "config.json").write_text("{}")
    save(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        save(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def normalize(world: World, channels: int, sizes: list[int], dims: int) -> dict[str, Any]:
    """Return output, gradients and running statistics of a synchronized batch-norm."""
    generator = torch.Generator().manual_seed(0)
    space = (5, 3)[: dims - 2]
    x = torch.randn(sum(sizes), channels, *space, generator=generator, dtype=torch.float64)
    x = x * 3 + torch.arange(channels).view(1, -1, *[1] * len(space))
    slope = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    norm = torch.nn.BatchNorm2d(channels) if dims == 4 else torch.nn.BatchNorm1d(channels)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(channels, generator=generator))
        norm.bias.copy_(torch.rand(channels, generator=generator))
    network = torch.nn.Sequential(norm).double()
    if world.size > 1:
        synchronize_batch_norm(network, world)
        start = sum(sizes[: world.rank])
        part = slice(start, start + sizes[world.rank])
        x, slope = x[part], slope[part]
    x.requires_grad_()
    y = network(x)
    y.backward(slope)
    with torch.no_grad():
        inference = network.eval()(F.relu(x))
    norm = network[0]
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    return {
        "y": y.detach(),
        "x": x.grad,
        "weight": world.sum(norm.weight.grad.detach()),
        "bias": world.sum(norm.bias.grad.detach()),
        "mean": norm.running_mean,
        "variance": norm.running_var,
        "tracked": norm.num_batches_tracked,
        "inference": inference,
    }
