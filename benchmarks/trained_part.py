"""Which part of a pretrained network should learn with adapt: its head, last stages, or all?

Finished runs are kept in --out, so that the command goes on after them. Labels only measure.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import report
from localagg import pretrain, recipe
from localagg.config import override
from localagg.evaluation.readouts.low_shot import half_width

MEASURES = {"knn200": "200-NN", "nmi": "NMI", "cluster_accuracy": "accuracy"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", nargs="+", help="data URIs, with labels")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--cache", help="of frozen features")
    parser.add_argument("--model", default="timm:tf_efficientnet_lite0")
    parser.add_argument("--parts", nargs="+", default=["head", "last:1", "last:2", "all"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found = {}
    for seed in range(options.seeds):  # each seed of all first: a stopped trial is balanced
        for images in options.images:
            for part in options.parts:
                found[images, part, seed] = learn(options, images, part, seed)
                print(images, part, seed, found[images, part, seed], flush=True)
    rows = []
    for images in options.images:
        for part in options.parts:
            runs = [found[images, part, seed] for seed in range(options.seeds)]
            cells = [show([run[name] for run in runs]) for name in MEASURES]
            rows.append([Path(images).name, part, str(len(runs)), *cells,
                         f"{sum(run['cpu'] for run in runs) / len(runs):.0f}"])  # fmt: skip
    report.write(
        "trained_part",
        "adapt: the part of the network that learns",
        ["images", "--train", "seeds", *MEASURES.values(), "CPU seconds after the features"],
        rows,
        (
            "One seed, so without intervals. "
            if options.seeds == 1
            else "Means and half widths of 95 % intervals over the seeds. "
        )
        + "200-NN, NMI and cluster accuracy as in a run's floors. With last:N and all the network"
        " learns for 4 epochs after the 20 of the head.",
    )


def learn(options: argparse.Namespace, images: str, part: str, seed: int) -> dict[str, float]:
    """Return the measures of a run, and the CPU seconds of its training."""
    run = options.out / f"{Path(images).name}-{part.replace(':', '')}-{seed}"
    noted = run / "cpu.json"
    if noted.exists():
        return json.loads(noted.read_text())
    config = override(
        recipe("adapt").config,
        model=options.model,
        weights=options.weights,
        cache=options.cache,
        train=part,
        seed=seed,
        cache_gb=20.0,
    )
    shutil.rmtree(run, ignore_errors=True)  # stopped; its seconds are lost
    start = time.process_time()  # without worker processes, which compute the features
    summary = pretrain(config, images, run)
    values = summary["floors"]["values"]["trained network"]
    found = {name: values[name] for name in MEASURES} | {"cpu": time.process_time() - start}
    noted.write_text(json.dumps(found))
    return found


def show(values: list[float]) -> str:
    mean, width = sum(values) / len(values), half_width(values)
    return f"{mean:.3f}" if width is None else f"{mean:.3f} ± {width:.3f}"


if __name__ == "__main__":
    main()
