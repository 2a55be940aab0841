"""Learn the built-in digits by IR and LA, and compare with computed floors."""

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import load_encoder, write_json
from ..config import PretrainConfig, ViewConfig, override
from ..data.images.augment import evaluation_view
from ..data.loading.scan import typical_side
from ..data.sources.open import Source, open_images
from ..embeddings.embed import embed
from ..errors import UserError
from ..evaluation.cluster_metrics import cluster_scores
from ..evaluation.knn import knn_accuracy
from ..io.console import notify
from ..io.metrics_log import read_metrics
from ..models import Encoder
from ..recipes.builtin import recipe
from ..recipes.derived_settings import resolve_defaults
from ..training.learner import Learner
from ..training.runs import pretrain
from .charts import learning_curves
from .embedding_page import Pictured, write_embedding_page
from .page import escape, table

Rows = tuple[Tensor, Tensor]  # unit rows of the training digits, and of the held-out ones
_CLUSTERINGS = 3
_START = "start"  # the IR epochs that both runs begin with
_RUNS = {"IR": "ir", "IR then LA": "ir-la"}
_FOLDERS = (_START, *_RUNS.values())
_FILES = {*_FOLDERS, "results.json", "report.html"}


def demo(out: Path, *, seed: int = 0) -> dict[str, Any]:
    """Learn the digits twice, by IR alone and by IR then LA, for the same number of epochs.

    Both runs begin with the same epochs of IR, which are run once.

    Args:
        out: folder to write. An earlier demo in it is replaced.
        seed: random seed of both runs.

    Returns:
        {"rows": [{"name", "knn1", "nmi", "cluster_accuracy"}], "seconds": {name: s}, "seed"}, also
        written to ``out/results.json`` and shown in ``out/report.html``. Rows: raw pixels, the
        untrained network, IR, IR then LA. 1-NN accuracy is of the held-out digits; clusters are of
        the training digits, means of three k-means clusterings.

    Raises:
        UserError: ``out`` contains files that are not of a demo.
    """
    start = time.perf_counter()
    _prepare_folder(out)
    training, held_out = open_images("digits"), open_images("digits", "val")
    config = override(recipe("digits").config, seed=seed)
    config = resolve_defaults(config, len(training), typical_side(training, config.views))

    def embed_both(encoder: Encoder) -> Rows:
        return embed(encoder, training, views).rows, embed(encoder, held_out, views).rows

    views = config.views
    embeddings = {
        "raw pixels": (_pixels(training, views), _pixels(held_out, views)),
        "untrained": embed_both(Learner(config, len(training)).encoder.cpu()),
    }
    seconds: dict[str, float] = {}
    notify(f"Both begin with {config.ir_epochs} epochs of IR on {len(training):,} digits.")
    first = pretrain(override(config, epochs=config.ir_epochs), "digits", out / _START)
    for name, folder in _RUNS.items():
        notify(f"{name}, up to epoch {config.epochs}:")
        ir_epochs = config.epochs if name == "IR" else config.ir_epochs
        longer = override(config, ir_epochs=ir_epochs)
        second = pretrain(longer, "digits", out / folder, start=out / _START)
        seconds[name] = round(first["seconds"] + second["seconds"], 2)
        embeddings[name] = embed_both(load_encoder(out / folder))
    rows = [
        {"name": name, **_measure(found, training, held_out)} for name, found in embeddings.items()
    ]
    _write_report(out, config, rows, embeddings["IR then LA"], training, held_out)
    seconds["total"] = round(time.perf_counter() - start, 2)
    result = {"rows": rows, "seconds": seconds, "seed": seed}
    write_json(out / "results.json", result)
    return result


def _prepare_folder(out: Path) -> None:
    present = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if out.is_file() or not present <= _FILES:
        raise UserError("exists", f"'{out}' contains other files than a demo; use another --out.")
    for folder in _FOLDERS:
        shutil.rmtree(out / folder, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)


def _pixels(source: Source, views: ViewConfig) -> Tensor:
    """The evaluation view of each digit as a unit row: the floor without learning."""
    images = torch.stack([torch.as_tensor(source[i].image) for i in range(len(source))])
    gray = evaluation_view(images, views)[:, :1].flatten(1)
    return torch.nn.functional.normalize(gray, dim=1)


def _measure(embeddings: Rows, training: Source, held_out: Source) -> dict[str, float]:
    references, queries = embeddings
    assert training.labels is not None
    assert held_out.labels is not None
    clusters = cluster_scores(references, training.labels, seeds=_CLUSTERINGS)
    votes = knn_accuracy(queries, held_out.labels, references, training.labels, k=(1,))
    return {
        "knn1": votes["knn1"],
        "nmi": clusters["nmi"]["mean"],
        "cluster_accuracy": clusters["accuracy"]["mean"],
    }


_HEADINGS = {"knn1": "1-NN", "nmi": "NMI", "cluster_accuracy": "cluster accuracy"}


def _write_report(
    out: Path,
    config: PretrainConfig,
    rows: list[dict[str, Any]],
    embeddings: Rows,
    training: Source,
    held_out: Source,
) -> None:
    """Write the page of the last run, with all digits, the held-out ones too."""
    first = read_metrics(out / _START)
    metrics = {name: first + read_metrics(out / folder) for name, folder in _RUNS.items()}
    lead = (
        "The network learned without labels: by Instance Recognition for"
        f" {config.ir_epochs} epochs, then by Local Aggregation up to epoch {config.epochs}."
        " Neighbors and accuracies are of 397 digits that were not used for training."
    )
    results = [[row["name"], *(f"{row[key]:.3f}" for key in _HEADINGS)] for row in rows]
    digits = [(source, i) for source in (training, held_out) for i in range(len(source))]
    shown = Pictured(
        torch.cat(embeddings),
        [source.name(i) for source, i in digits],
        {
            "label": [str(source.label(i)) for source, i in digits],
            "split": ["train" if source is training else "held out" for source, _ in digits],
        },
        [torch.as_tensor(source[i].image) for source, i in digits],
    )
    write_embedding_page(
        out / "report.html",
        shown,
        title="localagg on 1,797 handwritten digits",
        head=f"<p class=lead>{escape(lead)}</p>{table(['', *_HEADINGS.values()], results)}",
        foot="<h2>How it learned</h2>" + learning_curves(metrics, {"LA": config.ir_epochs or 0}),
        clusters=10,
    )
