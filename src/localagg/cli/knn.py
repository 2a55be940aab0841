"""``localagg knn``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..config.options import Precision
from .parse import positional


@dataclass(frozen=True)
class Knn:
    """Accuracy of the weighted vote of nearest neighbors; retrieval; clusters.

    Held-out images are the queries and training images the references. Without a held-out split
    each training image is a query against the others.
    """

    run: str = positional("RUN")
    """Run folder or weights file (.safetensors)."""
    data: str | None = None
    """Data URI. Default: the data of the run."""
    against: Literal["bank", "embeddings"] = "bank"
    """Reference set: the memory bank of the run, or new embeddings of the training split."""
    k: tuple[int, ...] = (1, 10, 20, 100, 200)
    """Numbers of neighbors."""
    retrieval: bool = False
    """Also measure precision@k, and mAP over the full ranking."""
    clusters: bool = False
    """Also measure NMI, ARI and accuracy of k-means, one cluster a class, over 5 seeds."""
    batch_size: int = 256
    """Number of images the network embeds at a time; affects memory and speed only."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device of the computation. auto: the GPU if there is one."""
    precision: Precision = "32-true"
    """Arithmetic of the network: float32, mixed with bfloat16 or float16, or auto, bfloat16 if the
    device has units for it."""
    workers: int = 2
    """Number of decoding processes."""


def run(options: Knn) -> dict[str, Any]:
    """Measure, print the tables and add them to the run's results.json."""
    from ..evaluation.measure_run import measure_run
    from ..evaluation.results.record_results import record_knn
    from ..evaluation.results.results_file import check_appendable
    from ..io.console import print_table

    folder = Path(options.run)
    check_appendable(folder)
    result = measure_run(
        folder,
        data=options.data,
        against=options.against,
        k=options.k,
        workers=options.workers,
        retrieval=options.retrieval,
        clusters=options.clusters,
        batch=options.batch_size,
        device=options.device,
        precision=options.precision,
    )
    print_table(["", "accuracy"], [[k, f"{value:.1%}"] for k, value in result["accuracy"].items()])
    if "retrieval" in result:
        scores = result["retrieval"].items()
        print_table(["", "retrieval"], [[k, f"{v:.1%}"] for k, v in scores if isinstance(v, float)])
    if "clusters" in result:
        parts = ("mean", "std", "min", "max")
        spreads = {name: result["clusters"][name] for name in ("nmi", "ari", "accuracy")}
        rows = [[name, *(f"{v[part]:.3f}" for part in parts)] for name, v in spreads.items()]
        print_table([f"{result['clusters']['clusters']} clusters", *parts], rows)
    print(
        f"Evaluated {result['asked']:,} queries against {result['known']:,} of {result['against']}."
    )
    record_knn(folder, result)
    return result
