"""What is a CIFAR-10 embedding worth, by every measure, beside raw pixels and an untrained network?

Takes the run of the recipe cifar10, and one of IR alone for the same epochs
(``localagg pretrain cifar10 --data CIFAR10 --ir-epochs 44 --out RUN``).
"""

import argparse
from pathlib import Path

import torch

import report
from localagg.checkpoint import load_encoder, read_run
from localagg.config import TransferConfig, override
from localagg.data.loading.scan import load_or_scan
from localagg.data.sources.open import open_images
from localagg.embeddings.embed import embed
from localagg.evaluation.cluster_metrics import cluster_scores
from localagg.evaluation.knn import knn_accuracy
from localagg.evaluation.readouts.linear import transfer
from localagg.evaluation.readouts.logistic_regression import fit_logistic_head
from localagg.evaluation.readouts.quick_readout import quick_readout
from localagg.evaluation.results.protocols import describe_protocol
from localagg.training.learner import make_encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="CIFAR-10")
    parser.add_argument("--ir", required=True, help="run of IR alone")
    parser.add_argument("--la", required=True, help="run of the recipe")
    parser.add_argument("--epochs", type=int, default=5, help="of the linear read-outs")
    parser.add_argument("--layer", default="4", help="of the quick head")
    asked = parser.parse_args()
    config, _ = read_run(Path(asked.la))
    known, held_out = open_images(asked.data), open_images(asked.data, "val")
    pixels = [load_or_scan(source).complete_pixels for source in (known, held_out)]
    # Without the mean image, which all share, unit rows of pixels tell far more.
    flat = [shown.flatten(1).float() for shown in pixels]
    mean = flat[0].mean(dim=0)
    spaces = {"raw pixels": [torch.nn.functional.normalize(rows - mean) for rows in flat]}
    encoders = {
        "untrained": make_encoder(config.encoder, config.seed),
        "IR": load_encoder(Path(asked.ir)),
        "IR then LA": load_encoder(Path(asked.la)),
    }
    for name, encoder in encoders.items():
        spaces[name] = [
            embed(encoder, source, config.views, pixels=shown, batch_statistics=False).rows
            for source, shown in zip((known, held_out), pixels, strict=True)
        ]
    readouts = override(
        TransferConfig(views=config.views), epochs=asked.epochs, ten_crop=False, eval_every=0
    )
    rows, protocols, layers = [], {}, encoders["IR"].layers
    for name, (bank, queries) in spaces.items():
        vote = knn_accuracy(queries, held_out.labels, bank, known.labels, k=(1, 200))
        nmi = cluster_scores(bank, known.labels)["nmi"]
        row = [name, f"{vote['knn1']:.1%}", f"{vote['knn200']:.1%}"]
        if name in encoders:
            only = override(readouts, layers=(asked.layer,))
            quick = quick_readout(only, encoders[name], asked.data)
            linear = transfer(readouts, encoders[name], asked.data)
            measured = (quick["protocol"], linear["protocol"])
            protocols |= dict.fromkeys(map(describe_protocol, measured))
            top1 = [linear["layers"][layer]["top1"] for layer in layers]
            row += [f"{quick['layers'][asked.layer]['top1']:.1%}", *(f"{v:.1%}" for v in top1)]
        else:
            row += [f"{_pixels_head(pixels, known, held_out):.1%}", *([""] * len(layers))]
        rows.append([*row, f"{nmi['mean']:.3f} ± {nmi['std']:.3f}"])
        print(rows[-1], flush=True)
    report.write(
        "embedding",
        "CIFAR-10: raw pixels, an untrained network, IR alone, IR then LA",
        ["", "1-NN", "200-NN", f"quick head, layer {asked.layer}"]
        + [f"linear, layer {layer}" for layer in layers]
        + ["NMI of k-means"],
        rows,
        "1-NN and 200-NN: the 10,000 test images ask fresh embeddings of the 50,000. NMI: k-means"
        " of these into 10 clusters, 5 seeds. Raw pixels: less the mean training image, as unit"
        " rows. " + ". ".join(protocols) + ". Of raw pixels the quick"
        f" head reads all 3,072. One seed each. Runs: `localagg pretrain cifar10 --data"
        f" {asked.data}`, and the same with `--ir-epochs {config.epochs}`.",
    )


def _pixels_head(pixels, known, held_out) -> float:
    """Top-1 of the quick head on all pixels."""
    flat = [p.flatten(1) for p in pixels]
    head = fit_logistic_head(flat[0], known.labels, torch.arange(len(known)), 10)
    found = (flat[1].float() @ head.weight.T + head.bias).argmax(dim=1)
    return (found == held_out.labels).double().mean().item()


if __name__ == "__main__":
    main()
