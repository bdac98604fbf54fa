"""The quantized pipeline, put together from the artefacts of the blocks."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from torch import nn

from s2q.blocks.data_free import round_linears
from s2q.blocks.quantize_block import from_artefact
from s2q.calibration.teacher import Teacher, TeacherTransformer
from s2q.checkpoint import S2QConfig, attach_config
from s2q.common.arguments import dtype_name
from s2q.common.components import split_name
from s2q.common.run_folder import RunFolder
from s2q.models import OUTSIDE
from s2q.nn import replace_module
from s2q.planning.input_paths import assign_layouts
from s2q.recipes.schema import Recipe

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def assemble(teacher: Teacher, recipe: Recipe, folder: RunFolder, *, frames: int | None = None) -> DiffusionPipeline:
    """Make a pipeline that shares everything with the teacher's but the packed linears.

    Args:
        teacher: The model in the dtype of the checkpoint; not changed.
        recipe: The recipe.
        folder: Where the artefacts of all blocks are.
        frames: Token frames of what was calibrated on, if anything was.

    Returns:
        The pipeline; its transformers have their quantization configurations.
    """
    pipe = copy.copy(teacher.pipe)
    pipe.register_modules(**{one.component: _student(one, recipe, folder, frames) for one in teacher.transformers})
    return pipe


def _student(teacher: TeacherTransformer, recipe: Recipe, folder: RunFolder, frames: int | None) -> nn.Module:
    shared = [*teacher.module.parameters(), *teacher.module.buffers()]
    student = copy.deepcopy(teacher.module, {id(tensor): tensor for tensor in shared})
    layouts = assign_layouts(recipe, teacher.linears, teacher.schemes, frames=frames)
    for index in range(len(teacher.block_names)):
        artefact = folder.load(teacher.artefact_name(index))
        layers = from_artefact(artefact, teacher.quantized_linears(index), teacher.schemes, layouts=layouts)
        for name, layer in layers.items():
            linear = student.get_submodule(_inner(name))
            replace_module(student, _inner(name), layer.to(linear.weight.dtype))  # of its bias
    outer = {_inner(one.name): one.name for one in teacher.quantized_linears(OUTSIDE)}
    for name, layer in round_linears(teacher.module, outer, teacher.schemes).items():
        replace_module(student, _inner(name), layer)
    config = S2QConfig.from_schemes(
        {_inner(name): scheme for name, scheme in teacher.schemes.items()},
        recipe=recipe.name,
        compute_dtype=dtype_name(teacher.module.dtype),
        layouts={_inner(name): layout for name, layout in layouts.items()},
        tokens=teacher.tokens
        if any(one.needs_grid for one in (*teacher.schemes.values(), *layouts.values()))
        else None,
    )
    attach_config(student, config)
    return student


def _inner(name: str) -> str:
    """The name in its transformer of what has this full name."""
    return split_name(name)[1]
