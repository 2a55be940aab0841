"""The engine under LA: who is around each embedding of a batch in the bank.

Exact and tiled. Beyond bank and labels a search holds at most one tile of similarities
(``objectives.TOP_TILE_BYTES``, 32 MiB, or 2 K columns if that is more) with its candidates, and a
few [B, K + 1] arrays, whatever N is. At B = 128, K = 4096 this is some 100 MiB.
"""

from typing import NamedTuple

from torch import Tensor

from .objectives import aggregation_loss, background_neighbors, close_neighbors


class Neighborhood(NamedTuple):
    """The neighbors of a batch. B samples, K background neighbors each, in no order."""

    rows: Tensor
    """int64 [B, K]: bank rows of the background neighbors B_i."""
    similarity: Tensor
    """float [B, K]: v_i . M_j for them."""
    close: Tensor
    """bool [B, K]: which of them are close neighbors (in C_i)."""

    @property
    def without_close(self) -> Tensor:
        """Share of samples with no close neighbor among the background: scalar in 0-1."""
        return (~self.close.any(dim=1)).float().mean()


def find_neighbors(
    embedding: Tensor, bank: Tensor, labels: Tensor, index: Tensor, *, neighbors: int
) -> Neighborhood:
    """Background and close neighbors of a batch; LA section 3.1.

    Args:
        embedding: unit rows [B, D].
        bank: [N, D].
        labels: cluster labels, int [H, N].
        index: int64 [B], the bank row of each sample.
        neighbors: K; more than N means all N. Ties at the K-th go to the lowest index.

    Returns:
        A :class:`Neighborhood`, without gradients.
    """
    rows, similarity = background_neighbors(embedding.detach(), bank, neighbors)
    return Neighborhood(rows, similarity, close_neighbors(labels, index, rows))


def neighborhood_loss(
    embedding: Tensor, bank: Tensor, found: Neighborhood, *, temperature: float = 0.07
) -> Tensor:
    """The LA loss of a batch, given its neighborhood; see ``objectives.aggregation_loss``."""
    return aggregation_loss(
        embedding,
        bank,
        found.rows,
        found.close,
        similarity=found.similarity,
        temperature=temperature,
    )
