"""Do neighbors vote as naively in float64, in a third of the time and a tenth of the memory?

50,000 known rows and 10,000 queries of 128 numbers; the votes of k = 1, 10, 20, 100 and 200. The
plain ways hold the whole matrix of distances or products. Times are interleaved in one process;
peak memory is that of a fresh process each, beyond libraries and data. The votes are compared image
by image with plain float64 numpy, written out below.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import faiss
import numpy as np
import torch

import report
from localagg.evaluation.knn import VOTES, knn_vote

TEMPERATURE = 0.07
THREADS = len(os.sched_getaffinity(0))


# --- The plain ways, as one writes them first ---


def cdist(queries, bank, labels):
    distance = torch.cdist(queries, bank)
    found = distance.topk(max(VOTES), dim=1, largest=False)
    return votes(1 - found.values.square() / 2, labels[found.indices])  # rows have unit length


def product(queries, bank, labels):
    similarity = queries @ bank.T
    found = similarity.topk(max(VOTES), dim=1)
    return votes(found.values, labels[found.indices])


def faiss_knn(queries, bank, labels):
    found = faiss.knn(queries.numpy(), bank.numpy(), max(VOTES), metric=faiss.METRIC_INNER_PRODUCT)
    similarity, rows = map(torch.from_numpy, found)
    return votes(similarity, labels[rows])


def votes(similarity, classes):
    weight = (similarity / TEMPERATURE).exp()
    found = {}
    for k in VOTES:
        sums = torch.zeros(len(weight), int(classes.max()) + 1)
        found[k] = sums.scatter_add_(1, classes[:, :k], weight[:, :k]).argmax(dim=1)
    return found


def ours(queries, bank, labels):
    return knn_vote(queries, bank, labels, k=VOTES, temperature=TEMPERATURE)


WAYS = {
    "torch.cdist, then topk": cdist,
    "whole product, then topk": product,
    "faiss.knn": faiss_knn,
    "localagg.evaluation.knn": ours,
}


# --- The naive vote in float64 ---


def naive(queries, bank, labels):
    """{k: (class of each query, whether another class or another neighbor is an exact tie)}."""
    queries, bank, labels = queries.numpy(), bank.numpy().astype(np.float64), labels.numpy()
    classes = labels.max() + 1
    voted = {k: np.empty(len(queries), dtype=np.int64) for k in VOTES}
    tied = {k: np.zeros(len(queries), dtype=bool) for k in VOTES}
    for i, query in enumerate(queries.astype(np.float64)):
        similarity = bank @ query
        order = np.argsort(-similarity, kind="stable")[: max(VOTES) + 1]
        weight = np.exp(similarity[order] / TEMPERATURE)
        for k in VOTES:
            sums = np.bincount(labels[order[:k]], weights=weight[:k], minlength=classes)
            first, second = np.sort(sums)[::-1][:2]
            voted[k][i] = sums.argmax()
            tied[k][i] = first == second or similarity[order[k - 1]] == similarity[order[k]]
    return voted, tied


# --- What is asked ---


def synthetic():
    """Unit rows around ten centers, some 0.5 of cosine from them: about as hard as CIFAR-10."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.nn.functional.normalize(torch.randn(10, 128, generator=generator), dim=1)

    def rows(size):
        labels = torch.randint(0, 10, (size,), generator=generator)
        noise = torch.randn(size, 128, generator=generator) * 128**-0.5
        return torch.nn.functional.normalize(centers[labels] * 0.25 + noise, dim=1), labels

    (queries, _), (bank, labels) = rows(10_000), rows(50_000)
    return {"queries": queries, "bank": bank, "labels": labels}


def of_run(run: Path, data: str):
    """A run's memory bank, and embeddings of the held-out images."""
    from localagg.checkpoint import load_bank, load_encoder, load_views
    from localagg.data import open_images
    from localagg.embeddings.embed import embed

    held_out = open_images(data, "val")
    found = embed(load_encoder(run), held_out, load_views(run), workers=THREADS)
    bank = torch.nn.functional.normalize(load_bank(run), dim=1)
    return {"queries": found.rows, "bank": bank, "labels": open_images(data).labels}


def peak_mb(way, space) -> float:
    """Extra peak of one evaluation in this process."""
    # What libraries load on first use is not the evaluation's.
    way(space["queries"][:300], space["bank"][:5000], space["labels"][:5000])
    before = resident_peak()
    way(**space)
    return (resident_peak() - before) / 1e6


def resident_peak() -> int:
    """Bytes. Not of getrusage, where a process begins with the peak of its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="a run whose bank is asked, instead of drawn rows")
    parser.add_argument("--data", help="its images")
    parser.add_argument("--one", nargs=2, help="measure one way's memory on a file, and print it")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    faiss.omp_set_num_threads(THREADS)
    if options.one:
        print(peak_mb(WAYS[options.one[0]], torch.load(options.one[1], weights_only=True)))
        return
    space = of_run(options.run, options.data) if options.run else synthetic()
    seconds = report.interleaved({n: lambda w=way: w(**space) for n, way in WAYS.items()}, runs=5)
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save(space, file.name)
        peaks = {
            name: float(
                subprocess.check_output([sys.executable, __file__, "--one", name, file.name])
            )
            for name in WAYS
        }
    voted, tied = naive(**space)
    mine, rows = ours(**space), []
    for name in WAYS:
        found = WAYS[name](**space)
        wrong = sum(int((found[k].numpy() != voted[k])[~tied[k]].sum()) for k in VOTES)
        rows.append(
            [
                name,
                f"{seconds[name]:.2f}",
                *(f"{seconds[base] / seconds[name]:.1f}" for base in list(WAYS)[:2]),
                f"{peaks[name]:,.0f}",
                f"{peaks[name] / peaks['whole product, then topk']:.1%}",
                f"{wrong} of {len(voted) * len(space['queries']):,}",
            ]
        )
    unlike = {k: int((mine[k].numpy() != voted[k]).sum()) for k in VOTES}
    listed = ", ".join(f"{n} at k = {k}" for k, n in unlike.items())
    ties = sum(int(tied[k].sum()) for k in VOTES)
    asked = f"the bank and held-out images of {options.run}" if options.run else "drawn rows"
    report.write(
        "knn",
        f"kNN: {len(space['queries']):,} queries, {len(space['bank']):,} rows ({asked})",
        ["way", "s", "x cdist", "x product", "peak MB", "of product's", "votes unlike float64"],
        rows,
        f"{THREADS} threads each. Votes of localagg.evaluation.knn unlike the naive float64 ones,"
        f" exact ties included: {listed}; exact ties (k-th neighbor or two classes): {ties}.",
    )


if __name__ == "__main__":
    main()
