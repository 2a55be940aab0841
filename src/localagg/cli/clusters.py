"""``localagg clusters``."""

from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from .parse import positional

_SHOWN = 20  # clusters in the printed table


@dataclass(frozen=True)
class Clusters:
    """Group the images of a run or table by k-means, without labels."""

    source: str = positional("RUN|FILE.parquet")
    """Run folder, or table that embed wrote."""
    k: str = "auto"
    """Number of clusters; auto: that of the largest mean silhouette, 2 to 100."""
    seed: int = 0
    """Random seed of the clusterings."""
    out: str | None = None
    """Write a row an image (cluster, distance, silhouette) to this .csv, .parquet or .json file."""


def run(options: Clusters) -> dict[str, Any]:
    """Print the clusters, tightest first."""
    from ..embeddings.clusters import cluster_images
    from ..embeddings.open_table import open_table
    from ..embeddings.result_file import check_result_file
    from ..io.console import print_table

    if options.k != "auto" and not options.k.isdecimal():
        raise UserError("option-invalid", f"--k is '{options.k}'; name a number, or auto.")
    check_result_file(options.out)
    table = open_table(options.source, workers=2)
    k = "auto" if options.k == "auto" else int(options.k)
    result = cluster_images(table, k, seed=options.seed, out=options.out)
    labeled = any(each.get("label") for each in result["clusters"])
    rows = [
        [
            str(each["cluster"]),
            f"{each['size']:,}",
            "" if each["tightness"] is None else f"{each['tightness']:.2f}",
            f"{each['silhouette']:.2f}",
            *([f"{each['label']} {each['purity'] or 0:.0%}"] if labeled else []),
            each["exemplars"][0]["path"],
        ]
        for each in result["clusters"][:_SHOWN]
    ]
    columns = ["cluster", "images", "tightness", "silhouette", *(["label"] if labeled else [])]
    print_table([*columns, "example"], rows)
    if (more := result["k"] - _SHOWN) > 0:
        print(f"{more:,} more clusters; --json FILE writes all.")
    print(
        f"{result['images']:,} images, {result['k']:,} clusters, mean silhouette"
        f" {result['silhouette']:.2f}."
    )
    if (chosen := result["chosen"]) and (tried := chosen["silhouettes"]):
        print(
            f"{result['k']:,} clusters have the largest silhouette of {min(tried)}-{max(tried)} on"
            f" {chosen['images']:,} images; --k N sets another number."
        )
    return result
