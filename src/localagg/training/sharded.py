"""The losses of a batch whose memory bank is split over the ranks by ranges of rows.

A step of R ranks, each with b = B/R samples and n = N/R rows of the bank::

    batch = gather(world, v, index, total=B)               # everyone's samples, [B, D]
    scored = local_aggregation(world, batch, bank, labels)  # each rank scores them on its rows
    embedding.backward(scored.gradient)                    # then add up the weights' gradients
    bank.update(batch.index, batch.embedding)              # each rank its own rows

What goes over the wire, payload bytes a rank hands to a collective (e = 4 in float32, 8 in
float64; H clusterings; nothing grows with N or K; with one rank nothing is called)::

    gather             2 all-gathers      b (e D + 8)
    local_aggregation  1 all-reduce       4 H B           labels of the batch's own rows
                       2 all-reduces      (e + 8) B       a floor, and how many rows reach it
                       1 all-reduce       3 e B           bounds of each query's threshold
                       1-6 all-reduces    256 B each      histograms (float64: 1-11), as a rule 5
                       (1 all-gather      8 T             of T queries tied at their last place)
                       1 all-reduce       24 B            sums (32 B where a share stays IR's)
                       1 reduce-scatter   e B D           gradient
    instance_softmax   1 all-reduce       e B             maximum of each query
                       1 all-reduce       2 e B           sums
                       1 reduce-scatter   e B D           gradient
    instance_nce       1 all-reduce       2 e             the two terms
                       1 reduce-scatter   e B D           gradient
    nearest_rows       2 all-gathers      (e + 8) Q k     candidates, once a batch of queries

Where K >= N nothing is to be selected: one all-reduce of e B takes the place of floor, bounds and
histograms. There is no floor where ranks have fewer than ``SAMPLED_FROM`` rows. Queries go in
groups of ``QUERIES``, and the lines between labels and gradient are once a group, so that the
candidates of a group bound the memory: some 30 bytes a candidate, of which a query has about K/R,
and a third more before they are selected.

Legend of shape suffixes: B the batch of all ranks, D embedding size, C places for candidates of
this rank, F noise draws of it (of all queries, one after the other), H clusterings.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..bank import MemoryBank
from ..distributed.collectives import World
from ..engine import ragged
from ..engine import search as streaming
from ..engine.topk import bounds, largest
from ..engine.torch_backend import flatnonzero
from ..objectives import NCE_PARTITION_PER_IMAGE

QUERIES = 8192  # scored at a time
SAMPLED_FROM = 4096  # rows of a rank
DEVIATIONS = 3  # of a sample's luck that a guess allows for: at 2, one step in 20 searched twice


class Batch(NamedTuple):
    """The samples of all ranks, in the order of the ranks; the same on each."""

    embedding: Tensor
    """Unit rows [B, D], without gradient."""
    index: Tensor
    """int64 [B]: rows of the whole bank, 0..N-1."""


class LossResult(NamedTuple):
    """A loss. The scalars are the same on every rank."""

    loss: Tensor
    """Scalar: the mean over the batch of all ranks."""
    gradient: Tensor
    """[b, D]: of that mean, in this rank's embedding."""
    notes: dict[str, Tensor]
    """Scalars: "without_close" of LA; "data_term" and "noise_term" of NCE."""


def gather(world: World, embedding: Tensor, index: Tensor, total: int) -> Batch:
    """The batch of all ranks.

    Args:
        world: the ranks.
        embedding: unit rows [b, D], this rank's share.
        index: int64 [b], its rows of the whole bank.
        total: B, samples of all ranks; rank r has ``share(total, r, R)`` of them.
    """
    return Batch(world.gather(embedding.detach(), total), world.gather(index, total))


# --- Local Aggregation ---------------------------------------------------------------------------


