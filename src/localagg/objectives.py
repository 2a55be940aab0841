"""Every equation of Instance Recognition (IR) and Local Aggregation (LA), in paper order.

Papers: IR is Wu, Xiong, Yu & Lin, "Unsupervised Feature Learning via Non-Parametric Instance
Discrimination", CVPR 2018 (arXiv 1805.01978). LA is Zhuang, Zhai & Yamins, "Local Aggregation for
Unsupervised Learning of Visual Embeddings", ICCV 2019 (arXiv 1903.12355). "The reference" is the
TensorFlow program published with LA.

Legend of shape suffixes: B batch, N images (rows of the memory bank), D embedding size,
K background neighbors or noise draws, H clusterings. In the equations v_i is row i of the batch
[B, D], M the bank [N, D], t the temperature, m the bank's momentum, g the cluster labels [H, N].

All functions are pure and take any floating dtype and device. Sums run in at least float32. No
B x N array is held by a loss: what passes over the bank is the engine's (``streaming``), in tiles.
The bank gets no gradient; it moves by :func:`momentum_update` alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .engine import search as streaming
from .engine.searchable_bank import SearchableBank

# The reference keeps the constant Z that Wu et al. estimated on ImageNet's 1,281,167 images, and
# scales it with N (instance_model.py: base_prob times this constant).
NCE_PARTITION_PER_IMAGE = 2876934.2 / 1281167


# --- The probability that v is recognized as image j: P(j | v) = exp(v . M_j / t) / Z ------------


def probability(embedding: Tensor, bank: Tensor, *, temperature: float = 0.07) -> Tensor:
    """P(j | v_i) = exp(v_i . M_j / t) / sum_n exp(v_i . M_n / t); IR eq. 2, LA eq. 1.

    This one does hold [B, N]; the losses below do not.

    Args:
        embedding: unit rows [B, D].
        bank: unit rows [N, D].
        temperature: t > 0.

    Returns:
        [B, N], rows sum to one, differentiable in ``embedding``.
    """
    embedding = _in_full_precision(embedding, bank)
    return F.softmax(embedding @ bank.to(embedding).T / temperature, dim=1)


def instance_softmax(
    embedding: Tensor, bank: Tensor, index: Tensor, *, temperature: float = 0.07
) -> Tensor:
    """IR with its exact partition: -mean_B log P(i | v_i); IR eq. 3. No sampling.

    One pass over the bank computes both log Z and its gradient (two products a tile).
    Deviation: the reference only has the sampled form, :func:`instance_nce`.

    Args:
        embedding: unit rows [B, D].
        bank: [N, D].
        index: int64 [B], the bank row of each sample.
        temperature: t > 0.

    Returns:
        Scalar mean loss, differentiable in ``embedding``.
    """
    embedding = _in_full_precision(embedding, bank)
    log_Z_B = streaming.log_partition(embedding, bank, temperature)
    sim_B = (embedding * bank[index].to(embedding)).sum(dim=1)
    return (log_Z_B - sim_B / temperature).mean()


def instance_nce(
    embedding: Tensor,
    bank: Tensor,
    index: Tensor,
    noise_index: Tensor,
    *,
    temperature: float = 0.07,
) -> tuple[Tensor, Tensor, Tensor]:
    """IR by noise-contrastive estimation; IR eqs. 5-7, with the reference's constant Z.

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
    embedding = _in_full_precision(embedding, bank)
    N, K = len(bank), noise_index.shape[1]
    Z = NCE_PARTITION_PER_IMAGE * N
    p_B = torch.exp((embedding * bank[index].to(embedding)).sum(dim=1) / temperature) / Z
    sim_BK = streaming.similarities(embedding, bank, noise_index)
    q_BK = torch.exp(sim_BK / temperature) / Z
    data_term = -torch.log(p_B / (p_B + K / N + eps)).mean()
    noise_term = -torch.log((K / N) / (q_BK + K / N + eps)).sum(dim=1).mean()
    return data_term + noise_term, data_term, noise_term


# --- Local Aggregation: among the background neighbors, pull the close ones -----------------------


def background_neighbors(
    embedding: Tensor, bank: Tensor | SearchableBank, neighbors: int
) -> tuple[Tensor, Tensor]:
    """B_i: the K bank rows with the largest v_i . M_j (LA section 3.1). Self is not excluded.

    Exact, see :func:`streaming.nearest`. Where several rows tie at the K-th similarity the lowest
    indices are taken, as the reference's ``top_k`` does. K > N gives all N rows.

    Args:
        embedding: [B, D].
        bank: [N, D], or one that is prepared for many searches.
        neighbors: K >= 1.

    Returns:
        (rows, similarity): int64 and float [B, min(K, N)], in no particular order.

    Raises:
        UserError: on a processor, values that are not finite.
    """
    return streaming.nearest(embedding, bank, neighbors)


