"""Recipes: methods as validated YAML, an ordered composition of parts."""

from s2q.recipes.load import load_recipe, recipe_names

__all__ = ["load_recipe", "recipe_names"]
