"""Is the quick head as good as scikit-learn's at the same strength, and how long does it take?

Fits both to the same features of a run's layers, and the quick head to 50,000 x 512 random ones.
"""

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

import report
from localagg.checkpoint import load_encoder
from localagg.config import TransferConfig, override
from localagg.evaluation.logistic_regression import Rows, quick_head
from localagg.evaluation.quick_readout import freeze
from localagg.evaluation.readout_inputs import open_labeled


def random_rows() -> Rows:
    """50,000 x 512 features of ten classes that overlap."""
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(50_000) % 10
    centers = torch.randn(10, 512, generator=draws)
    table = 0.15 * centers[labels] + torch.randn(50_000, 512, generator=draws)
    return Rows(lambda part: table[part], torch.arange(50_000), labels, torch.device("cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run folder or weights file")
    parser.add_argument("--data", required=True, help="labelled images with a held-out split")
    parser.add_argument("--layers", nargs="*", help="default: all that fit")
    options = parser.parse_args()
    start = time.perf_counter()
    quick_head(random_rows(), 10)
    rows = [["50,000 x 512 random", "", "", "", f"{time.perf_counter() - start:.1f}", ""]]
    config = override(TransferConfig(), layers=options.layers and tuple(options.layers))
    path = Path(options.run)
    frozen = freeze(config, load_encoder(path), path, open_labeled(options.data))
    labels = frozen.labelled.labels
    for layer in frozen.extractor.layers:
        start = time.perf_counter()
        head = quick_head(frozen.rows(layer, frozen.train.index), frozen.labelled.classes)
        ours = time.perf_counter() - start
        accuracy = frozen.measure({layer: head})[layer]["top1"]
        seen = frozen.rows(layer, frozen.train.index)
        x = np.concatenate([part.numpy() for part, _, _ in seen])
        asked = frozen.held_out.rows(layer, frozen.held_out.index).float()
        asked = ((asked - seen.mean) / seen.deviation).numpy()
        solver = LogisticRegression(C=1 / (len(x) * head.l2), tol=1e-6, max_iter=2000)
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            solver.fit(x, labels[frozen.train.index].numpy())
        theirs = time.perf_counter() - start
        expected = solver.score(
            asked, frozen.labelled.held_out_labels[frozen.held_out.index].numpy()
        )
        shape = f"layer {layer}, {x.shape[0]:,} x {x.shape[1]:,}"
        rows.append(
            [
                shape,
                f"{head.l2:g}",
                f"{accuracy:.2%}",
                f"{expected:.2%}",
                f"{ours:.1f}",
                f"{theirs:.1f}",
            ]
        )
    report.write(
        "quick",
        "The quick head beside scikit-learn's LogisticRegression",
        [
            "features",
            "L2, chosen",
            "top-1, quick",
            "top-1, scikit-learn at this L2",
            "s, quick (choice of L2 included)",
            "s, scikit-learn (one fit)",
        ],
        rows,
        f"Features of `{options.run}` on `{options.data}`, center crop, standardized; top-1 over"
        f" {len(frozen.held_out.index):,} held-out images.",
    )


if __name__ == "__main__":
    main()