@torch.no_grad()
def local_aggregation(
    world: World,
    batch: Batch,
    bank: MemoryBank,
    labels: Tensor,
    *,
    neighbors: int = 4096,
    temperature: float = 0.07,
    eps: float = 1e-7,
    instance_share: float = 0.0,
) -> LossResult:
    """LA eq. 5 of the whole batch in the whole bank; see ``objectives.local_aggregation``.

    Args:
        world: the ranks.
        batch: of :func:`gather`.
        bank: this rank's rows, read before this step's update.
        labels: cluster labels of this rank's rows, int32 [H, n].
        neighbors: K background neighbors in the whole bank; more than N means all N. Ties at the
            K-th go to the lowest row.
        temperature: t > 0.
        eps: added to the ratio; a sample without a close neighbor contributes -log eps.
        instance_share: share of the loss that stays IR's; see ``neighbors.neighborhood_loss``.

    Returns:
        Loss and gradient, with the note "without_close": share of samples without close neighbor.
    """
    query_BD = _in_full_precision(batch.embedding, bank.rows)
    own_HB = _labels_of(world, labels, bank.part, batch.index)
    itself_B = batch.index - bank.part.start if instance_share else None
    parts = []
    for group in torch.arange(len(query_BD)).split(QUERIES):
        some = slice(int(group[0]), int(group[-1]) + 1)
        query, own = query_BD[some], own_HB[:, some]
        mixed = None if itself_B is None else (itself_B[some], instance_share)
        parts.append(
            _aggregate(world, query, bank, labels, own, neighbors, temperature, eps, mixed)
        )
    gradient_BD = torch.cat([part[0] for part in parts]).div_(len(query_BD))
    loss_B = torch.cat([part[1] for part in parts])
    alone_B = torch.cat([part[2] for part in parts])
    return LossResult(
        loss_B.mean().to(query_BD.dtype),
        _returned(world, gradient_BD, batch),
        {"without_close": alone_B.float().mean()},
    )


