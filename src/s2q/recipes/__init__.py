"""Recipes: methods as validated YAML, an ordered composition of parts."""

from s2q.recipes.load import checked_overrides, load_recipe, recipe_names
from s2q.recipes.schema import Recipe

__all__ = ["Recipe", "checked_overrides", "load_recipe", "recipe_names"]
