"""Who is around each embedding of a batch in the bank: the neighbors and the loss of an LA step.

The search itself is :func:`nearest` of ``streaming``, which chooses among engines by device and
size; each is exact and holds no B x N array.
"""

from typing import NamedTuple

from torch import Tensor

from ..engine.search import estimate_search_bytes, missing_backend_note, nearest, store_by_row
from ..engine.searchable_bank import SearchableBank
from ..objectives import aggregation_loss, background_neighbors, close_neighbors, mixed_loss

__all__ = [
    "Neighborhood",
    "SearchableBank",
    "estimate_search_bytes",
    "find_neighbors",
    "missing_backend_note",
    "nearest",
    "neighborhood_loss",
    "store_by_row",
]


class Neighborhood(NamedTuple):
    """The neighbors of a batch. B samples, K background neighbors each, in no order."""

    rows: Tensor
    """int64 [B, K]: bank rows of the background neighbors B_i."""
    similarity: Tensor
    """float [B, K]: v_i . M_j for them."""
    close: Tensor
    """bool [B, K]: which of them are close neighbors (in C_i)."""
    index: Tensor
    """int64 [B]: the bank row of each sample itself."""

    @property
    def without_close(self) -> Tensor:
        """Share of samples with no close neighbor among the background: scalar in 0-1."""
        return (~self.close.any(dim=1)).float().mean()


def find_neighbors(
    embedding: Tensor,
    bank: Tensor | SearchableBank,
    labels: Tensor,
    index: Tensor,
    *,
    neighbors: int,
) -> Neighborhood:
    """Background and close neighbors of a batch; LA section 3.1.

    Args:
        embedding: unit rows [B, D].
        bank: [N, D], or one that is prepared for many searches.
        labels: cluster labels, int [H, N]; quickest from :func:`store_by_row`.
        index: int64 [B], the bank row of each sample.
        neighbors: K; more than N means all N. Ties at the K-th go to the lowest index.

    Returns:
        A :class:`Neighborhood`, without gradients.

    Raises:
        UserError: on a processor, values that are not finite.
    """
    rows, similarity = background_neighbors(embedding, bank, neighbors)
    return Neighborhood(rows, similarity, close_neighbors(labels, index, rows), index)


def neighborhood_loss(
    embedding: Tensor,
    bank: Tensor | SearchableBank,
    found: Neighborhood,
    *,
    temperature: float = 0.07,
    instance_share: float = 0.0,
) -> Tensor:
    """The LA loss of a batch, given its neighborhood; see ``objectives.aggregation_loss``.

    With an ``instance_share`` it is ``objectives.mixed_loss``.

    Args:
        embedding: unit rows [B, D].
        bank: [N, D].
        found: of :func:`find_neighbors`.
        temperature: t > 0.
        instance_share: s in [0, 1].
    """
    neighborhood = (
        *(embedding, bank.rows if isinstance(bank, SearchableBank) else bank),
        *(found.rows, found.close),
    )
    options = {"similarity": found.similarity, "temperature": temperature}
    if not instance_share:
        return aggregation_loss(*neighborhood, **options)
    return mixed_loss(*neighborhood, found.index, instance_share=instance_share, **options)
