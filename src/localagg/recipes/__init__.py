"""Named configurations, and the rules that complete them."""

from .builtin import READOUT_RECIPES, RECIPES, REFERENCE, readout_recipe, recipe

__all__ = ["READOUT_RECIPES", "RECIPES", "REFERENCE", "readout_recipe", "recipe"]
