"""Batch-norm whose statistics are those of the whole batch, where it is split over ranks."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserError
from .collectives import World


class SynchronizedBatchNorm(nn.SyncBatchNorm):
    """Batch-norm by the mean and variance over all ranks' samples; torch's own on CUDA, where
    ``nn.SyncBatchNorm`` knows no other device.

    Collectives in training: forward one all-gather of [2 C + 1], backward one all-reduce of [2, C].

    Attributes:
        per_rank: normalize by this rank's samples, as ``nn.BatchNorm2d`` does.
    """

    world: World
    per_rank: bool

    @classmethod
    def of(cls, norm: _BatchNorm, world: World) -> "SynchronizedBatchNorm":
        """A batch-norm with the parameters and statistics of another."""
        shared = cls(norm.num_features, norm.eps, norm.momentum, norm.affine)
        shared._parameters, shared._buffers = norm._parameters, norm._buffers
        shared.world, shared.per_rank = world, False
        return shared.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """Normalized [B, C, ...]."""
        if self.per_rank or not self.training:
            return _BatchNorm.forward(self, input)
        if input.is_cuda:
            return super().forward(input)
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        found, mean, variance, count = _Normalized.apply(
            input, self.weight, self.bias, self.eps, self.world
        )
        with torch.no_grad():
            for running, now in (
                (self.running_mean, mean),
                (self.running_var, variance * count / (count - 1)),
            ):
                assert running is not None
                running.lerp_(now.to(running.dtype), self.momentum)
        return found


class _Normalized(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, with mean and variance over all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, world: World):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        over = [0, *range(2, x.dim())]
        n = x.numel() // x.shape[1]
        mean = wide.sum(dim=over) / max(1, n)
        square = (wide - _columns(mean, x)).square().sum(dim=over)
        every = world.stack(torch.cat([mean, square, mean.new_tensor([n])]))  # [R, 2 C + 1]
        mean_RC, square_RC, n_R1 = every.split([len(mean), len(mean), 1], dim=1)
        count = n_R1.sum()
        mean = (mean_RC * n_R1).sum(dim=0) / count
        variance = (square_RC + n_R1 * (mean_RC - mean).square()).sum(dim=0) / count
        scale = (variance + eps).rsqrt()
        even = (wide - _columns(mean, x)) * _columns(scale, x)
        ctx.save_for_backward(even.to(x.dtype), weight, scale)
        ctx.world, ctx.count = world, count
        ctx.mark_non_differentiable(mean, variance, count)
        return (even * _columns(weight, x) + _columns(bias, x)).to(x.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, slope: Tensor, *_: Tensor):
        even, weight, scale = ctx.saved_tensors
        slope, even = slope.to(scale.dtype), even.to(scale.dtype)
        over = [0, *range(2, slope.dim())]
        of_bias, of_weight = slope.sum(dim=over), (slope * even).sum(dim=over)
        both = ctx.world.sum(torch.stack([of_bias, of_weight])) / ctx.count
        inner = slope - _columns(both[0], slope) - even * _columns(both[1], slope)
        of_x = inner * _columns(weight * scale, slope)
        return of_x.to(ctx.saved_tensors[0].dtype), of_weight, of_bias, None, None


def _columns(values: Tensor, like: Tensor) -> Tensor:
    """[C] so that it broadcasts over [B, C, ...]."""
    return values.view(1, -1, *[1] * (like.dim() - 2))


def synchronize_batch_norm(network: nn.Module, world: World) -> None:
    """Put a :class:`SynchronizedBatchNorm` in the place of each batch-norm.

    Raises:
        UserError: a batch-norm that does more than torch's, as some of timm's do.
    """
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if not isinstance(child, _BatchNorm):
                continue
            if type(child) not in (nn.BatchNorm1d, nn.BatchNorm2d):
                raise UserError(
                    "TODO",
                    f"--sync-batch-norm knows no {type(child).__name__}, which this network has;"
                    " leave it out.",
                )
            setattr(parent, name, SynchronizedBatchNorm.of(child, world))


def running_statistics(network: nn.Module) -> list[Tensor]:
    """The running means and variances of all batch-norms, in order."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    found = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]
    return [tensor for tensor in found if tensor is not None]
