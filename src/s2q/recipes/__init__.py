"""Recipes: methods as validated YAML, an ordered composition of parts."""

from s2q.recipes.allocation import allocation_bytes, allocation_schemes
from s2q.recipes.assign import assign_schemes, recipe_linears
from s2q.recipes.layouts import assign_layouts
from s2q.recipes.loading import checked_overrides, load_recipe, recipe_names
from s2q.recipes.schema import Recipe

__all__ = [
    "Recipe",
    "allocation_bytes",
    "allocation_schemes",
    "assign_layouts",
    "assign_schemes",
    "checked_overrides",
    "load_recipe",
    "recipe_linears",
    "recipe_names",
]