def close_neighbors(labels: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Which of ``rows`` are in C_i: they share a cluster with i in any of the H clusterings.

    C_i = union over h of { j : g[h, j] = g[h, i] } (LA section 3.1).

    Args:
        labels: cluster labels, int [H, N].
        index: int64 [B], the bank row of each sample.
        rows: int64 [B, K], candidates j.

    Returns:
        bool [B, K].
    """
    return streaming.close_rows(labels, labels[:, index], rows)


def aggregation_loss(
    embedding: Tensor,
    bank: Tensor,
    rows: Tensor,
    close: Tensor,
    *,
    similarity: Tensor | None = None,
    temperature: float = 0.07,
    eps: float = 1e-7,
) -> Tensor:
    """LA eq. 5, given the neighbors: -mean_B log( P(C_i and B_i | v_i) / P(B_i | v_i) + eps ).

    P(A | v) = sum_{j in A} P(j | v); Z cancels, so the ratio is a softmax over B_i summed over
    C_i. A sample with no close neighbor contributes -log eps and no gradient.

    Args:
        embedding: unit rows [B, D].
        bank: [N, D].
        rows: int64 [B, K], the background neighbors.
        close: bool [B, K], which of them are close.
        similarity: v_i . M_j for ``rows`` if already known, [B, K]; its values are trusted.
        temperature: t > 0.
        eps: added to the ratio.

    Returns:
        Scalar mean loss, differentiable in ``embedding``.
    """
    embedding = _in_full_precision(embedding, bank)
    options = {"similarity": similarity, "temperature": temperature, "eps": eps}
    loss_B = streaming.aggregation(embedding, bank, rows, close, **options)
    if loss_B is None:  # no engine has this equation compiled
        sim_BK = streaming.similarities(embedding, bank, rows, similarity)
        sim_BK = sim_BK.to(_fine(sim_BK))  # in float32 a share near 1 would cost its rounding
        share_B = (F.softmax(sim_BK / temperature, dim=1) * close).sum(dim=1)
        loss_B = -torch.log(share_B + eps)
    return loss_B.mean().to(embedding.dtype)


def mixed_loss(
    embedding: Tensor,
    bank: Tensor,
    rows: Tensor,
    close: Tensor,
    index: Tensor,
    *,
    instance_share: float,
    similarity: Tensor | None = None,
    temperature: float = 0.07,
) -> Tensor:
    """(1 - s) LA + s IR among the background: LA with the sample as its only close neighbor, ::

        IR = -mean_B log( P(i | v_i) / P(B_i | v_i) + eps )

    Deviation: the paper has LA alone. docs/results.md has what the mixture does.

    Args:
        embedding: as of :func:`aggregation_loss`, like all that is not named here.
        bank: likewise.
        rows: likewise.
        close: likewise.
        index: int64 [B], the bank row of each sample.
        instance_share: s in [0, 1].
        similarity: likewise.
        temperature: likewise.

    Returns:
        Scalar mean loss, differentiable in ``embedding``.
    """
    options = {"similarity": similarity, "temperature": temperature}
    apart = aggregation_loss(embedding, bank, rows, rows == index.unsqueeze(1), **options)
    together = aggregation_loss(embedding, bank, rows, close, **options)
    return (1 - instance_share) * together + instance_share * apart


def local_aggregation(
    embedding: Tensor,
    bank: Tensor | SearchableBank,
    labels: Tensor,
    index: Tensor,
    *,
    neighbors: int = 4096,
    temperature: float = 0.07,
    eps: float = 1e-7,
) -> Tensor:
    """The LA objective of a batch, whole: :func:`background_neighbors` of each v_i,
    :func:`close_neighbors` among them, :func:`aggregation_loss` of the two.

    Args:
        embedding: unit rows [B, D].
        bank: [N, D], read before this step's update; or one that is prepared for many searches.
        labels: cluster labels, int [H, N].
        index: int64 [B], the bank row of each sample.
        neighbors: K; more than N means all N.
        temperature: t > 0.
        eps: added to the ratio; a sample without a close neighbor contributes -log eps.

    Returns:
        Scalar mean loss, differentiable in ``embedding``.

    Raises:
        UserError: on a processor, values that are not finite.
    """
    rows_BK, sim_BK = background_neighbors(embedding, bank, neighbors)
    close_BK = close_neighbors(labels, index, rows_BK)
    rows = bank.rows if isinstance(bank, SearchableBank) else bank
    return aggregation_loss(
        embedding, rows, rows_BK, close_BK, similarity=sim_BK, temperature=temperature, eps=eps
    )


# --- After the step: the memory bank follows ------------------------------------------------------


def momentum_update(rows: Tensor, embedding: Tensor, *, momentum: float = 0.5) -> Tensor:
    """M_i <- normalize(m M_i + (1 - m) v_i); LA section 3.2.

    Args:
        rows: the bank's rows of the batch [B, D].
        embedding: unit rows [B, D].
        momentum: m in [0, 1].

    Returns:
        [B, D] unit rows in the dtype of ``rows``, without gradient.
    """
    with torch.no_grad():
        embedding = _in_full_precision(embedding, rows)
        moved = momentum * rows.to(embedding.dtype) + (1 - momentum) * embedding
        return F.normalize(moved, dim=1).to(rows.dtype)


# --- Plumbing -------------------------------------------------------------------------------------


def _in_full_precision(embedding: Tensor, bank: Tensor) -> Tensor:
    """The embedding in the common dtype of both, at least float32."""
    dtype = torch.promote_types(embedding.dtype, bank.dtype)
    return embedding.to(torch.promote_types(dtype, torch.float32))


def _fine(values: Tensor) -> torch.dtype:
    """float64, where a device has it."""
    return values.dtype if values.device.type == "mps" else torch.float64
