"""List the commands: their options dataclass, and the function that runs them."""

from collections.abc import Callable
from typing import Any

from . import (
    demo,
    embed,
    explore,
    inspect,
    knn,
    pack,
    pretrain,
    recipes,
    report,
    results,
    transfer,
)
from .embeddings import clusters, compare, duplicates, outliers, search
from .weights import export, import_tf

# An action prints its result and returns what --json writes, or None.
COMMANDS: dict[str, tuple[type, Callable[[Any], dict[str, Any] | None]]] = {
    "demo": (demo.Demo, demo.run),
    "pretrain": (pretrain.Pretrain, pretrain.run),
    "knn": (knn.Knn, knn.run),
    "transfer": (transfer.Transfer, transfer.run),
    "clusters": (clusters.Clusters, clusters.run),
    "duplicates": (duplicates.Duplicates, duplicates.run),
    "outliers": (outliers.Outliers, outliers.run),
    "compare": (compare.Compare, compare.run),
    "embed": (embed.Embed, embed.run),
    "search": (search.Search, search.run),
    "explore": (explore.Explore, explore.run),
    "report": (report.Report, report.run),
    "results": (results.Results, results.run),
    "inspect": (inspect.Inspect, inspect.run),
    "pack": (pack.Pack, pack.run),
    "export": (export.Export, export.run),
    "import-tf": (import_tf.ImportTf, import_tf.run),
    "recipes": (recipes.Recipes, recipes.run),
}
