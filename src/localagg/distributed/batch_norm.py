"""Batch-norm with the statistics of the whole batch when the batch is split over ranks."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserError
from .collectives import World


class SynchronizedBatchNorm(nn.SyncBatchNorm):
    """Normalize by the mean and variance over the samples of all ranks, on any device.

    ``nn.SyncBatchNorm`` supports CUDA only, and is used there. Collectives in training: one
    all-gather of [2 C + 1] forward, one all-reduce of [2, C] backward.

    Attributes:
        per_rank: normalize by the samples of this rank only, as ``nn.BatchNorm2d`` does.
    """

    world: World
    per_rank: bool

    @classmethod
    def of(cls, norm: _BatchNorm, world: World) -> "SynchronizedBatchNorm":
        """Return a synchronized batch-norm that shares the parameters and buffers of ``norm``."""
        synchronized = cls(norm.num_features, norm.eps, norm.momentum, norm.affine)
        synchronized._parameters, synchronized._buffers = norm._parameters, norm._buffers
        synchronized.world, synchronized.per_rank = world, False
        return synchronized.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return normalized [B, C, ...]."""
        if self.per_rank or not self.training:
            return _BatchNorm.forward(self, input)
        if input.is_cuda:
            return super().forward(input)
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        normalized, mean, variance, count = _Normalize.apply(
            input, self.weight, self.bias, self.eps, self.world
        )
        unbiased = variance * count / (count - 1)
        with torch.no_grad():
            for running, now in ((self.running_mean, mean), (self.running_var, unbiased)):
                assert running is not None
                running.lerp_(now.to(running.dtype), self.momentum)
        return normalized


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, with mean and variance over all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, world: World):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        over = [0, *range(2, x.dim())]
        n = x.numel() // x.shape[1]
        mean = wide.sum(dim=over) / max(1, n)
        square = (wide - _expand(mean, x)).square().sum(dim=over)
        every = world.stack(torch.cat([mean, square, mean.new_tensor([n])]))  # [R, 2 C + 1]
        mean_RC, square_RC, n_R1 = every.split([len(mean), len(mean), 1], dim=1)
        count = n_R1.sum()
        mean = (mean_RC * n_R1).sum(dim=0) / count
        variance = (square_RC + n_R1 * (mean_RC - mean).square()).sum(dim=0) / count
        scale = (variance + eps).rsqrt()
        standard = (wide - _expand(mean, x)) * _expand(scale, x)
        ctx.save_for_backward(standard.to(x.dtype), weight, scale)
        ctx.world, ctx.count = world, count
        ctx.mark_non_differentiable(mean, variance, count)
        y = (standard * _expand(weight, x) + _expand(bias, x)).to(x.dtype)
        return y, mean, variance, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor):
        standard, weight, scale = ctx.saved_tensors
        dtype = standard.dtype
        grad, standard = grad.to(scale.dtype), standard.to(scale.dtype)
        over = [0, *range(2, grad.dim())]
        grad_bias, grad_weight = grad.sum(dim=over), (grad * standard).sum(dim=over)
        means = ctx.world.sum(torch.stack([grad_bias, grad_weight])) / ctx.count
        inner = grad - _expand(means[0], grad) - standard * _expand(means[1], grad)
        grad_x = inner * _expand(weight * scale, grad)
        return grad_x.to(dtype), grad_weight, grad_bias, None, None


def _expand(values: Tensor, like: Tensor) -> Tensor:
    """View [C] so that it broadcasts over [B, C, ...]."""
    return values.view(1, -1, *[1] * (like.dim() - 2))


@contextlib.contextmanager
def per_rank_batch_norm(network: nn.Module) -> Iterator[None]:
    """Normalize by the samples of this rank only while the block runs."""
    norms = [norm for norm in network.modules() if isinstance(norm, SynchronizedBatchNorm)]
    for norm in norms:
        norm.per_rank = True
    try:
        yield
    finally:
        for norm in norms:
            norm.per_rank = False


def synchronize_batch_norm(network: nn.Module, world: World) -> None:
    """Replace each batch-norm of the network by a :class:`SynchronizedBatchNorm`.

    Raises:
        UserError: a batch-norm of another class, as some of timm's networks have.
    """
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if not isinstance(child, _BatchNorm):
                continue
            if type(child) not in (nn.BatchNorm1d, nn.BatchNorm2d):
                raise UserError(
                    "unsupported",
                    f"--sync-batch-norm does not support the network's {type(child).__name__};"
                    " omit --sync-batch-norm.",
                )
            setattr(parent, name, SynchronizedBatchNorm.of(child, world))


def running_statistics(network: nn.Module) -> list[Tensor]:
    """Return the running means and variances of all batch-norms in training mode, in order."""
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.training]
    found = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]
    return [tensor for tensor in found if tensor is not None]
