"""``localagg clusters``."""

from dataclasses import dataclass
from typing import Any

from ...errors import UserError
from ..parse import positional
from .pictures import check_page, write_pictures

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
    html: str | None = None
    """Write a page with pictures of each cluster to this .html file."""


def run(options: Clusters) -> dict[str, Any]:
    """Print the clusters, tightest first."""
    from ...embeddings.clusters import cluster_images
    from ...embeddings.open_table import open_table
    from ...io.console import print_table
    from ...io.result_file import check_result_file

    if options.k != "auto" and not options.k.isdecimal():
        raise UserError("option-invalid", f"--k is '{options.k}'; name a number, or auto.")
    check_result_file(options.out)
    check_page(options.html)
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
    summary = (
        f"{result['images']:,} images, {result['k']:,} clusters, mean silhouette"
        f" {result['silhouette']:.2f}."
    )
    print(summary)
    if (chosen := result["chosen"]) and (tried := chosen["silhouettes"]):
        print(
            f"{result['k']:,} clusters have the largest silhouette of {min(tried)}-{max(tried)} on"
            f" {chosen['images']:,} images; --k N sets another number."
        )
    if options.html is not None:
        pictures = [(_title(each), _examples(each)) for each in result["clusters"]]
        write_pictures(options.html, table, f"Clusters of {options.source}", pictures, summary)
    return result


def _title(cluster: dict[str, Any]) -> str:
    facts = [f"Cluster {cluster['cluster']}: {cluster['size']:,} images"]
    if cluster["tightness"] is not None:
        facts.append(f"tightness {cluster['tightness']:.2f}")
    if cluster.get("purity") is not None:
        facts.append(f"{cluster['purity']:.0%} {cluster['label']}")
    return ", ".join(facts)


def _examples(cluster: dict[str, Any]) -> list[tuple[dict[str, Any], list[str]]]:
    return [(each, [f"distance {each['distance']:.2f}"]) for each in cluster["exemplars"]]
