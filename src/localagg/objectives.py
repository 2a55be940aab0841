"""Every equation of Instance Recognition (IR) and Local Aggregation (LA), in paper order.

Papers: IR is Wu, Xiong, Yu & Lin, "Unsupervised Feature Learning via Non-Parametric Instance
Discrimination", CVPR 2018 (arXiv 1805.01978). LA is Zhuang, Zhai & Yamins, "Local Aggregation for
Unsupervised Learning of Visual Embeddings", ICCV 2019 (arXiv 1903.12355). "The reference" is the
TensorFlow program published with LA.

Legend of shape suffixes: B batch, N images (rows of the memory bank), D embedding size,
K background neighbors or noise draws, C those of them that this rank holds (K on one rank),
H clusterings. In the equations v_i is row i of the batch [B, D], M the bank [N, D], t the
temperature, m the bank's momentum, g the cluster labels [H, N].

All functions are pure and take any floating dtype and device. A wrong argument raises UserError:
its kind, shape, device or range. Values are checked on CPUs alone: rows of the bank that it lacks
(index, noise_index), and rows that are not finite where neighbors are searched; elsewhere NaN gives
NaN. Sums run in at least float32. No loss
holds a B x N array: the engine passes over the bank in tiles. The bank gets no gradient; it moves
by :func:`momentum_update` alone.

A loss takes the whole bank, or the :class:`~localagg.engine.bank_shard.BankShard` of one of R
ranks. Then the batch is that of all ranks (``distributed.differentiable.gather_rows``), the value
is the same on every rank, and the gradient is the part that comes through this rank's rows. Beside
the engine's collectives this takes, in bytes (e = 4 in float32, 8 in float64)::

    aggregation_loss   1 all-reduce   16 B          sums of close and of other neighbors
    instance_softmax   2 all-reduces  e B + 2 e B   the largest exponent; sums
    instance_nce       1 all-reduce   2 e           the two terms
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import check_arguments, check_numbers, check_one_of, check_temperature
from .config.tensor_checks import check_integers, check_pairs, check_rows, check_sizes
from .engine import search
from .engine.bank_shard import BankShard, Neighbors
from .engine.searchable_bank import SearchableBank

# The reference keeps the constant Z that Wu et al. estimated on ImageNet's 1,281,167 images, and
# scales it with N (instance_model.py: base_prob times this constant).
NCE_PARTITION_PER_IMAGE = 2876934.2 / 1281167

Bank = Tensor | SearchableBank | BankShard
"""Rows [N, D]; prepared for many searches; or those of one rank."""


# --- The probability that v is recognized as image j: P(j | v) = exp(v . M_j / t) / Z ------------


def probability(embedding: Tensor, bank: Tensor, *, temperature: float = 0.07) -> Tensor:
    """Return P(j | v_i) = exp(v_i . M_j / t) / sum_n exp(v_i . M_n / t); IR eq. 2, LA eq. 1.

    This function holds [B, N]; the losses below do not.

    Args:
        embedding: unit rows [B, D].
        bank: unit rows [N, D].
        temperature: t > 0.

    Returns:
        [B, N], rows sum to one, differentiable in ``embedding``.
    """
    check_rows(embedding=embedding, bank=bank)
    check_temperature(temperature)
    v_BD = embedding.to(loss_dtype(embedding, bank))
    return F.softmax(v_BD @ bank.to(v_BD).T / temperature, dim=1)


def instance_softmax(
    embedding: Tensor,
    bank: Bank,
    index: Tensor,
    *,
    temperature: float = 0.07,
    precision: str = "float32",
) -> Tensor:
    """Return IR with its exact partition: -mean_B log P(i | v_i); IR eq. 3. No sampling.

    One pass over the bank computes both log Z and its gradient (two products a tile).
    Deviation: the reference only has the sampled form, :func:`instance_nce`.

    Args:
        embedding: unit rows [B, D].
        bank: [N, D].
        index: int64 [B], the bank row of each sample.
        temperature: t > 0.
        precision: of the products, float32 or bfloat16. bfloat16 rounds those of improbable rows
            where the CPU multiplies bfloat16 and a float32 bank has at least 4,096 rows; elsewhere
            all is exact. At t = 0.07 the loss is then off by at most 0.09, in practice by 1e-3; see
            ``engine.cpu_list_kernels``.

    Returns:
        Scalar mean loss, differentiable in ``embedding``.
    """
    shard = _checked_bank(embedding, bank, temperature)
    _check_index(index, embedding, shard)
    check_one_of("precision", precision, ("float32", "bfloat16"))
    v_BD = embedding.to(loss_dtype(embedding, shard.rows))
    rounded = precision == "bfloat16"
    log_Z_B = search.log_partition(v_BD, shard.bank, temperature, rounded=rounded)  # of these rows
    sim_B = shard.similarity_to_own(v_BD, index)
    top_B = shard.world.maximum(log_Z_B.detach().clone())
    terms_2B = torch.stack([torch.exp(log_Z_B - top_B), sim_B])
    Z_B, sim_B = shard.sum(terms_2B)
    return (top_B + Z_B.log() - sim_B / temperature).mean()


def instance_nce(
    embedding: Tensor,
    bank: Bank,
    index: Tensor,
    noise_index: Tensor,
    *,
    temperature: float = 0.07,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return IR by noise-contrastive estimation; IR eqs. 5-7, with the reference's constant Z.

    With p = P(i | v_i), q_k = P(noise_k | v_i), the noise density 1/N and eps = 1e-7::

        loss = -mean_B [ log p / (p + K/N + eps) + sum_k log (K/N) / (q_k + K/N + eps) ]

    Args:
        embedding: unit rows [B, D].
        bank: [N, D].
        index: int64 [B], the bank row of each sample.
        noise_index: int64 [B, K], rows drawn uniformly with replacement.
        temperature: t > 0.

    Returns:
        (loss, data term, noise term), scalars; loss is the sum of the two terms, which are both
        means over the batch and differentiable in ``embedding``.
    """
    eps = 1e-7  # the reference's, inside both denominators
    shard = _checked_bank(embedding, bank, temperature)
    _check_index(index, embedding, shard)
    # Training draws them itself, within the bank of all ranks: B K numbers are not searched again.
    below = None if shard is bank else shard.size
    shape = (len(embedding), "K")
    check_integers("noise_index", noise_index, shape, below, device=embedding.device)
    v_BD = embedding.to(loss_dtype(embedding, shard.rows))
    base, Z = noise_index.shape[1] / shard.size, NCE_PARTITION_PER_IMAGE * shard.size
    here_B, _ = shard.local(index)
    rows_BC = shard.listed(noise_index)
    p_B = torch.exp(shard.similarity_to_own(v_BD, index) / temperature) / Z
    sim_BC = search.similarities(v_BD, shard.rows, rows_BC.clamp(min=0))
    q_BC = torch.exp(sim_BC / temperature) / Z
    data_B = -torch.log(p_B / (p_B + base + eps)) * here_B
    noise_BC = -torch.log(base / (q_BC + base + eps)) * (rows_BC >= 0)
    terms_2 = torch.stack([data_B.sum(), noise_BC.sum()]) / len(v_BD)
    data_term, noise_term = shard.sum(terms_2)
    return data_term + noise_term, data_term, noise_term


