"""What does the demo reach in the mean over seeds, and how far do seeds scatter?"""

import argparse
import statistics
import tempfile
from pathlib import Path

import report
from localagg.report.digits_demo import demo

COLUMNS = {"knn1": "1-NN", "nmi": "NMI", "cluster_accuracy": "cluster accuracy"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    with tempfile.TemporaryDirectory() as folder:
        results = [demo(Path(folder) / str(seed), seed=seed) for seed in seeds]
    rows = []
    for number, first in enumerate(results[0]["rows"]):
        row = [first["name"]]
        for column in COLUMNS:
            values = [result["rows"][number][column] for result in results]
            row.append(f"{statistics.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})")
        rows.append(row)
    seconds = [result["seconds"]["total"] for result in results]
    report.write(
        "digits",
        f"localagg demo: mean (least-most) over seeds {', '.join(map(str, seeds))}",
        ["", *COLUMNS.values()],
        rows,
        f"Seconds of each demo: {', '.join(f'{s:.0f}' for s in seconds)}.",
    )


if __name__ == "__main__":
    main()
