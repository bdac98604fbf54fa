"""Plan of a run before any compute: layers, bytes, memory of each stage, and stages that do not fit."""

from s2q.planning.comparison import compare_recipes
from s2q.planning.cost import CalibrationCost, Machine, activation_memory, this_machine
from s2q.planning.gpus import gpus
from s2q.planning.plan import (
    LESS_MEMORY,
    Plan,
    check_memory,
    plan,
    plan_allocated,
    plan_model,
    plan_transformers,
    tensor_sizes,
    workers_that_fit,
)
from s2q.planning.widths import device_products, planned_widths

__all__ = [
    "LESS_MEMORY",
    "CalibrationCost",
    "Machine",
    "Plan",
    "activation_memory",
    "check_memory",
    "compare_recipes",
    "device_products",
    "gpus",
    "plan",
    "plan_allocated",
    "plan_model",
    "plan_transformers",
    "planned_widths",
    "tensor_sizes",
    "this_machine",
    "workers_that_fit",
]
