"""Do warm clusterings, or late ones, change what is learned? Final 200-NN over seeds.

From one finished run of IR, some epochs of LA at its first rate with each way of clustering and
each seed of the order and the views. Needs hours on two cores at full length.
"""

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import report
from localagg import checkpoint, pretrain
from localagg.config import override
from localagg.recipes.builtin import recipe

WAYS = {
    "cold: faiss, 20 iterations": {"warm_clusters": False},
    "cold: ours, 20 iterations": {"warm_clusters": False, "kmeans": "lloyd"},
    "warm": {"warm_clusters": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", type=Path, required=True, help="a finished run of IR alone")
    parser.add_argument("--data", required=True, help="its images")
    parser.add_argument("--epochs", type=int, default=6, help="of LA")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), help="some of them, by name")
    options = parser.parse_args()
    before, _ = checkpoint.read_run(options.start)
    end = (before.epochs or 0) + options.epochs
    learned = replace(recipe("cifar10").config, encoder=before.encoder)
    plain = override(learned, epochs=end, drops=(), eval_every=end)
    found: dict[str, list[dict]] = {way: [] for way in options.ways}
    for seed in range(options.seeds):
        for way in options.ways:
            with tempfile.TemporaryDirectory() as folder:
                config = override(plain, seed=seed, **WAYS[way])
                run = Path(folder) / "run"
                found[way].append(pretrain(config, options.data, run, start=options.start))
    rows = []
    for way, runs in found.items():
        row = [way]
        for name in ("knn1", "knn200"):
            values = [run["final"][name] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            row.append(f"{statistics.mean(values):.2%} ± {spread:.2%}")
        seconds = [run["shares"].get("clustering", 0.0) * run["seconds"] for run in runs]
        row.append(f"{statistics.mean(seconds) / options.epochs:.2f}")
        row.append(f"{statistics.mean(run['shares'].get('clustering', 0.0) for run in runs):.2%}")
        rows.append(row)
    report.write(
        "warm",
        f"Ways of clustering, over {options.epochs} epochs of LA after {options.start.name}",
        ["way", "1-NN", "200-NN", "s an epoch", "of the time"],
        rows,
        f"Means and standard deviations over {options.seeds} seeds of order and views; the first"
        " clustering of each run is cold, and counted.",
    )


if __name__ == "__main__":
    main()
