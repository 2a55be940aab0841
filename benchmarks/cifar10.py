"""What does the recipe cifar10 reach on this machine, and where does its time go?

Runs ``localagg pretrain cifar10``, or reads a run that is there, and keeps its curve.
"""

import argparse
from pathlib import Path

import report
from localagg.checkpoint import latest, read_progress, read_run
from localagg.io.metrics_log import read_metrics
from localagg.recipes.builtin import recipe
from localagg.training.runs import pretrain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="CIFAR-10 as Parquet")
    parser.add_argument("--out", default="runs/c10")
    arguments = parser.parse_args()
    run = Path(arguments.out)
    if not run.exists():
        pretrain(recipe("cifar10").config, arguments.data, run)
    config, _ = read_run(run)
    summary = read_progress(latest(run))["summary"]
    lines = read_metrics(run)
    losses = {line["epoch"]: line for line in lines if "loss" in line}
    rows = []
    for line in lines:
        if "knn200" not in line:
            continue
        last = losses[line["epoch"]]
        alone = f"{last['without_close']:.1%}" if "without_close" in last else ""
        rows.append(
            [
                line["epoch"],
                last["phase"],
                f"{last['learning_rate']:g}",
                f"{last['loss']:.3f}",
                alone,
                f"{line['knn1']:.1%}",
                f"{line['knn200']:.1%}",
            ]
        )
    shares = ", ".join(f"{part} {share:.1%}" for part, share in summary["shares"].items())
    report.write(
        "cifar10",
        f"localagg pretrain cifar10: {summary['final']['knn200']:.1%} by weighted 200-NN in"
        f" {summary['seconds'] / 60:.1f} minutes",
        ["epoch", "phase", "rate", "last loss", "without close neighbor", "1-NN", "200-NN"],
        rows,
        f"`localagg pretrain cifar10 --data {arguments.data} --out {run}`, seed {config.seed}: the"
        f" 10,000 test images ask the memory bank of the 50,000. Time: {shares}.",
    )


if __name__ == "__main__":
    main()
