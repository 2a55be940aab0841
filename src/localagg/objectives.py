"""Every equation of Instance Recognition (IR) and Local Aggregation (LA), in paper order.

Papers: IR is Wu, Xiong, Yu & Lin, "Unsupervised Feature Learning via Non-Parametric Instance
Discrimination", CVPR 2018 (arXiv 1805.01978). LA is Zhuang, Zhai & Yamins, "Local Aggregation for
Unsupervised Learning of Visual Embeddings", ICCV 2019 (arXiv 1903.12355). "The reference" is the
TensorFlow program published with LA.

Legend of shape suffixes: B batch, N images (rows of the memory bank), D embedding size,
K background neighbors or noise draws, H clusterings. In the equations v_i is row i of the batch
[B, D], M the bank [N, D], t the temperature, m the bank's momentum, g the cluster labels [H, N].

All functions are pure and take any floating dtype and device. Sums run in at least float32. No
B x N array is held by a loss: the bank is read in tiles of at most ``TOP_TILE_BYTES`` of
similarities. The bank gets no gradient; it moves by :func:`momentum_update` alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

# Similarities held at a time. Products stream through tiles that stay in a core's cache; the top-k
# has a cost per tile and wants long ones. Measured on 2 cores at N = 50,000.
PRODUCT_TILE_BYTES = 1 << 20
TOP_TILE_BYTES = 32 << 20

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
    embedding, bank = _in_full_precision(embedding, bank)
    return F.softmax(embedding @ bank.T / temperature, dim=1)


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
    embedding, bank = _in_full_precision(embedding, bank)
    log_Z_B = _LogPartition.apply(embedding, bank, temperature)
    sim_B = (embedding * bank[index]).sum(dim=1)
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
    embedding, bank = _in_full_precision(embedding, bank)
    N, K = len(bank), noise_index.shape[1]
    Z = NCE_PARTITION_PER_IMAGE * N
    p_B = torch.exp((embedding * bank[index]).sum(dim=1) / temperature) / Z
    q_BK = torch.exp(_RowSimilarity.apply(embedding, bank, noise_index, None) / temperature) / Z
    data_term = -torch.log(p_B / (p_B + K / N + eps)).mean()
    noise_term = -torch.log((K / N) / (q_BK + K / N + eps)).sum(dim=1).mean()
    return data_term + noise_term, data_term, noise_term


# --- Local Aggregation: among the background neighbors, pull the close ones -----------------------


def background_neighbors(embedding: Tensor, bank: Tensor, neighbors: int) -> tuple[Tensor, Tensor]:
    """B_i: the K bank rows with the largest v_i . M_j (LA section 3.1). Self is not excluded.

    Exact, by tiles of the bank. Where several rows tie at the K-th similarity the lowest indices
    are taken, as the reference's ``top_k`` does. K > N gives all N rows.

    Args:
        embedding: [B, D], finite.
        bank: [N, D].
        neighbors: K >= 1.

    Returns:
        (rows, similarity): int64 and float [B, min(K, N)], in no particular order.
    """
    with torch.no_grad():
        embedding, bank = _in_full_precision(embedding, bank)
        B, N = len(embedding), len(bank)
        if neighbors >= N:
            rows_BN = torch.arange(N, device=bank.device).expand(B, N)
            return rows_BN, embedding @ bank.T
        sim_BK, rows_BK = _top_rows(embedding, bank, neighbors + 1)
        # One more than asked for: equal K-th and (K+1)-th values betray a tie across the boundary.
        tied = (sim_BK[:, -1] == sim_BK[:, -2]).nonzero().squeeze(1).tolist()
        sim_BK, rows_BK = sim_BK[:, :-1].contiguous(), rows_BK[:, :-1].contiguous()
        for i in tied:
            sim_N = bank @ embedding[i]
            kth = sim_N.topk(neighbors).values[-1]
            above, equal = sim_N > kth, sim_N == kth
            lowest = equal & (equal.cumsum(0) <= neighbors - above.sum())
            rows_BK[i] = (above | lowest).nonzero().squeeze(1)
            sim_BK[i] = sim_N[rows_BK[i]]
        return rows_BK, sim_BK


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
    close_BK = torch.zeros_like(rows, dtype=torch.bool)
    for labels_N in labels:
        close_BK |= labels_N[rows] == labels_N[index].unsqueeze(1)
    return close_BK


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
    embedding, bank = _in_full_precision(embedding, bank)
    sim_BK = _RowSimilarity.apply(embedding, bank, rows, similarity)
    share_B = (F.softmax(sim_BK / temperature, dim=1) * close).sum(dim=1)
    return -torch.log(share_B + eps).mean()


def local_aggregation(
    embedding: Tensor,
    bank: Tensor,
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
        bank: [N, D], read before this step's update.
        labels: cluster labels, int [H, N].
        index: int64 [B], the bank row of each sample.
        neighbors: K; more than N means all N.
        temperature: t > 0.
        eps: added to the ratio; a sample without a close neighbor contributes -log eps.

    Returns:
        Scalar mean loss, differentiable in ``embedding``.
    """
    rows_BK, sim_BK = background_neighbors(embedding, bank, neighbors)
    close_BK = close_neighbors(labels, index, rows_BK)
    return aggregation_loss(
        embedding, bank, rows_BK, close_BK, similarity=sim_BK, temperature=temperature, eps=eps
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
        rows_, embedding_ = _in_full_precision(rows, embedding)
        return F.normalize(momentum * rows_ + (1 - momentum) * embedding_, dim=1).to(rows.dtype)


# --- Plumbing: tiles, and gradients that never gather [B, K, D] -----------------------------------


def _in_full_precision(*tensors: Tensor) -> list[Tensor]:
    """The tensors in their common dtype, at least float32. A no-op on float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def _tile_rows(embedding: Tensor, tile_bytes: int) -> int:
    """How many bank rows make a tile of ``tile_bytes`` of similarities with these queries."""
    return max(1, tile_bytes // (max(1, len(embedding)) * embedding.element_size()))


def _top_rows(embedding: Tensor, bank: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(similarity, rows) of the ``count`` most similar bank rows, largest first, [B, count]."""
    B, N = len(embedding), len(bank)
    tile = max(_tile_rows(embedding, TOP_TILE_BYTES), 2 * count)
    sim_BK, rows_BK = (
        embedding.new_empty(B, 0),
        torch.empty_like(embedding[:, :0], dtype=torch.int64),
    )
    for start in range(0, N, tile):
        sim_BT = embedding @ bank[start : start + tile].T
        top = sim_BT.topk(min(count, sim_BT.shape[1]), dim=1, sorted=False)
        sim_BK = torch.cat([sim_BK, top.values], dim=1)
        rows_BK = torch.cat([rows_BK, top.indices + start], dim=1)
        last = start + tile >= N
        best = sim_BK.topk(min(count, sim_BK.shape[1]), dim=1, sorted=last)
        sim_BK, rows_BK = best.values, rows_BK.gather(1, best.indices)
    return sim_BK, rows_BK


class _LogPartition(Function):
    """log sum_j exp(v . M_j / t) [B]; its gradient is the softmax-weighted mean row over t.

    Log-sum-exp and weighted mean are carried from tile to tile with a running maximum.
    """

    @staticmethod
    def forward(ctx, embedding: Tensor, bank: Tensor, temperature: float) -> Tensor:
        B, N = len(embedding), len(bank)
        tile = min(N, _tile_rows(embedding, PRODUCT_TILE_BYTES))
        query_BD = embedding / temperature
        max_B1 = embedding.new_full((B, 1), -torch.inf)
        sum_B1 = embedding.new_zeros(B, 1)
        mean_BD = torch.zeros_like(embedding)
        for start in range(0, N, tile):
            rows_TD = bank[start : start + tile]
            sim_BT = query_BD @ rows_TD.T
            new_max_B1 = torch.maximum(max_B1, sim_BT.amax(dim=1, keepdim=True))
            shrink_B1 = torch.exp(max_B1 - new_max_B1)
            weight_BT = sim_BT.sub_(new_max_B1).exp_()
            sum_B1 = sum_B1 * shrink_B1 + weight_BT.sum(dim=1, keepdim=True)
            mean_BD = torch.addmm(mean_BD * shrink_B1, weight_BT, rows_TD)
            max_B1 = new_max_B1
        ctx.save_for_backward(mean_BD / sum_B1 / temperature)
        return (max_B1 + sum_B1.log()).squeeze(1)

    @staticmethod
    def backward(ctx, grad_B: Tensor):
        (grad_BD,) = ctx.saved_tensors
        return grad_B.unsqueeze(1) * grad_BD, None, None


class _RowSimilarity(Function):
    """v_i . M_j for listed rows j [B, K], without holding the [B, K, D] that they gather to."""

    @staticmethod
    def forward(ctx, embedding: Tensor, bank: Tensor, rows: Tensor, known: Tensor | None) -> Tensor:
        ctx.save_for_backward(bank, rows)
        if known is not None:
            return known.to(embedding.dtype, copy=True)
        step = max(1, TOP_TILE_BYTES // (rows.shape[1] * bank.shape[1] * bank.element_size()))
        sim = [
            torch.bmm(bank[rows[i : i + step]], embedding[i : i + step].unsqueeze(2)).squeeze(2)
            for i in range(0, len(rows), step)
        ]
        return torch.cat(sim)

    @staticmethod
    def backward(ctx, grad_BK: Tensor):
        bank, rows = ctx.saved_tensors
        grad_BD = F.embedding_bag(rows, bank, per_sample_weights=grad_BK.contiguous(), mode="sum")
        return grad_BD, None, None, None