# --- Local Aggregation: among the background neighbors, pull the close ones -----------------------


def background_neighbors(embedding: Tensor, bank: Bank, neighbors: int) -> Neighbors:
    """Return B_i: the K bank rows with the largest v_i . M_j (LA section 3.1), self included.

    Exact. Of rows that tie at the K-th similarity the lowest are taken, as by the reference's
    ``top_k``. K > N gives all N rows.

    Args:
        embedding: [B, D].
        bank: [N, D].
        neighbors: K >= 1.

    Returns:
        Rows int64 and similarities float [B, C], in no promised order.

    Raises:
        UserError: on a CPU, values that are not finite.
    """
    shard = _checked_bank(embedding, bank)
    check_arguments(neighbors=(neighbors, 1))
    return shard.nearest(embedding.detach(), int(neighbors))


def close_neighbors(
    labels: Tensor, index: Tensor, rows: Tensor, bank: BankShard | None = None
) -> Tensor:
    """Return which of ``rows`` are in C_i: they share a cluster with i in any of H clusterings.

    C_i = union over h of { j : g[h, j] = g[h, i] } (LA section 3.1).

    Args:
        labels: cluster labels, int [H, N]; of a shard, of its rows. Fastest from
            ``engine.search.store_by_row``.
        index: int64 [B], the bank row of each sample.
        rows: int64 [B, C], candidates j; -1 is never close.
        bank: the shard that the rows are of. Default: they are of the whole bank.

    Returns:
        bool [B, C].
    """
    check_integers("labels", labels, ("H", "N"))
    check_integers("index", index, ("B",), labels.shape[1] if bank is None else bank.size)
    check_integers("rows", rows, (len(index), "C"), device=index.device)
    own_HB = labels[:, index] if bank is None else bank.labels_of(labels, index)
    return search.close_rows(labels, own_HB, rows)


