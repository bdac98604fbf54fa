"""The quantized pipeline, put together from the artefacts of the blocks; text encoders are rounded here."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from s2q.blocks.pack import pack_nearest
from s2q.blocks.quantize_block import from_artefact
from s2q.calibration.teacher import Teacher, TeacherTransformer
from s2q.checkpoint import S2QConfig, attach_config, file_tensors
from s2q.checkpoint.text_encoders import encoder_tensors
from s2q.common.arguments import dtype_name
from s2q.common.components import split_name, text_encoders_of, transformers_of
from s2q.common.run_folder import ArtefactFolder, RunFolder
from s2q.models import OUTSIDE
from s2q.nn import replace_module
from s2q.planning import Plan
from s2q.planning.text_encoders import recipe_encoder_linears
from s2q.recipes.schema import Recipe
from s2q.run.text_encoders import configure_encoder, replace_encoder_linear

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def assemble(teacher: Teacher, folder: RunFolder, *, recipe: Recipe) -> DiffusionPipeline:
    """Make a pipeline that shares everything with the teacher's but the packed linears.

    The teacher is in the dtype of the checkpoint and not changed; the folder holds the artefacts of all blocks.
    """
    pipe = with_students(teacher.pipe, teacher.transformers, folder, recipe=recipe)
    if recipe.text_encoder is not None:
        encoders = text_encoders_of(pipe).items()
        pipe.register_modules(**{component: _encoder(component, model, recipe) for component, model in encoders})
    return pipe


def with_students(
    pipe: DiffusionPipeline, transformers: Iterable[TeacherTransformer], folder: ArtefactFolder, *, recipe: Recipe
) -> DiffusionPipeline:
    """Make a pipeline that shares all but some transformers, quantized by the artefacts in the folder."""
    quantized = copy.copy(pipe)
    students = {transformer.component: _student(transformer, folder, recipe.name) for transformer in transformers}
    quantized.register_modules(**students)
    return quantized


def _student(teacher: TeacherTransformer, folder: ArtefactFolder, recipe: str) -> nn.Module:
    student = _sharing_copy(teacher.module)
    for index, block_name in enumerate(teacher.block_names):
        block, artefact = student.get_submodule(block_name), folder.load(teacher.artefact_name(index))
        for name, layer in from_artefact(artefact, teacher.linears_of(index)).items():
            replace_module(block, name, layer.to(block.get_submodule(name).weight.dtype))  # of its bias
    for name, layer in pack_nearest(teacher.module, teacher.linears_of(OUTSIDE), device="cpu").items():
        replace_module(student, name, layer)
    configure(student, teacher, recipe)
    return student


def _sharing_copy(module: nn.Module) -> nn.Module:
    """Copy a module with the same tensors."""
    shared = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})


def _encoder(component: str, teacher: nn.Module, recipe: Recipe) -> nn.Module:
    """Make a text encoder that shares everything with the full-precision one but the packed linears."""
    linears = recipe_encoder_linears(recipe, teacher, component=component)
    student = _sharing_copy(teacher)
    for linear in linears:
        replace_encoder_linear(student, linear)
    configure_encoder(student, linears, recipe=recipe.name)
    return student


def check_bytes(pipe: DiffusionPipeline, planned: Plan) -> None:
    """Assert that files of a quantized pipeline have the bytes of its plan."""
    written = (file_tensors(transformer) for transformer in transformers_of(pipe).values())
    packed = sum(map(_num_bytes, written))
    assert packed == planned.storage["quantized_bytes"], (packed, planned.storage)
    for encoder in planned.text_encoders:
        packed = _num_bytes(encoder_tensors(getattr(pipe, encoder.component)))
        assert packed == encoder.quantized_bytes, (packed, encoder)


def _num_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


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
