"""Accuracy by nearest neighbors in the memory bank while a run learns."""

from collections.abc import Sequence

from lightning.fabric import Fabric
from torch import Tensor

from ..config import PretrainConfig
from ..data.images.levels import levels_of
from ..data.loading.scan import load_or_scan
from ..data.sources.open import Source
from ..distributed.collectives import World
from ..io.console import notify
from ..models import Encoder
from .knn import knn_accuracy
from .knn_queries import QuerySelection, Unmeasurable, embed_queries, select_queries
from .sharded_knn import sharded_accuracy


class OnlineKnn:
    """1-NN (the reference's online validation) and weighted 200-NN accuracy on the bank.

    Queries are the held-out images, or bank rows where none with labels are held out (named
    ``loo_knn1``, ``loo_knn200``); see :func:`select_queries`. Nothing is measured without usable
    labels.

    Args:
        config: resolved.
        data: data URI, opened for its split "val".
        source: the training images.
        valid: int64, the rows of the bank that are learned.
        k: numbers of neighbors.
        world: the ranks that share the bank. Default: this process has all of it.

    Raises:
        UserError: held-out classes that the training images lack by name.
    """

    def __init__(
        self,
        config: PretrainConfig,
        data: str,
        source: Source,
        valid: Tensor,
        k: Sequence[int] = (1, 200),
        world: World | None = None,
    ) -> None:
        self.config, self.k, self.world, self.size = config, k, world or World(), len(source)
        self.selection: QuerySelection | None = None
        self.pixels: Tensor | None = None
        if source.labels is None or not config.eval_every:
            return
        try:
            self.selection = self.world.rank_zero_first(lambda: select_queries(data, source, valid))
        except Unmeasurable as error:
            notify(f"No accuracy is measured during training: {error}")
            return
        for note in self.selection.notes:
            notify(note)
        if self.selection.held_out is not None:
            self.pixels = load_or_scan(
                self.selection.held_out,
                upright=config.views.exif_orientation,
                levels=levels_of(config.views),
                memory=config.memory,
                memory_gb=config.memory_gb,
                workers=config.workers,
            ).complete_pixels

    def __call__(self, encoder: Encoder, bank: Tensor, fabric: Fabric) -> dict[str, float]:
        """Return accuracies in 0-1 by name, or nothing where nothing is measured.

        Args:
            encoder: used in ``fabric``'s precision.
            bank: this rank's rows of the memory bank.
            fabric: precision.
        """
        if self.selection is None:
            return {}
        embedded = embed_queries(
            self.selection,
            encoder,
            bank,
            size=self.size,
            views=self.config.views,
            workers=self.config.workers,
            autocast=fabric.autocast,
            pixels=self.pixels,
            world=self.world,
        )
        if self.world.size == 1:
            accuracy = knn_accuracy(**embedded._asdict(), k=self.k)
        else:
            part = self.selection.reference_part(self.world.part(self.size))
            accuracy = sharded_accuracy(self.world, embedded, part, self.k)
        return self.selection.prefixed(accuracy)