def aggregation_loss(
    embedding: Tensor,
    bank: Bank,
    background: Neighbors,
    close: Tensor,
    *,
    temperature: float = 0.07,
    eps: float = 1e-7,
) -> tuple[Tensor, Tensor]:
    """Return LA eq. 5 of each sample, -log( P(C_i and B_i | v_i) / P(B_i | v_i) + eps ).

    P(A | v) = sum_{j in A} P(j | v). Z cancels, so the ratio is a softmax over B_i, summed over
    C_i. A sample without a close neighbor contributes -log eps and no gradient. The gradient in
    v_i . M_j is -P(j | B_i) (1[j in C_i] - ratio) / (ratio + eps) / t.

    Args:
        embedding: unit rows [B, D].
        bank: [N, D].
        background: of :func:`background_neighbors`.
        close: bool [B, C], of :func:`close_neighbors`.
        temperature: t > 0.
        eps: added to the ratio.

    Returns:
        (loss, ratio), [B]; the loss is differentiable in ``embedding``.
    """
    shard = _checked_bank(embedding, bank, temperature)
    check_numbers(0, eps=eps)
    v_BD = embedding.to(loss_dtype(embedding, shard.rows))
    with torch.no_grad():
        weight_BC, sums_2B = search.exponential_sums(
            background.similarity, close, background.largest, temperature
        )
        close_B, other_B = shard.world.sum(sums_2B)  # float64: near 1 float32 would round the ratio
        ratio_B, rest_B = close_B / (close_B + other_B), other_B / (close_B + other_B)
        # For a ratio near 1 the rest is exact, and 1 - ratio is not.
        loss_B = torch.where(ratio_B < 0.5, -torch.log(ratio_B + eps), -torch.log1p(eps - rest_B))
        scale_B = 1 / ((close_B + other_B) * (ratio_B + eps) * temperature)
        rows_BC = background.rows if shard.world.size == 1 else background.rows.clamp(min=0)
        gradient_BD = search.weigh_split_rows(
            shard.rows, rows_BC, weight_BC, close, -rest_B * scale_B, ratio_B * scale_B
        )
    return search.with_gradient(v_BD, loss_B, gradient_BD), ratio_B


