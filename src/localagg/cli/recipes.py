"""``localagg recipes``."""

from dataclasses import dataclass
from typing import Any

from ..config import PretrainConfig, TransferConfig, require_resolved, to_dict
from ..recipes.builtin import READOUT_RECIPES, RECIPES, REFERENCE


@dataclass(frozen=True)
class Recipes:
    """List the named configurations and their cost."""


def run(_: Recipes) -> dict[str, Any]:
    """Print our recipes, then those of the reference program."""
    from ..io.console import print_table

    listed = {**RECIPES, **READOUT_RECIPES}
    ours = [[name, r.about, r.cost] for name, r in listed.items() if name not in REFERENCE]
    print_table(["recipe", "for", "cost"], ours)
    theirs = [[name, *_summary(listed[name].config), listed[name].cost] for name in REFERENCE]
    print_table(["of the reference", "network", "epochs", "clusters", "images"], theirs)
    print("localagg pretrain RECIPE --help shows every option with the recipe's values.")
    return {
        name: {"about": r.about, "cost": r.cost, "config": to_dict(r.config)}
        for name, r in listed.items()
    }


def _summary(config: PretrainConfig | TransferConfig) -> list[str]:
    """Network, epochs and clusters of a recipe."""
    if isinstance(config, TransferConfig):
        return ["RUN's", str(config.epochs), ""]
    if config.ir_epochs == config.epochs:
        return [str(config.encoder.model), f"{config.epochs} IR", ""]
    clusters = require_resolved(config.objective.clusters)
    epochs = f"{config.epochs}, {config.ir_epochs} IR"
    return [str(config.encoder.model), epochs, f"{len(clusters)} x {clusters[0]:,}"]
