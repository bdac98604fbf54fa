"""The quantized pipeline, put together from the artefacts of the blocks."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from torch import nn

from s2q.blocks.pack import pack_nearest
from s2q.blocks.quantize_block import from_artefact
from s2q.calibration.teacher import Teacher, TeacherTransformer
from s2q.checkpoint import S2QConfig, attach_config
from s2q.common.arguments import dtype_name
from s2q.common.components import split_name
from s2q.common.run_folder import RunFolder
from s2q.models import OUTSIDE
from s2q.nn import replace_module

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def assemble(teacher: Teacher, folder: RunFolder, *, recipe: str) -> DiffusionPipeline:
    """Make a pipeline that shares everything with the teacher's but the packed linears.

    The teacher is in the dtype of the checkpoint and not changed; the folder holds the artefacts of all blocks.
    """
    pipe = copy.copy(teacher.pipe)
    pipe.register_modules(
        **{transformer.component: _student(transformer, folder, recipe) for transformer in teacher.transformers}
    )
    return pipe


def _student(teacher: TeacherTransformer, folder: RunFolder, recipe: str) -> nn.Module:
    shared = [*teacher.module.parameters(), *teacher.module.buffers()]
    student = copy.deepcopy(teacher.module, {id(tensor): tensor for tensor in shared})
    for index, block_name in enumerate(teacher.block_names):
        block, artefact = student.get_submodule(block_name), folder.load(teacher.artefact_name(index))
        for name, layer in from_artefact(artefact, teacher.linears_of(index)).items():
            replace_module(block, name, layer.to(block.get_submodule(name).weight.dtype))  # of its bias
    for name, layer in pack_nearest(teacher.module, teacher.linears_of(OUTSIDE), device="cpu").items():
        replace_module(student, name, layer)
    configure(student, teacher, recipe)
    return student


def configure(student: nn.Module, teacher: TeacherTransformer, recipe: str) -> None:
    """Give a transformer with packed linears its quantization configuration, by the plans of a teacher, in place."""
    linears = {split_name(linear.name)[1]: linear for linear in teacher.linears}
    config = S2QConfig.from_schemes(
        {name: linear.scheme for name, linear in linears.items()},
        recipe=recipe,
        compute_dtype=dtype_name(teacher.module.dtype),
        paths={name: linear.path for name, linear in linears.items() if not linear.path.empty},
        attention=teacher.attention,
        tokens=teacher.tokens if any(linear.needs_grid for linear in teacher.linears) else None,
    )
    attach_config(student, config)