def _aggregate(
    world: World,
    query: Tensor,
    bank: MemoryBank,
    labels: Tensor,
    own: Tensor,
    neighbors: int,
    temperature: float,
    eps: float,
    mixed: tuple[Tensor, float] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a group of queries: the gradient [B, D] of the sum of their losses through this rank's
    rows; their losses [B]; and whether there is no close neighbor [B].

    A loss is a weighted sum of -log( P(A and B_i | v_i) / P(B_i | v_i) + eps ): A is C_i, and with
    ``mixed`` (this rank's row of each query, and a weight) also the query's own row."""
    rows_BC, sim_BC, top_B = _background(world, query, bank, neighbors)
    close_BC = streaming.close_rows(labels, own, rows_BC)
    sets = [(1.0, close_BC)]
    if mixed is not None:
        itself_B, share = mixed
        sets = [(1 - share, close_BC), (share, rows_BC == itself_B.unsqueeze(1))]
    # P up to a factor: the largest similarity of all ranks is taken out before the exponential.
    weight_BC = sim_BC.sub_(top_B.unsqueeze(1)).div_(temperature).exp_()
    terms = [weight_BC, *(weight_BC * inside_BC for _, inside_BC in sets), close_BC]
    # Sums in float64: in float32 a share near 1 would cost its rounding.
    sums = world.sum(torch.stack([term.sum(dim=1, dtype=torch.float64) for term in terms]))
    loss_B, slopes = torch.zeros_like(sums[0]), []
    for (weight, inside_BC), inside_B in zip(sets, sums[1:-1], strict=True):
        share_B = inside_B / sums[0]
        loss_B -= weight * torch.log(share_B + eps)
        # d loss / d sim_j = -P(j | B_i) (1 if j is inside, less the share) / (share + eps) / t
        scale_B = -weight / (sums[0] * (share_B + eps) * temperature)
        in_or_out = ((1 - share_B) * scale_B, -share_B * scale_B)
        slopes.append(torch.where(inside_BC, *(s.to(query.dtype).unsqueeze(1) for s in in_or_out)))
    slope_BC = weight_BC.mul_(slopes[0] if len(slopes) == 1 else slopes[0] + slopes[1])
    gradient_BD = streaming.weigh_rows(bank.rows, rows_BC.clamp(min=0), slope_BC)
    return gradient_BD, loss_B, sums[-1] == 0


def _background(
    world: World, query: Tensor, bank: MemoryBank, neighbors: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The background neighbors that are rows of this rank: rows and similarities [B, C], -1 and
    -inf in free places; and the largest similarity [B] of a query on any rank."""
    shared = world.size > 1 and neighbors < bank.size  # else all candidates are neighbors
    floor_B = _floor(world, query, bank, neighbors) if shared else None
    rows_BC, sim_BC = _candidates(query, bank, neighbors, floor_B)
    if not shared:
        top_B = (
            sim_BC.amax(dim=1) if sim_BC.shape[1] else sim_BC.new_full((len(query),), -torch.inf)
        )
        return rows_BC, sim_BC, world.maximum(top_B)
    if floor_B is not None:
        found_B = world.sum((rows_BC >= 0).sum(dim=1))
        short = (found_B < neighbors).nonzero().squeeze(1)  # the samples misled
        if len(short):
            floor_B[short] = -torch.inf
            rows_BC, sim_BC = _candidates(query, bank, neighbors, floor_B)
    low_B, top_B = bounds(world, sim_BC, neighbors)
    low_B = low_B if floor_B is None else torch.maximum(low_B, floor_B)
    chosen_BC = largest(world, sim_BC, rows_BC, neighbors, (low_B, top_B))
    return *streaming.compact_lists(rows_BC, sim_BC, chosen_BC), top_B


def _candidates(
    query: Tensor, bank: MemoryBank, neighbors: int, at_least: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(rows, similarity) [B, C] of this rank's K nearest rows, the lowest among equals, or those of
    them that reach ``at_least`` [B]; free places hold row -1 and similarity -inf."""
    if not len(bank.rows):
        none = query.new_empty(len(query), 0)
        return none.long(), none
    return streaming.nearest(query, bank.prepared, neighbors, at_least=at_least)


def _floor(world: World, query: Tensor, bank: MemoryBank, neighbors: int) -> Tensor | None:
    """A similarity [B] that K rows of all ranks most likely reach, so that each need not find K of
    its own; None where the bank is too small to sample.

    If K/R rows on every rank reach some similarity, K of all do; each rank guesses its own from a
    sample of its rows, and the lowest guess counts.
    """
    if bank.size // world.size < SAMPLED_FROM:
        return None
    n, wanted = len(bank.rows), -(-neighbors // world.size)
    count = min(n, max(SAMPLED_FROM // 2, min(n // 16, 4 * SAMPLED_FROM)))
    share = wanted * count / n
    rank = math.ceil(share + DEVIATIONS * (math.sqrt(share) + 1))
    if rank > count:
        guess_B = torch.full_like(query[:, 0], -torch.inf)
    else:
        guess_B = streaming.sample_threshold(query, bank.prepared, rank, count).to(query.dtype)
    return -world.maximum(-guess_B)


def _labels_of(world: World, labels: Tensor, part: range, index: Tensor) -> Tensor:
    """The labels [H, B] of rows of the whole bank; each rank gives those of its own rows."""
    mine, row = _own(part, index)
    own_HB = labels.new_zeros(len(labels), len(index))
    own_HB[:, mine] = labels[:, row]
    return world.sum(own_HB)


# --- Instance Recognition ------------------------------------------------------------------------


def instance_softmax(
    world: World, batch: Batch, bank: MemoryBank, *, temperature: float = 0.07
) -> LossResult:
    """IR with its exact partition over the whole bank; see ``objectives.instance_softmax``.

    Args:
        world: the ranks.
        batch: of :func:`gather`.
        bank: this rank's rows.
        temperature: t > 0.
    """
    query_BD, rows_nD = _in_full_precision(batch.embedding, bank.rows), bank.rows
    B = len(query_BD)
    query_BD = query_BD.detach().requires_grad_()
    with torch.enable_grad():
        if len(rows_nD):
            log_Z_B = streaming.log_partition(query_BD, rows_nD, temperature)
            (gradient_BD,) = torch.autograd.grad(log_Z_B.sum(), query_BD)
        else:
            log_Z_B, gradient_BD = (
                torch.full_like(query_BD[:, 0], -torch.inf),
                torch.zeros_like(query_BD),
            )
    with torch.no_grad():
        top_B = world.maximum(log_Z_B.detach().clone())
        mine, row = _own(bank.part, batch.index)
        sums_2B = query_BD.new_zeros(2, B)
        sums_2B[0] = torch.exp(log_Z_B - top_B)
        sums_2B[1, mine] = (query_BD[mine] * rows_nD[row].to(query_BD.dtype)).sum(
            dim=1
        ) / temperature
        share_B = sums_2B[0].clone()  # of Z that lies on this rank, before it is divided by Z
        world.sum(sums_2B)
        gradient_BD *= (share_B / sums_2B[0]).unsqueeze(1)
        gradient_BD[mine] -= rows_nD[row].to(query_BD.dtype) / temperature
        loss = (top_B + sums_2B[0].log() - sums_2B[1]).mean()
        return LossResult(loss, _returned(world, gradient_BD.div_(B), batch), {})


@torch.no_grad()
def instance_nce(
    world: World,
    batch: Batch,
    bank: MemoryBank,
    noise_index: Tensor,
    *,
    temperature: float = 0.07,
) -> LossResult:
    """IR by noise-contrastive estimation; see ``objectives.instance_nce``.

    Every rank has all noise draws, as they are a function of seed and step, and scores those that
    fall on its rows.

    Args:
        world: the ranks.
        batch: of :func:`gather`.
        bank: this rank's rows.
        noise_index: int64 [B, K], rows of the whole bank, of all samples; the same on every rank.
        temperature: t > 0.

    Returns:
        Loss and gradient, with the notes "data_term" and "noise_term".
    """
    eps = 1e-7  # the reference's, inside both denominators
    query_BD, rows_nD = _in_full_precision(batch.embedding, bank.rows), bank.rows
    B, N, K = len(query_BD), bank.size, noise_index.shape[1]
    Z, base = NCE_PARTITION_PER_IMAGE * N, K / N

    mine, row = _own(bank.part, batch.index)
    p_b = torch.exp((query_BD[mine] * rows_nD[row].to(query_BD.dtype)).sum(dim=1) / temperature) / Z
    gradient_BD = torch.zeros_like(query_BD)
    slope_b = -(base + eps) / (p_b + base + eps) / temperature
    gradient_BD[mine] = slope_b.unsqueeze(1) * rows_nD[row].to(query_BD.dtype)

    here_BK = (noise_index >= bank.part.start) & (noise_index < bank.part.stop)
    counts_B = here_BK.sum(dim=1)
    rows_F = noise_index.flatten()[flatnonzero(here_BK.flatten())] - bank.part.start
    q_F = torch.exp(ragged.similarities(query_BD, rows_nD, rows_F, counts_B) / temperature) / Z
    slope_F = q_F / (q_F + base + eps) / temperature
    gradient_BD += ragged.weighted_rows(rows_nD, rows_F, slope_F, counts_B)

    terms = torch.stack(
        [-torch.log(p_b / (p_b + base + eps)).sum(), -torch.log(base / (q_F + base + eps)).sum()]
    )
    data_term, noise_term = world.sum(terms) / B
    gradient = _returned(world, gradient_BD.div_(B), batch)
    notes = {"data_term": data_term, "noise_term": noise_term}
    return LossResult(data_term + noise_term, gradient, notes)


# --- Plumbing -------------------------------------------------------------------------------------


def _own(part: range, index: Tensor) -> tuple[Tensor, Tensor]:
    """(positions in ``index`` of the rows that this rank has, those rows counted from its first)"""
    mine = flatnonzero((index >= part.start) & (index < part.stop))
    return mine, index[mine] - part.start


def _returned(world: World, gradient: Tensor, batch: Batch) -> Tensor:
    """This rank's samples' part of the gradient, summed over ranks, in the embedding's dtype."""
    return world.scatter_sum(gradient).to(batch.embedding.dtype)


def _in_full_precision(embedding: Tensor, bank: Tensor) -> Tensor:
    """The embedding in the common dtype of both, at least float32."""
    dtype = torch.promote_types(embedding.dtype, bank.dtype)
    return embedding.to(torch.promote_types(dtype, torch.float32))
