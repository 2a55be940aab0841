"""Measurements by nearest neighbors: of a run while it learns, and of a finished one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from .checkpoint import latest, load_bank, load_encoder, load_views, read_progress, read_run
from .config import PretrainConfig, UserError, ViewConfig
from .data.loader import decoded, typical_side
from .data.sources import Source, open_evaluation, open_images
from .device import make_fabric
from .embed import embed
from .knn import knn_accuracy
from .logbook import showing
from .models import Encoder
from .sizing import resolve

_LEAVE_ONE_OUT = 5000  # bank rows asked about where nothing is held out


class OnlineNeighbors:
    """1-NN (the reference's online validation) and weighted 200-NN accuracy on the bank.

    Held-out images ask the bank; where the data have no held-out split, up to 5,000 rows of the
    bank ask the others (named ``loo_knn1``, ``loo_knn200``). Without labels nothing is measured.

    Args:
        config: resolved; its views decide what is embedded.
        data: data URI, asked for its split "val".
        source: what is learned from.
        valid: int64, the rows of the bank that are learned.
    """

    def __init__(
        self,
        config: PretrainConfig,
        data: str,
        source: Source,
        valid: Tensor,
        k: Sequence[int] = (1, 200),
    ) -> None:
        self.config, self.valid, self.labels, self.k = config, valid, source.labels, k
        self.held_out: Source | None = None
        self.pixels: Tensor | None = None
        if self.labels is None or not config.eval_every:
            return
        held_out = open_evaluation(data)
        if held_out is not None and held_out.labels is not None:
            self.held_out, self.names = held_out, translation(data, source, held_out)
            self.pixels = decoded(held_out, config)

    def __call__(self, encoder: Encoder, bank: Tensor, fabric: Fabric) -> dict[str, float]:
        """Accuracies in 0-1 by name, with the network in ``fabric``'s precision; empty without
        labels."""
        if self.labels is None:
            return {}
        valid = self.valid.to(bank.device)
        known, labels = bank[valid], self.labels.to(bank.device)[valid]
        if self.held_out is None:
            asked = self.asked(len(valid)).to(bank.device)
            found = knn_accuracy(
                known[asked], labels[asked], known, labels, k=self.k, exclude=asked
            )
            return {f"loo_{name}": value for name, value in found.items()}
        queries = embed(
            encoder,
            self.held_out,
            self.config.views,
            pixels=self.pixels,
            workers=self.config.workers,
            autocast=fabric.autocast,
        )
        assert queries.labels is not None
        asked_labels = self.names[queries.labels]
        return knn_accuracy(queries.rows, asked_labels, known, labels, k=self.k)

    @staticmethod
    def asked(size: int) -> Tensor:
        """Which of ``size`` rows are asked where nothing is held out: int64, evenly spread."""
        return torch.arange(0, size, max(1, size // _LEAVE_ONE_OUT))


def measure_run(
    run: Path, *, data: str | None, against: str, k: Sequence[int], workers: int
) -> dict[str, Any]:
    """Accuracy of a run's embedding by nearest neighbors.

    Args:
        run: run folder, or weights file (then only against embeddings).
        data: data URI; None: the run's own.
        against: "bank", the run's memory bank; or "embeddings", fresh ones of the training split.
        k: numbers of neighbors.
        workers: processes that decode.

    Returns:
        {"accuracy": {name: 0-1}, "asked", "known": images, "against", "data", "run"}.

    Raises:
        UserError: no labels, no bank of these images, or no such run.
    """
    if min(k) < 1:
        raise UserError(f"--k is {' '.join(map(str, k))}; it must be at least 1.")
    fabric = make_fabric()
    encoder = load_encoder(run).to(fabric.device)
    facts = read_run(run)[1] if run.is_dir() else {}
    data = data or facts.get("data")
    if data is None:
        raise UserError(f"'{run}' is a weights file; name the images with --data.")
    source = open_images(data)
    if source.labels is None:
        raise UserError(f"'{data}' has no labels to measure against; put each class in a folder.")
    config = PretrainConfig(views=load_views(run) or ViewConfig(), workers=workers)
    config = resolve(config, len(source), typical_side(source))
    if against == "bank":
        bank, valid = _own_bank(run, data, source, facts)
    else:
        bank, valid = _fresh_bank(encoder, source, config, fabric)
    measure = OnlineNeighbors(config, data, source, valid, k)
    bank = bank.to(fabric.device)
    asked = len(measure.asked(len(valid)) if measure.held_out is None else measure.held_out)
    return {
        "accuracy": measure(encoder, bank, fabric),
        "asked": asked,
        "known": len(valid),
        "against": "the memory bank" if against == "bank" else "the training images",
        "data": data,
        "run": str(run),
    }


def _own_bank(run: Path, data: str, source: Source, facts: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The run's memory bank, and which of its rows were learned."""
    if source.fingerprint() != facts.get("fingerprint"):
        raise UserError(
            f"'{run}' has no memory bank of '{data}' ({len(source):,} images);"
            " use --against embeddings."
        )
    valid = torch.ones(len(source), dtype=torch.bool)
    valid[read_progress(latest(run))["unreadable"]] = False
    return load_bank(run), valid.nonzero().squeeze(1)


def _fresh_bank(
    encoder: Encoder, source: Source, config: PretrainConfig, fabric: Fabric
) -> tuple[Tensor, Tensor]:
    """Embeddings of the training images now, and which of them could be read."""
    with showing("embedding") as show:
        found = embed(
            encoder,
            source,
            config.views,
            workers=config.workers,
            autocast=fabric.autocast,
            on_progress=show,
        )
    bank = torch.zeros(len(source), found.rows.shape[1])
    bank[found.index] = found.rows.cpu()
    return bank, found.index


def translation(data: str, source: Source, held_out: Source) -> Tensor:
    """Held-out labels to training labels, by class name: int64 [held-out classes].

    Raises:
        UserError: held-out classes that the training images do not have.
    """
    number = {name: label for label, name in enumerate(source.classes or ())}
    names = held_out.classes or []
    if unknown := [name for name in names if name not in number]:
        raise UserError(
            f"The held-out images of '{data}' have classes that the training images lack:"
            f" {', '.join(unknown[:5])}; rename them, or measure nothing with --eval-every 0."
        )
    return torch.tensor([number[name] for name in names])
