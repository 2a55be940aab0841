"""The rows that a bank begins with: embeddings by the untrained network, on one rank or many."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..bank import MemoryBank
from ..config import ViewConfig
from ..data.sources.open import Source
from ..distributed.batch_norm import per_rank_batch_norm
from ..distributed.collectives import World
from ..embeddings.embed import ImageEmbeddings, embed
from ..io.console import ProgressCallback
from ..models import Encoder

_BATCH = 256


@torch.no_grad()
def embed_bank(
    encoder: Encoder,
    bank: MemoryBank,
    world: World,
    source: Source,
    views: ViewConfig,
    *,
    pixels: Tensor | None,
    workers: int,
    autocast: Callable[[], AbstractContextManager],
    on_progress: ProgressCallback = lambda done, total: None,
) -> None:
    """Put the embedding of each image by the untrained network into its row.

    Batches of 256 images in their order are normalized by their own statistics, which batch-norm
    tracks. A rank embeds the batches that have rows of its part; one that two ranks have is
    embedded by both, and tracked by the rank that has its first row. Afterwards rows and running
    statistics are those of one rank that has embedded everything. Collectives: one all-gather of a
    number, and one all-reduce of each running statistic.

    Args:
        encoder: its running statistics are as they were made.
        bank: this rank's rows.
        world: the ranks.
        source: the images, one for each of the N rows.
        views: image_size and eval_crop.
        pixels: the decoded images, if they are in memory already.
        workers: processes that decode.
        autocast: precision context of the forward pass.
        on_progress: called with (images done, images).
    """
    norms = [m for m in encoder.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    first, last = bank.part.start // _BATCH, -(-bank.part.stop // _BATCH)
    begins = -(-bank.part.start // _BATCH)  # the first batch whose first row is of this part

    def fill(batches: slice) -> None:
        if batches.start < batches.stop:
            options: Any = {"pixels": pixels, "workers": workers, "autocast": autocast}
            options |= {
                "on_progress": on_progress,
                "batch": _BATCH,
                "batch_statistics": True,
                "part": batches,
            }
            _put(bank, embed(encoder, source, views, **options))

    before = [_tracked(norm) for norm in norms]
    with per_rank_batch_norm(encoder):
        fill(slice(first, min(begins, last)))
        for norm, (mean, variance, count) in zip(norms, before, strict=True):
            _set(norm, mean, variance, count)
        fill(slice(begins, last))
    if world.size > 1:
        _add_up(world, norms, before)


def _put(bank: MemoryBank, found: ImageEmbeddings) -> None:
    mine = (found.index >= bank.part.start) & (found.index < bank.part.stop)
    rows = found.rows[mine.to(found.rows.device)].to(bank.rows)
    bank.rows[(found.index[mine] - bank.part.start).to(bank.rows.device)] = rows


Tracked = tuple[Tensor, Tensor, Tensor]


def _tracked(norm: _BatchNorm) -> Tracked:
    """Running mean, running variance, and of how many batches."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    return norm.running_mean.clone(), norm.running_var.clone(), norm.num_batches_tracked.clone()


def _set(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    for buffer, value in zip(
        (norm.running_mean, norm.running_var, norm.num_batches_tracked),
        (mean, variance, count),
        strict=True,
    ):
        assert buffer is not None
        buffer.copy_(value)


def _add_up(world: World, norms: list[_BatchNorm], before: list[Tracked]) -> None:
    """A running statistic forgets a share m of itself at each batch: after n batches it is
    (1 - m)^n s_0 and what each batch has added, less what was forgotten since. So what a rank's
    batches have added is forgotten once for each batch of the ranks after it, and added up.
    """
    for norm, old in zip(norms, before, strict=True):
        new = _tracked(norm)
        counts = world.stack(new[2] - old[2]).tolist()  # batches of each rank
        keep = 1 - (norm.momentum or 0.0)
        mine, since = counts[world.rank], sum(counts[world.rank + 1 :])
        values = []
        for now, then in zip(new[:2], old[:2], strict=True):
            added = keep**since * (now - keep**mine * then)
            values.append(keep ** sum(counts) * then + world.sum(added))
        _set(norm, values[0], values[1], old[2] + sum(counts))