def mixed_loss(
    embedding: Tensor,
    bank: Bank,
    background: Neighbors,
    close: Tensor,
    index: Tensor,
    *,
    instance_share: float,
    temperature: float = 0.07,
) -> tuple[Tensor, Tensor]:
    """Return (1 - s) LA + s IR among the background neighbors, of each sample.

    IR here is LA whose only close neighbor is the sample: -log( P(i | v_i) / P(B_i | v_i) + eps ).
    Deviation: the paper has LA alone. docs/results.md has the effect of the mixture.

    Args:
        embedding: unit rows [B, D].
        bank: [N, D].
        background: of :func:`background_neighbors`.
        close: bool [B, C], of :func:`close_neighbors`.
        index: int64 [B], the bank row of each sample.
        instance_share: s in [0, 1]. 0 is :func:`aggregation_loss`.
        temperature: t > 0.

    Returns:
        (loss, ratio of LA), [B]; the loss is differentiable in ``embedding``.
    """
    check_numbers(0, 1, instance_share=instance_share)
    loss_B, ratio_B = aggregation_loss(embedding, bank, background, close, temperature=temperature)
    if instance_share:
        shard = BankShard.whole(bank)
        _check_index(index, embedding, shard)
        here_B, row_B = shard.local(index)
        itself_BC = (background.rows == row_B.unsqueeze(1)) & here_B.unsqueeze(1)
        instance_B, _ = aggregation_loss(
            embedding, bank, background, itself_BC, temperature=temperature
        )
        loss_B = (1 - instance_share) * loss_B + instance_share * instance_B
    return loss_B, ratio_B


def local_aggregation(
    embedding: Tensor,
    bank: Bank,
    labels: Tensor,
    index: Tensor,
    *,
    neighbors: int = 4096,
    temperature: float = 0.07,
    eps: float = 1e-7,
) -> Tensor:
    """Return the LA objective of a batch: the mean of :func:`aggregation_loss`.

    Args:
        embedding: unit rows [B, D].
        bank: [N, D], read before this step's update.
        labels: cluster labels, int [H, N]; of a shard, of its rows.
        index: int64 [B], the bank row of each sample.
        neighbors: K; more than N means all N.
        temperature: t > 0.
        eps: added to the ratio; a sample without a close neighbor contributes -log eps.

    Returns:
        Scalar mean loss, differentiable in ``embedding``.

    Raises:
        UserError: on a CPU, values that are not finite.
    """
    shard = _checked_bank(embedding, bank, temperature)
    _check_index(index, embedding, shard)
    check_integers("labels", labels, ("H", len(shard.rows)), device=embedding.device)
    check_numbers(0, eps=eps)
    background = background_neighbors(embedding, shard, neighbors)
    close_BC = close_neighbors(labels, index, background.rows, shard)
    options = {"temperature": temperature, "eps": eps}
    loss_B, _ = aggregation_loss(embedding, shard, background, close_BC, **options)
    return loss_B.mean().to(loss_dtype(embedding, shard.rows))


# --- After the step: the memory bank follows ------------------------------------------------------


def momentum_update(rows: Tensor, embedding: Tensor, *, momentum: float = 0.5) -> Tensor:
    """Return M_i <- normalize(m M_i + (1 - m) v_i); LA section 3.2.

    Args:
        rows: the bank's rows of the batch [B, D].
        embedding: unit rows [B, D].
        momentum: m in [0, 1].

    Returns:
        [B, D] unit rows in the dtype of ``rows``, without gradient.
    """
    check_rows(rows=rows, embedding=embedding)
    check_numbers(0, 1, momentum=momentum)
    check_pairs(rows=rows, embedding=embedding)
    with torch.no_grad():
        dtype = loss_dtype(embedding, rows)
        moved = momentum * rows.to(dtype) + (1 - momentum) * embedding.to(dtype)
        return F.normalize(moved, dim=1).to(rows.dtype)


def _checked_bank(embedding: Tensor, bank: Bank, temperature: float = 1.0) -> BankShard:
    """Check the arguments of a loss, and return the bank as a shard."""
    rows = bank.rows if isinstance(bank, BankShard | SearchableBank) else bank
    check_rows(embedding=embedding, bank=rows)
    check_temperature(temperature)
    shard = BankShard.whole(bank)
    check_sizes(embedding=len(embedding), bank=shard.size)
    return shard


def _check_index(index: Tensor, embedding: Tensor, shard: BankShard) -> None:
    check_integers("index", index, (len(embedding),), shard.size, device=embedding.device)


def loss_dtype(embedding: Tensor, bank: Tensor) -> torch.dtype:
    """Return the common dtype of both, at least float32."""
    dtype = torch.promote_types(embedding.dtype, bank.dtype)
    return torch.promote_types(dtype, torch.float32)
