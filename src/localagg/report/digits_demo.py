"""The demo: IR then LA on the built-in digits, against floors that are computed, not quoted."""

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
from ..recipes.builtin import recipe
from ..recipes.defaults import resolve_defaults
from ..training.learner import Learner
from ..training.loop import pretrain
from .charts import curves, embedding_map, health_curves
from .page import Page, neighbor_grid, table, write_page

_CLUSTERINGS = 3
_START = "start"  # the epochs of IR that both runs begin with
_RUNS = {"IR": "ir", "IR then LA": "ir-la"}
_FOLDERS = (_START, *_RUNS.values())
_FILES = {*_FOLDERS, "results.json", "report.html"}


def demo(out: Path, *, seed: int = 0) -> dict[str, Any]:
    """Learn the digits twice, by IR alone and by IR then LA, for the same number of epochs.

    The two begin with the same epochs of IR, which are run once.

    Args:
        out: the folder to write; an earlier demo in it is replaced.
        seed: of both runs.

    Returns:
        {"rows": [{"name", "knn1", "nmi", "cluster_accuracy"}], "seconds": {name: s}, "seed"}:
        raw pixels, the untrained network, IR, IR then LA; 1-NN on the held-out digits, k-means of
        the learned ones as means of three clusterings. The same is in ``out/results.json``, and
        a page to look at in ``out/report.html``.

    Raises:
        UserError: ``out`` holds something else than a demo.
    """
    start = time.perf_counter()
    _make_room(out)
    learned, held_out = open_images("digits"), open_images("digits", "val")
    asked = override(recipe("digits").config, seed=seed)
    config = resolve_defaults(asked, len(learned), typical_side(learned))
    views = config.views
    spaces = {
        "raw pixels": (_pixels(learned, views), _pixels(held_out, views)),
        "untrained": _spaces(Learner(config, len(learned)).encoder.cpu(), learned, held_out, views),
    }
    seconds: dict[str, float] = {}
    notify(f"Both begin with {config.ir_epochs} epochs of IR on {len(learned):,} digits.")
    begun = pretrain(override(config, epochs=config.ir_epochs), "digits", out / _START)
    for name, folder in _RUNS.items():
        notify(f"{name}, up to epoch {config.epochs}:")
        ir_epochs = config.epochs if name == "IR" else config.ir_epochs
        going_on = override(config, ir_epochs=ir_epochs)
        ran = pretrain(going_on, "digits", out / folder, start=out / _START)
        seconds[name] = round(begun["seconds"] + ran["seconds"], 2)
        spaces[name] = _spaces(load_encoder(out / folder), learned, held_out, views)
    rows = [{"name": name, **_measure(*space, learned, held_out)} for name, space in spaces.items()]
    _write_report(out, config, rows, spaces["IR then LA"], learned, held_out)
    seconds["total"] = round(time.perf_counter() - start, 2)
    result = {"rows": rows, "seconds": seconds, "seed": seed}
    write_json(out / "results.json", result)
    return result


def _make_room(out: Path) -> None:
    present = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if out.is_file() or not present <= _FILES:
        raise UserError("TODO", f"'{out}' holds something else than a demo; name another --out.")
    for folder in _FOLDERS:
        shutil.rmtree(out / folder, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)


def _pixels(source: Source, views: ViewConfig) -> Tensor:
    """The evaluated view of each digit as a unit row: the floor that needs no learning."""
    images = torch.stack([torch.as_tensor(source[i].image) for i in range(len(source))])
    gray = evaluation_view(images, views)[:, :1].flatten(1)
    return torch.nn.functional.normalize(gray, dim=1)


def _spaces(encoder, learned: Source, held_out: Source, views: ViewConfig) -> tuple[Tensor, Tensor]:
    return embed(encoder, learned, views).rows, embed(encoder, held_out, views).rows


def _measure(known: Tensor, asked: Tensor, learned: Source, held_out: Source) -> dict[str, float]:
    assert learned.labels is not None
    assert held_out.labels is not None
    clusters = cluster_scores(known, learned.labels, seeds=_CLUSTERINGS)
    nearest = knn_accuracy(asked, held_out.labels, known, learned.labels, k=(1,))
    return {
        "knn1": nearest["knn1"],
        "nmi": clusters["nmi"]["mean"],
        "cluster_accuracy": clusters["accuracy"]["mean"],
    }


def _write_report(
    out: Path,
    config: PretrainConfig,
    rows: list[dict[str, Any]],
    space: tuple[Tensor, Tensor],
    learned: Source,
    held_out: Source,
) -> None:
    known, asked = space
    begun = read_metrics(out / _START)
    metrics = {name: begun + read_metrics(out / folder) for name, folder in _RUNS.items()}
    page = Page(
        title="localagg on 1,400 handwritten digits",
        lead=(
            "Nobody told the network which digit is which. It learned by Instance Recognition for"
            f" {config.ir_epochs} epochs, then by Local Aggregation up to epoch {config.epochs}."
            " Neighbors and accuracies are of the 397 digits that it has never seen."
        ),
    )
    page.add("What it reached", table(rows))
    page.add("The space, on a plane (t-SNE of the learned digits)", embedding_map(known, learned))
    page.add(
        "Held-out digits and their nearest neighbors",
        neighbor_grid(asked, held_out, known, learned),
    )
    page.add("While it learned", curves(metrics, switch=config.ir_epochs))
    page.add("Its health, epoch by epoch", health_curves(metrics))
    write_page(out / "report.html", page)
