"""Accuracy by nearest neighbors while a run learns."""

from collections.abc import Sequence

from lightning.fabric import Fabric
from torch import Tensor

from ..config import PretrainConfig
from ..data.loading.scan import load_or_scan
from ..data.sources.open import Source
from ..distributed.collectives import World
from ..io.console import notify
from ..models import Encoder
from .knn import knn_accuracy
from .knn_queries import QuerySelection, Unmeasurable, embed_queries, prefixed, select_queries
from .sharded_knn import shared_accuracy


class OnlineKnn:
    """1-NN (the reference's online validation) and weighted 200-NN accuracy on the bank.

    Held-out images ask the bank; where there are none with labels, its own rows ask each other
    (named ``loo_knn1``, ``loo_knn200``); see :func:`select_queries`. Where there are no labels, or none
    that tell anything, nothing is measured.

    Args:
        config: resolved; its views decide what is embedded.
        data: data URI, asked for its split "val".
        source: what is learned from.
        valid: int64, the rows of the bank that are learned.
        k: numbers of neighbors.
        world: the ranks that the bank is split over. None: this process has it.

    Raises:
        UserError: held-out images of classes that the training images do not have by name.
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
        self.config, self.k, self.world = config, tuple(k), world or World()
        self.part = self.world.part(len(source))
        self.choice: QuerySelection | None = None
        self.pixels: Tensor | None = None
        if source.labels is None or not config.eval_every:
            return
        try:
            self.choice = self.world.rank_zero_first(lambda: select_queries(data, source, valid))
        except Unmeasurable as error:
            notify(f"Nothing is measured while learning: {error}")
            return
        for note in self.choice.notes:
            notify(note)
        if self.choice.held_out is not None:
            self.pixels = load_or_scan(
                self.choice.held_out,
                upright=config.views.exif_orientation,
                memory=config.memory,
                memory_gb=config.memory_gb,
                workers=config.workers,
            ).complete_pixels

    def __call__(self, encoder: Encoder, bank: Tensor, fabric: Fabric) -> dict[str, float]:
        """Accuracies in 0-1 by name, with the network in ``fabric``'s precision; empty where
        nothing is measured. Of several ranks each brings its rows of the bank."""
        if self.choice is None:
            return {}
        if self.world.size > 1:
            accuracy = shared_accuracy(
                self.world,
                self.choice,
                encoder,
                bank,
                self.part,
                self.config.views,
                k=self.k,
                pixels=self.pixels,
                workers=self.config.workers,
                autocast=fabric.autocast,
            )
            return prefixed(self.choice, accuracy)
        found = embed_queries(
            self.choice,
            encoder,
            bank,
            self.config,
            pixels=self.pixels,
            autocast=fabric.autocast,
        )
        return prefixed(self.choice, knn_accuracy(**found._asdict(), k=self.k))
